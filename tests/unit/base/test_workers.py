"""Tasks shared by processes: the order, a worker's death, and ours."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.unit.base import worker_tasks

from sevenfold.base import workers
from sevenfold.base.errors import BadDataError, SevenfoldError

REPOSITORY = Path(__file__).parents[3]


def test_results_come_in_order_whoever_made_them() -> None:
    alone = list(workers.share(worker_tasks.square, range(7), workers=1))
    shared = list(workers.share(worker_tasks.square, range(7), workers=2))
    assert [square for _, square in alone] == [square for _, square in shared]
    assert [square for _, square in shared] == [number**2 for number in range(7)]
    assert {process for process, _ in alone} == {os.getpid()}
    assert os.getpid() not in {process for process, _ in shared}
    assert list(workers.share(worker_tasks.square, [], workers=3)) == []
    assert workers.usable_cores() >= 1


def test_a_killed_worker_is_named_and_the_others_end() -> None:
    with pytest.raises(SevenfoldError, match=r"worker process \d+ ended by SIGKILL .*fewer --work"):
        list(workers.share(worker_tasks.die, range(5), workers=2))
    assert not multiprocessing.active_children()


def test_a_workers_refusal_is_ours() -> None:
    with pytest.raises(BadDataError, match="number 0 is bad; give another"):
        list(workers.share(worker_tasks.refuse, range(3), workers=2))
    assert not multiprocessing.active_children()


def test_a_worker_that_the_pools_thread_joined_first_is_waited_for() -> None:
    """CPython's thread of the pool joins too, and notes an exit code after the system forgot it."""

    class Joined:
        looks = 0

        @property
        def exitcode(self) -> int | None:
            self.looks += 1
            return -9 if self.looks > 5 else None

        def join(self, timeout: float) -> None:
            assert timeout < 1

    process = Joined()
    workers._join([process])  # type: ignore[list-item]
    assert process.looks == 6


def test_a_worker_that_ends_while_tasks_are_handed_out_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = ProcessPoolExecutor.submit

    def submit(pool: ProcessPoolExecutor, *task: Any) -> Any:
        waiting = plain(pool, *task)
        if task[1] >= 2:  # the one that dies of it
            time.sleep(2)
        return waiting

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(SevenfoldError, match=r"worker process \d+ ended by SIGKILL .*fewer --work"):
        list(workers.share(worker_tasks.die, range(5), workers=2))
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_be_had_is_no_dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ProcessPoolExecutor.submit

    def submit(pool: ProcessPoolExecutor, *task: Any) -> Any:
        if task[1] == 2:
            raise BlockingIOError("no more processes")
        return plain(pool, *task)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    done = workers.share(worker_tasks.square, range(5), workers=2)
    assert [next(done)[1], next(done)[1]] == [0, 1]
    with pytest.raises(BlockingIOError, match="no more processes"):
        next(done)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: int) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom sevenfold.base import workers\n"
        "from sevenfold.workflow.cli import _stop_on_terminate\n"
        "from tests.unit.base import worker_tasks\n"
        "if __name__ == '__main__':\n"
        "    _stop_on_terminate()\n"
        f"    list(workers.share(worker_tasks.wait_in, [Path({str(tmp_path)!r})] * 2, workers=2))\n"
    )
    file = tmp_path / "start.py"
    file.write_text(script, encoding="utf-8")
    path = f"{REPOSITORY / 'src'}:{REPOSITORY}"
    parent = subprocess.Popen(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    try:
        within(30, lambda: len([p for p in tmp_path.iterdir() if p.name.isdecimal()]) == 2)
        children = [int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()]
        parent.send_signal(number)
        parent.wait(timeout=20)
        within(10, lambda: not any(is_alive(child) for child in children))
    finally:
        parent.kill()


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"
