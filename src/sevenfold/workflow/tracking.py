"""Metrics to wandb as well, offline unless WANDB_MODE says otherwise.

Training neither fails nor waits for it: what cannot be tracked is dropped, with one warning. What
wandb would find out by itself (command line, host, repository) is not written down: it may hold
secrets, and a run's record says it already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from sevenfold.workflow.training import Job

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0


class Tracker:
    """Takes rows of metrics as long as wandb does."""

    def __init__(self, run: Any):
        """Log to ``run``, or nowhere if it is None."""
        self._run = run

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row."""
        if self._run is None:
            return
        from wandb.errors import Error

        try:
            self._run.log(dict(row), step=row["step"])
        except (Error, OSError) as error:
            self._run = None
            _warn(error)

    def end(self) -> None:
        """Let wandb finish, for a minute at most."""
        if self._run is None:
            return
        ending = threading.Thread(target=_finish, args=(self._run,), daemon=True)
        ending.start()
        ending.join(END_TIMEOUT_S)
        if ending.is_alive():
            _warn(f"it has not finished within {END_TIMEOUT_S:.0f} s")


def _finish(run: Any) -> None:
    from wandb.errors import Error

    try:
        run.finish()
    except (Error, OSError) as error:
        _warn(error)


def _warn(reason: object) -> None:
    log.warning(
        "wandb: %s; training goes on without it, and metrics.jsonl holds everything",
        " ".join(str(reason).split()),
    )


@contextlib.contextmanager
def tracked(job: Job) -> Iterator[Tracker]:
    """Open a wandb run where the recipe asks for one."""
    tracker = Tracker(_start(job))
    try:
        yield tracker
    finally:
        tracker.end()


def _start(job: Job) -> Any:
    if job.recipe.tracking != "wandb" or not job.processes.is_main:
        return None
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
        _warn(error)
        return None
