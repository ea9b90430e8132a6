"""Tasks shared by processes, results in the tasks' order; in this process where one is enough.

Processes are spawned, not forked, so that no thread of this one is half alive in them. They end
with this one, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from sevenfold.base.errors import SevenfoldError

Task = TypeVar("Task")
Result = TypeVar("Result")

JOIN_TIMEOUT_S = 10.0


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def share(
    perform: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
) -> Iterator[Result]:
    """Yield ``perform(task)`` of every task, in order, done by at most so many processes.

    Tasks and results travel between processes, so ``perform`` is a function of a module.

    Errors:
        SevenfoldError: a process was ended from outside; which, by what, and what to do.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield perform(task)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_become_worker
    )
    processes: set[BaseProcess] = set()
    refused: OSError | None = None
    try:
        waiting = []
        for task in tasks:
            try:
                waiting.append(pool.submit(perform, task))
            except OSError as error:  # no more processes; or the pool broke, as a result will say
                refused = error
                break
            if len(processes) < workers:  # it starts them one by one, as tasks come
                processes.update(multiprocessing.active_children())
                processes -= others
        for future in waiting:
            yield future.result()
        if refused is not None:
            raise refused
        pool.shutdown()
    except BrokenProcessPool:
        raise SevenfoldError(_what_ended(processes)) from None
    finally:  # whatever stopped us, also a signal: nobody works on for nobody
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        _join(processes)


def _join(processes: Collection[BaseProcess]) -> None:
    """Wait until all have ended and how is known.

    The pool's thread joins them too. Where it was faster, ``join`` here returns at once, knowing
    nothing until that thread has noted the exit code.
    """
    give_up_s = time.monotonic() + JOIN_TIMEOUT_S
    for process in processes:
        while process.exitcode is None and time.monotonic() < give_up_s:
            process.join(0.1)
            time.sleep(0.001)


def _become_worker() -> None:
    """Leave signals from the keyboard to the parent, take one core, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _what_ended(processes: Collection[BaseProcess]) -> str:
    _join(processes)
    usual = (None, 0, -signal.SIGTERM)  # SIGTERM is what ends the others then
    by_name = sorted(processes, key=lambda process: process.name)
    ended = [process for process in by_name if process.exitcode not in usual]
    found = "a worker process ended"
    if ended:
        code = int(ended[0].exitcode or 0)
        by = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        found = f"worker process {ended[0].pid} ended {by}"
    return (
        f"{found} before its work was done, perhaps for want of memory; run the same command "
        "again, with fewer --workers if it happens again: what the others have finished is kept"
    )
