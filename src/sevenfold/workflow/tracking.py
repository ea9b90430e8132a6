"""Metrics to wandb or TensorBoard as well: the very rows that go to ``metrics.jsonl``.

wandb is offline unless WANDB_MODE says otherwise; TensorBoard's files lie in the run's folder
``tensorboard``. Training neither fails nor waits for either: what cannot be tracked is dropped,
with one warning. What wandb would find out by itself (command line, host, repository) is not
written down: it may hold secrets, and a run's record says it already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from sevenfold.base.errors import UsageError, install_command
from sevenfold.workflow.training import Job

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
TENSORBOARD = "tensorboard"
INSTALL = install_command("tensorboard")


class Tracker:
    """Takes rows of metrics as long as what they go to does."""

    def __init__(self, run: Any, *, name: str = "wandb"):
        """Log to ``run``, which is one of ``name``, or nowhere if it is None."""
        self._run = run
        self._name = name
        self._refusals = () if run is None else _refusals(name)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row."""
        if self._run is None:
            return
        try:
            self._run.log(dict(row), step=row["step"])
        except self._refusals as error:
            self._run = None
            _warn(self._name, error)

    def end(self) -> None:
        """Let it finish, for a minute at most."""
        if self._run is None:
            return
        ending = threading.Thread(target=self._finish, args=(self._run,), daemon=True)
        ending.start()
        ending.join(END_TIMEOUT_S)
        if ending.is_alive():
            _warn(self._name, f"it has not finished within {END_TIMEOUT_S:.0f} s")

    def _finish(self, run: Any) -> None:
        try:
            run.finish()
        except self._refusals as error:
            _warn(self._name, error)


class TensorBoard:
    """One stage's curves for TensorBoard; what a resumed stage does again, it shows once."""

    def __init__(self, folder: str):
        """Write into ``folder`` from the first row on.

        Errors:
            UsageError: the package is missing.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                f"tracking: {TENSORBOARD} needs the package {TENSORBOARD}; {INSTALL}, or set "
                "tracking=none"
            ) from None
        self._open = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """Write every number of ``row`` as a point of the curve of its name."""
        if self._writer is None:
            # Points from this step on were written by an attempt that was stopped after its save.
            self._writer = self._open(self._folder, purge_step=step)
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()


def _refusals(name: str) -> tuple[type[Exception], ...]:
    if name == TENSORBOARD:
        return (OSError,)
    from wandb.errors import Error

    return (Error, OSError)


def _warn(name: str, reason: object) -> None:
    log.warning(
        "%s: %s; training goes on without it, and metrics.jsonl holds everything",
        name,
        " ".join(str(reason).split()),
    )


@contextlib.contextmanager
def tracked(job: Job) -> Iterator[Tracker]:
    """Open what the recipe asks for.

    Errors:
        UsageError: its package is missing.
    """
    tracker = Tracker(_start(job), name=job.recipe.tracking)
    try:
        yield tracker
    finally:
        tracker.end()


def _start(job: Job) -> Any:
    if job.recipe.tracking == "none" or not job.processes.is_main:
        return None
    if job.recipe.tracking == TENSORBOARD:
        return TensorBoard(str(job.run.folder / TENSORBOARD / job.stage))
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=START_TIMEOUT_S,
        disable_code=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    try:
        return wandb.init(
            project="sevenfold",
            name=f"{job.run.folder.name}-{job.stage}",
            dir=str(job.run.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config={"stage": job.stage, "preset": job.run.preset, **job.settings},
            settings=settings,
        )
    except (wandb.errors.Error, OSError) as error:
        _warn("wandb", error)
        return None
