"""`sevenfold bench resume`: a stage saves in one process and goes on in the next.

What is measured is the second, from before its start until its first step is done: the caches of
compiled code are warm, the checkpoint is read from the disk. Both say on standard error what each
part took, as soon as it is over.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sevenfold.base import hardware, storage
from sevenfold.base.errors import CheckpointError, SevenfoldError, UsageError
from sevenfold.train import checkpoint, launch, loop, resuming
from sevenfold.train.watching import totals
from sevenfold.workflow import trial, workbench

log = logging.getLogger(__name__)

# What a process does of the two things: ``save``, or go on since the moment that is given here.
PART_VARIABLE = "SEVENFOLD_BENCH_RESUME"
SAVE = "save"
SAVED = "saved.json"
# The first compiles everything that the one after the checkpoint will need.
STEPS_BEFORE = 1

Prepare = Callable[[], trial.Trial]


def start_both(arguments: list[str]) -> None:
    """Do the command ``arguments`` in a process, or one per GPU, that saves; in one that goes on.

    Errors:
        UsageError: these processes have been started by torchrun.
        SevenfoldError: one ended with an error, which it has printed itself.
    """
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            "bench resume starts its processes itself, twice; call it without torchrun"
        )
    for is_first in (True, False):
        os.environ[PART_VARIABLE] = SAVE if is_first else repr(time.time())
        try:
            code = launch.launch(
                ["-m", "sevenfold.workflow.cli", *arguments], launch.num_processes_to_start()
            )
        finally:
            del os.environ[PART_VARIABLE]
        if code:
            kinds = {kind.exit_code: kind for kind in SevenfoldError.__subclasses__()}
            what = "saves" if is_first else "goes on"
            raise kinds.get(code, SevenfoldError)(
                f"bench resume: the process that {what} ended with exit code {code}; its own "
                "message is above"
            )


def part() -> str | None:
    """Return what this process has to do, None where it has to start the others."""
    return os.environ.get(PART_VARIABLE)


class _Watch:
    """Says what each part took as it ends."""

    def __init__(self, began_at_s: float):
        self.parts: dict[str, float] = {}
        self._last_s = began_at_s

    def mark(self, name: str, told: str) -> None:
        """End the part ``name``, which ``told`` describes; the next begins."""
        hardware.wait_for_gpu()
        now_s = time.time()
        self.note(name, told, now_s - self._last_s)
        self._last_s = now_s

    def note(self, name: str, told: str, seconds: float) -> None:
        """Note a part that somebody else has timed."""
        self.parts[name] = seconds
        log.info("bench resume: %s: %.1f s", told, seconds)


class _Unpinned(checkpoint.Checkpoints):
    """Checkpoints of one write and one read, neither beside training: nothing is page-locked."""

    def __init__(self, folder: Path, watch: _Watch):
        super().__init__(folder, keep=1)
        self._watch = watch
        self.digest = ""

    def reserve(self, parts: checkpoint.Parts) -> None:
        """Do nothing: it begins after the first step."""

    def save(self, snapshot: checkpoint.Snapshot) -> None:
        """Write at once, as ever but for the copies in main memory."""
        self._watch.mark("cold_first_step_s", "first step, kernels compiled where there were none")
        copies: dict[str, Any] = {p: _on_cpu(getattr(snapshot, p)) for p in checkpoint.PARTS}
        self._watch.mark("copied_s", "copied to main memory")
        self._write(dataclasses.replace(snapshot, **copies))
        self._watch.mark("durable_s", "checkpoint durable, and read again")
        self.digest = checkpoint.digest(*copies.values())

    def load_latest(self) -> checkpoint.Snapshot | None:
        """Read and check as ever."""
        found = super().load_latest()
        self._watch.mark("read_s", "checkpoint read, SHA-256 checked")
        return found


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def save(prepare: Prepare, length: int, folder: Path) -> None:
    """Train a step, save, and write down what was saved; nothing of it is left in memory caches."""
    watch = _Watch(time.time())
    made = _make_bench(prepare(), length, folder, watch)
    watch.mark("cold_build_s", "model built")
    trial.train(made, STEPS_BEFORE)
    if made.processes.is_main:
        assert isinstance(made.checkpoints, _Unpinned)
        files = [path for path in made.checkpoints.path(made.step).iterdir() if path.is_file()]
        facts = {"bytes": sum(path.stat().st_size for path in files), "files": len(files)}
        saved = {"digest": made.checkpoints.digest, "parts": watch.parts, "facts": facts}
        storage.write_json(folder / SAVED, saved)
        _drop_from_page_cache(folder)
    made.processes.wait()


def go_on(prepare: Prepare, length: int, folder: Path) -> tuple[trial.Trial, dict[str, Any]]:
    """Build the model anew, restore what was saved and train one step; return what it took.

    Errors:
        CheckpointError: what was restored is not what was saved.
    """
    watch = _Watch(float(os.environ[PART_VARIABLE]))
    saved = storage.read_json(folder / SAVED, CheckpointError)
    watch.mark("start_s", "process started, libraries imported")
    tried = prepare()
    made = _make_bench(tried, length, folder, watch)
    watch.mark("build_s", "model built again")
    resuming.resume(made)
    watch.mark("restore_s", "restored to where it trains")
    digest = workbench.digest(made)
    if made.processes.is_main and digest != saved["digest"]:
        raise CheckpointError(
            f"{made.checkpoints.path(made.step)}: what was restored is not what was saved; this "
            "is a mistake of Sevenfold's: report it with the output of sevenfold doctor"
        )
    log.info("bench resume: every bit is as it was saved")
    (seconds,) = totals(trial.train(made, 1))
    watch.note("first_step_s", "first step, kernels from the caches", seconds)
    return tried, {
        "resume_s": sum(watch.parts.values()),
        **watch.parts,
        "identical": True,
        **saved["facts"],
        **saved["parts"],
    }


def _make_bench(tried: trial.Trial, length: int, folder: Path, watch: _Watch) -> loop.Workbench:
    return trial.make_bench(
        tried,
        length,
        num_steps=STEPS_BEFORE + 1,
        checkpoints=_Unpinned(folder, watch),
        checkpoint_every=STEPS_BEFORE if part() == SAVE else trial.NEVER,
    )


def _drop_from_page_cache(folder: Path) -> None:
    """Let the files under ``folder`` be read from the disk, as after a restart of the machine."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
