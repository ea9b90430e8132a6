"""Who does the tasks of a preparation: this process, several, or a cluster."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sevenfold.base import storage
from sevenfold.base.errors import SevenfoldError, UsageError, install_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """How many tasks are done at a time, and where; no setting, as it changes no result."""

    count: int = 1
    executor: Literal["local", "ray", "slurm"] = "local"
    partition: str | None = None

    @property
    def is_this_process(self) -> bool:
        """True where nobody else is needed."""
        return self.executor == "local" and self.count == 1


def from_flags(options: argparse.Namespace) -> Workers:
    """Return what the flags ask for.

    Errors:
        UsageError: a flag would have no effect.
    """
    if options.partition is not None and options.executor != "slurm":
        raise UsageError("--partition is Slurm's; add --executor slurm or leave it out")
    return Workers(count=options.workers, executor=options.executor, partition=options.partition)


def require_package(name: str, wanted_by: str) -> None:
    """Refuse what needs a package of the extra ``data`` that is not installed.

    Errors:
        UsageError: with the command that installs it.
    """
    if importlib.util.find_spec(name) is None:
        raise UsageError(
            f"{wanted_by} needs the package '{name}', which is not installed; "
            + install_command("data")
        )


def require_executor(workers: Workers) -> None:
    """Refuse workers that need a package which is not installed.

    Errors:
        UsageError: with the command that installs it.
    """
    if not workers.is_this_process:
        require_package("datatrove", f"--workers {workers.count} --executor {workers.executor}")
    if workers.executor == "ray":
        require_package("ray", "--executor ray")


def do_tasks(
    perform: Callable[[int], None],
    *,
    name: str,
    folders: list[Path],
    workers: Workers,
    logs: Path,
) -> None:
    """Do a task for each of ``folders``; each makes its own complete, or leaves it as it is.

    Errors:
        SevenfoldError: a task was not done; the message says where its log is.
        UsageError: datatrove or Ray is not installed.
    """
    if workers.is_this_process:
        for task in range(len(folders)):
            perform(task)
        return
    require_executor(workers)
    from sevenfold.workflow import executors

    executors.run_tasks(perform, name, len(folders), workers, logs)
    missing = [folder for folder in folders if not (folder / storage.MANIFEST).is_file()]
    if missing:
        raise SevenfoldError(
            f"{len(missing)} of {len(folders)} tasks of '{name}' were not done, the first in "
            f"{missing[0]}; see the logs in {logs}, then run the same command again to go on"
        )
