"""Two gloo processes with FSDP2 train the same model as one, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tests.warm import Warm, forks_work

from sevenfold.base.errors import SevenfoldError, UsageError
from sevenfold.base.storage import JsonLines
from sevenfold.train import launch as launching
from sevenfold.train import parallel
from sevenfold.train.checkpoint import Checkpoints
from sevenfold.train.launch import launch

REPOSITORY = Path(__file__).parents[3]


PYTHON_PATH = f"{REPOSITORY / 'src'}:{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"


PROGRAM = "tests.unit.train.several_processes"
WARM = Warm(PROGRAM, "torch._dynamo", "transformers.models.llama.modeling_llama")


def train(folder: Path, num_processes: int, *options: str, micro_batch: int = 1) -> int:
    """Train in so many processes, which have imported everything already; return the exit code."""
    arguments = [str(folder), str(micro_batch), *(options or ["-1"])]
    if not forks_work():
        command = ["-m", PROGRAM, *arguments]
        if num_processes > 1:
            return launch(command, num_processes)
        return subprocess.run([sys.executable, *command], check=False, timeout=300).returncode
    asked = [str(num_processes), *arguments]
    done = WARM.call(f"{PROGRAM}:start", *asked, environment=dict(os.environ))
    sys.stderr.write(done.stderr)
    return done.returncode


def losses(folder: Path) -> list[float]:
    rows = JsonLines(folder / "metrics.jsonl").read()
    return [row["loss"] for row in rows if "event" not in row]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children import the package and the tests from here.

    What joins in this very process has the first GPU, of however many there are.
    """
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process that nothing disturbed leaves."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setenv("PYTHONPATH", PYTHON_PATH)
        assert train(folder, 1) == 0
    return folder


# --- the launcher, with processes that do next to nothing


@pytest.mark.parametrize("code", [6, 75])
def test_the_exit_code_of_the_first_to_fail_is_returned(code: int) -> None:
    script = (
        f"import os, sys, time; sys.exit({code}) if os.environ['RANK'] == '1' else time.sleep(60)"
    )
    assert launch(["-c", script], 2) == code


@pytest.mark.fault("E04")
def test_started_again_they_do_not_start_afresh() -> None:
    script = "import sys; sys.exit(76 if '--no-resume' in sys.argv else 3)"
    assert launch(["-c", script, "--no-resume"], 2) == 3


def test_a_failure_counts_where_nothing_was_heard_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at all data takes as long as it takes; what is found there is not a lack of news."""
    monkeypatch.setattr(launching, "GRACE_S", 0.3)
    monkeypatch.setenv("SEVENFOLD_PATIENCE_S", "2")
    script = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    sys.exit(4)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
    start = launching._Child.__init__

    def started_long_ago(child: launching._Child, *asked: object) -> None:
        start(child, *asked)  # type: ignore[arg-type]
        if child.rank == 1:
            child.process.wait()
        child.heard_at_s -= 100

    monkeypatch.setattr(launching._Child, "__init__", started_long_ago)
    assert launch(["-c", script], 2) == 4


def test_processes_meet_at_a_port_that_is_never_let_go() -> None:
    script = """
import os, socket
socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), 5).close()
"""
    assert launch(["-c", script], 2) == 0


def test_a_signal_while_processes_are_being_started_stops_those_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[launching._Child] = []
    start = launching._Child.__init__

    def interrupted(child: launching._Child, *asked: object) -> None:
        start(child, *asked)  # type: ignore[arg-type]
        started.append(child)
        signal.raise_signal(signal.SIGTERM)

    unhandled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: unhandled.append(number))
    monkeypatch.setattr(launching._Child, "__init__", interrupted)
    try:
        assert launch(["-c", "import time; time.sleep(60)"], 2) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not unhandled
    assert [child.process.returncode for child in started] == [-signal.SIGTERM]


@pytest.mark.parametrize(("code", "said"), [(76, 75), (1, 75), (4, 4), (0, 0)])
def test_those_that_were_told_to_stop_have_stopped(tmp_path: Path, code: int, said: int) -> None:
    """Though one runs out of memory in that very step, or was still starting, which Python ends.

    Bad data, or the end of all work, is said as it is.
    """
    ready = tmp_path / "ready"
    script = f"""
