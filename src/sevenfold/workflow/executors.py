"""Tasks on several processes, a Ray cluster or Slurm, by datatrove's executors.

Imported only where such are asked for: datatrove takes seconds to import.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.executor import (
    LocalPipelineExecutor,
    RayPipelineExecutor,
    SlurmPipelineExecutor,
)
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from sevenfold.base.errors import SevenfoldError, UsageError
from sevenfold.workflow.workers import Workers

# Here, as processes that are started elsewhere import this first: what goes wrong in a task comes
# out as an error of ours, and the rest is in datatrove's own files.
logger.disable("datatrove")

MEMORY_GB = 4
PR_SET_PDEATHSIG = 1
SLURM_TIME = "24:00:00"

_executing: set[str] = set()  # what is being done by processes of this machine


class Task(PipelineStep):  # type: ignore[misc]
    """One step of a pipeline: a function of the task's number."""

    type = "sevenfold"

    def __init__(self, perform: Callable[[int], None], name: str) -> None:
        """Do ``perform(task)``; it reads and writes files and passes nothing on."""
        self.name = name
        super().__init__()
        self.perform = perform

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do one task."""
        with self.track_time():
            self.perform(rank)


def run_tasks(
    perform: Callable[[int], None], name: str, num_tasks: int, workers: Workers, logs: Path
) -> None:
    """Do ``perform(0)`` to ``perform(num_tasks - 1)`` by an executor of datatrove.

    Errors:
        SevenfoldError: whatever a task raised in a process of this machine.
        UsageError: the cluster or the queue does not take the tasks.
    """
    facts: dict[str, Any] = {
        "pipeline": [Task(perform, name)],
        "tasks": num_tasks,
        "logging_dir": str(logs.absolute()),
        "skip_completed": False,  # a task knows best whether it is done
    }
    if workers.executor == "ray":
        _run_on_ray(RayPipelineExecutor(workers=workers.count, **facts), workers)
    elif workers.executor == "slurm":
        _run_on_slurm(_slurm(facts, workers, name))
    else:
        _watch_forks()
        _executing.add(name)
        try:
            LocalPipelineExecutor(workers=workers.count, **facts).run()
        finally:
            _executing.discard(name)


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_end_with_parent)


def _end_with_parent() -> None:
    """Let the kernel end this process with the one that forked it, however that ends.

    The executor forks a process that counts its tasks. It would live on for ever after a kill -9,
    and hold the run's lock. The workers are no forks of ours; they end when their pipe does. What
    is forked later, perhaps to train, is left alone: the kernel looks at the thread that forked.
    """
    if _executing and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_on_ray(executor: Any, workers: Workers) -> None:
    import ray

    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise UsageError(
                f"RAY_ADDRESS={address}: no Ray cluster can be had there "
                f"({' '.join(str(error).split())[:200]}); start or correct it, or unset it to "
                "have one started here"
            ) from None
    else:
        ray.init(
            num_cpus=workers.count,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        executor.run()
    finally:
        ray.shutdown()


def _slurm(facts: dict[str, Any], workers: Workers, name: str) -> Any:
    if workers.partition is None:
        raise UsageError("--executor slurm: in which partition? give --partition NAME")
    return SlurmPipelineExecutor(
        workers=workers.count,
        partition=workers.partition,
        time=SLURM_TIME,
        job_name=f"sevenfold-{name}",
        mem_per_cpu_gb=MEMORY_GB,
        qos="",
        venv_path=f"{sys.prefix}/bin/activate",
        sbatch_args={"wait": ""},  # so that the next step finds them done
        **facts,
    )


def _run_on_slurm(executor: Any) -> None:
    try:
        executor.run()
    except FileNotFoundError:
        raise UsageError(
            "--executor slurm: there is no 'sbatch' here; run it where jobs are submitted, or "
            "choose --executor local"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SevenfoldError(
            f"sbatch ended with {error.returncode}: a job was refused or failed; its output is in "
            f"{executor.slurm_logs_folder}; run the same command again to go on"
        ) from None