import signal, sys, time
from pathlib import Path

if Path({str(ready)!r}).exists():
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
Path({str(ready)!r}).touch()
time.sleep(60)
"""

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch(["-c", script], 1) == said
    thread.join()


def test_where_one_cannot_be_started_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def popen(*asked: object, **how: object) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(start(*asked, **how))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no more processes"):
        launch(["-c", "import time; time.sleep(60)"], 2)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.fault("A05", "A08")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_lets_all_save(tmp_path: Path, number: int) -> None:
    script = f"""
import os, signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(0.5)
    Path({str(tmp_path)!r}, os.environ["RANK"]).touch()
    os._exit(75)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
Path({str(tmp_path)!r}, "ready-" + os.environ["RANK"]).touch()
time.sleep(60)
"""

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch(["-c", script], 2) == 75
    thread.join()
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


@pytest.mark.fault("F01", "A10")
def test_a_process_that_hangs_is_named_with_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVENFOLD_PATIENCE_S", "1.5")
    script = """
import os, time
step = 4 if os.environ["RANK"] == "1" else 5
os.write(int(os.environ["SEVENFOLD_HEARTBEAT"]), f"step {step}, backward\\n".encode())
time.sleep(60)
"""
    started = time.monotonic()
    with pytest.raises(
        SevenfoldError,
        match=r"nothing has moved for 2 s.*process 0: step 5, backward; process 1: step 4, backw",
    ):
        launch(["-c", script], 2)
    assert time.monotonic() - started < 20


@pytest.mark.fault("F06")
def test_a_meeting_place_that_does_not_exist_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "no.such.invalid"}.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"MASTER_ADDR 'no.such.invalid': no such host .*first no"):
        parallel.join()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "EADDRINUSE"),
        ({"RANK": None}, "environment variable RANK expected, but not set"),
        ({"MASTER_PORT": None}, "environment variable MASTER_PORT expected"),
        ({"RANK": "first"}, "'first'"),
    ],
)
def test_processes_that_do_not_meet_are_told_what_they_need(
    changed: dict[str, str | None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that this is a mistake of ours: somebody's own script has started them."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        named = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", **changed}
        for name, value in {**named, "CUDA_VISIBLE_DEVICES": ""}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        with pytest.raises(
            UsageError, match=rf"WORLD_SIZE 2: .* not meet \(.*{reason}.*; each needs RANK, LOCAL_"
        ):
            parallel.join()


@pytest.mark.parametrize(("patience", "waiting_s"), [(None, 1800), ("7200", 7200), ("1.5", 1800)])
def test_processes_wait_for_each_other_as_long_as_their_launcher_does(
    patience: str | None, waiting_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they meet, the first may measure a model from outside; NCCL alone gives up sooner."""

    class AskedError(Exception):
        """Ends the joining, with what was asked of it."""

    def note(backend: str, timeout: timedelta) -> None:
        raise AskedError(timeout.total_seconds())

    monkeypatch.setattr(torch.distributed, "init_process_group", note)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    if patience:
        monkeypatch.setenv("SEVENFOLD_PATIENCE_S", patience)
    with pytest.raises(AskedError, match=f"^{waiting_s}.0$"):
        parallel.join()


@pytest.mark.parametrize(
    ("per_node", "others"), [(None, None), ("0", "0"), ("3", "3"), ("some", "some"), ("4", "8")]
)
def test_how_many_processes_run_on_each_node_has_to_be_said(
    per_node: str | None, others: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else several nodes would be taken for one, or each would share the model out in its way."""
    environment = {"WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if per_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)

    def differ_if_asked(tensor: torch.Tensor, operation: torch.distributed.ReduceOp) -> None:
        if others != per_node and operation == torch.distributed.ReduceOp.MAX:
            tensor += 1

    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", differ_if_asked)
    with pytest.raises(
        UsageError,
        match=rf"LOCAL_WORLD_SIZE '{per_node or ''}': of 8 .* as many must run on each node, and "
        "this must say how many; torchrun and scripts/slurm_train.sbatch set it",
    ):
        parallel.join()


@pytest.mark.parametrize("local_rank", [None, "first"])
def test_which_gpu_is_whose_has_to_be_said(
    local_rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all of them would take the first."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UsageError, match=rf"LOCAL_RANK '{local_rank or ''}': 2 GPUs .* counted from 0 .* set it"
    ):
        parallel.join()


def test_nodes_of_equal_size_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    found = parallel.join()
    assert (found.rank, found.world, found.per_node) == (5, 8, 4)


@pytest.mark.parametrize("text", ["soon", "-3", "nan", "inf"])
def test_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SEVENFOLD_PATIENCE_S", text)
    with pytest.raises(UsageError, match=f"SEVENFOLD_PATIENCE_S: '{text}' is not a number of sec"):
        launch(["-c", "pass"], 2)


def test_processes_stop_when_the_one_that_started_them_is_gone(tmp_path: Path) -> None:
    """The reader of the heartbeat is closed before the process writes to it."""
    script = """
import os, signal, sys
from sevenfold.train.launch import at_phase
reading, writing = os.pipe()
os.close(reading)
os.environ["SEVENFOLD_HEARTBEAT"] = str(writing)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
at_phase(3, "forward")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 75


class Part:
    """A tensor shared out, which notes how many that were put together a GPU holds at once."""

    held: ClassVar[list[int]] = [0]

    def full_tensor(self) -> Part:
        whole = Part()
        self.held.append(self.held[-1] + 1)
        weakref.finalize(whole, lambda: self.held.append(self.held[-1] - 1))
        return whole

    def detach(self) -> Part:
        return self

    def cpu(self) -> torch.Tensor:
        return torch.zeros(1)


def test_moments_are_put_together_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, those of a 7B take 15 to 59 GB beside the weights of each GPU."""
    parts = {f"weight {number}::exp_avg": Part() for number in range(3)}
    monkeypatch.setattr(parallel.optimizers, "flatten_state", lambda *_: parts)
    monkeypatch.setattr(parallel.optimizers, "parameter_names", lambda *_: [])
    two = parallel.Processes(rank=0, world=2, device=torch.device("cpu"))
    found = parallel.gather_optimizer(torch.nn.Linear(1, 1), None, two)  # type: ignore[arg-type]
    assert set(found) == set(parts)
    assert Part.held == [0, 1, 0, 1, 0, 1, 0]


# --- training


@pytest.mark.fault("B15", "C09")
def test_a_checkpoint_goes_on_with_another_number_of_processes(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEVENFOLD_FAULTS", "term@step=12")
    assert train(tmp_path, 1) == 75
    monkeypatch.setenv("SEVENFOLD_FAULTS", "term@step=17:rank=1")
    assert train(tmp_path, 2) == 75
    monkeypatch.delenv("SEVENFOLD_FAULTS")
    assert train(tmp_path, 1) == 0
    assert np.allclose(losses(alone), losses(tmp_path), rtol=1e-4)


@pytest.mark.fault("C09")
def test_whole_weights_come_to_the_same_and_their_checkpoints_go_on_in_one_process(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one process on in two with whole weights, in one, and in two once more.

    Those with whole weights skip a step that is bad in one of them, and stop for a signal to one.
    """
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    for step in ("20", "24"):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-000000{step}")
    monkeypatch.setenv("SEVENFOLD_FAULTS", "term@step=18:rank=1")
    assert train(tmp_path, 2, "-1", "whole") == 75
    assert checkpoints(tmp_path)[-1] in ("step-00000018", "step-00000019")
    monkeypatch.setenv("SEVENFOLD_FAULTS", "term@step=21")
    assert train(tmp_path, 1) == 75
    monkeypatch.setenv("SEVENFOLD_FAULTS", "nan@step=24:rank=1")
    assert train(tmp_path, 2, "-1", "whole") == 0
    events = [row for row in JsonLines(tmp_path / "metrics.jsonl").read() if "event" in row]
    skips = [row for row in events if row["event"] == "skip"]
    assert [row["step"] for row in skips] == [24]
    assert "model.model.embed_tokens.weight" in skips[0]["tensors"]
    assert np.allclose(losses(alone)[:23], losses(tmp_path)[:23], rtol=1e-4)
    assert losses(alone)[:15] == losses(tmp_path)[:15]


@pytest.mark.fault("C09")
def test_8_bit_moments_are_shared_out_and_gathered_like_weights(tmp_path: Path) -> None:
    """Two processes go on where one was; weights are rounded by chance: losses differ by per cents.

    In the end their state is whole again, as one process would have written it.
    """
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train(alone, 1, "-1", "in 8 bits") == 0
    shutil.copytree(alone, together)
    for step in ("20", "24"):
        shutil.rmtree(together / "checkpoints" / f"step-000000{step}")
    assert train(together, 2, "-1", "in 8 bits") == 0
    assert checkpoints(together) == checkpoints(alone) == [f"step-000000{n}" for n in (15, 20, 24)]
    assert np.allclose(losses(alone), losses(together), rtol=0.05)
    assert losses(alone)[:15] == losses(together)[:15]
    assert losses(alone)[15:] != losses(together)[15:]
    one, two = (
        Checkpoints(folder / "checkpoints", keep=3).load(24).optimizer
        for folder in (alone, together)
    )
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
        k: (v.shape, v.dtype) for k, v in two.items()
    }
    codes = two["model.model.layers.0.mlp.gate_proj.weight::exp_avg_codes"]
    assert (codes.shape, codes.dtype) == ((32, 256), torch.uint8)
    assert bool((codes.reshape(2, -1).float().std(1) > 0).all())  # both processes' halves


@pytest.mark.fault("A08", "D05")
def test_a_signal_to_one_process_saves_the_same_step_in_all(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same command goes on; a step that is bad in one process is skipped by all."""
    monkeypatch.setenv("SEVENFOLD_FAULTS", "term@step=8:rank=1")
    assert train(tmp_path, 2) == 75
    assert checkpoints(tmp_path) in (
        ["step-00000005", "step-00000008"],
        ["step-00000005", "step-00000009"],
    )
    monkeypatch.setenv("SEVENFOLD_FAULTS", "nan@step=24:rank=1")
    assert train(tmp_path, 2) == 0
    events = [row for row in JsonLines(tmp_path / "metrics.jsonl").read() if "event" in row]
    assert [row["step"] for row in events if row["event"] == "skip"] == [24]
    assert np.allclose(losses(alone)[:23], losses(tmp_path)[:23], rtol=1e-4)


@pytest.mark.fault("A09", "C09", "D06", "F03")
def test_a_killed_process_is_named_and_the_same_command_goes_on(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other, which waits for it in an exchange, is ended after its time to save is over.

    Two processes come to what one comes to, in every step.
    """
    monkeypatch.setattr(launching, "GRACE_S", 10.0)
    monkeypatch.setenv("SEVENFOLD_FAULTS", "kill@step=13:rank=1")
    assert launch(["-m", PROGRAM, str(tmp_path), "1", "-1"], 2) not in (0, 75)
    last_sign_of_life_s = (tmp_path / "metrics.jsonl").stat().st_mtime
    assert time.time() - last_sign_of_life_s < 25
    assert "process 1 of 2 was ended by SIGKILL after step 13" in caplog.text
    monkeypatch.delenv("SEVENFOLD_FAULTS")
    assert train(tmp_path, 2) == 0
    assert len(losses(tmp_path)) == 24
    assert np.allclose(losses(alone), losses(tmp_path), rtol=1e-4)


@pytest.mark.fault("E04")
@pytest.mark.parametrize(("phase", "how"), [("forward", ()), ("backward", ("whole",))])
def test_one_process_out_of_memory_lets_all_start_again_smaller(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, how: tuple[str, ...]
) -> None:
    """With shares of one model, and with whole weights in each."""
    monkeypatch.setenv("SEVENFOLD_FAULTS", f"oom@step=8:phase={phase}:rank=1")
    assert train(tmp_path, 2, "-1", *how, micro_batch=2) == 0
    decisions = json.loads((tmp_path / "recovery.json").read_text())
    assert decisions["micro_batches"] == [[7, 1]]
    assert np.allclose(losses(alone), losses(tmp_path), rtol=1e-4)


@pytest.mark.fault("F04")
def test_processes_started_with_different_data_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, 2, "1") == 2
    told = capfd.readouterr().err
    assert "inputs.data is not the same in all 2 processes (here 'other'); start them all" in told
    assert not (tmp_path / "checkpoints").exists()
