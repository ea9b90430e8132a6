"""Trains the tiny model of test_loop in the processes that were started; writes its losses."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
import types
from pathlib import Path

import numpy as np
import torch
from tests.unit.train.test_loop import CONFIG, bench, tiny_model

from sevenfold.base import faults
from sevenfold.base.errors import SevenfoldError
from sevenfold.data.batches import Batches
from sevenfold.train import launch, loop, optimizer, parallel, resuming

IN_8_BITS = dataclasses.replace(
    CONFIG,
    weights="bf16",
    precision="bf16",
    optimizer=dataclasses.replace(CONFIG.optimizer, kind="adamw_8bit"),
)


def main(folder: Path, micro_batch: int, odd_rank: int, *how: str) -> None:
    """Train to the end, going on from a checkpoint where there is one.

    ``odd_rank`` is the process that is started with other data than the rest, -1 for none. ``how``:
    "in 8 bits", with "whole" weights in each process.
    """
    in_8_bits = "in 8 bits" in how
    processes = parallel.join()
    if (folder / "recovery.json").exists():
        os.environ.pop(faults.VARIABLE, None)  # memory that is enough now does not run out again
    config = dataclasses.replace(IN_8_BITS if in_8_bits else CONFIG, micro_batch=micro_batch)
    # As in a stage: the first has the weights in main memory, the others get their shares.
    with torch.device("cpu" if processes.is_main else "meta"):
        model = tiny_model(hidden_size=256).to(torch.bfloat16) if in_8_bits else tiny_model()
    made = bench(folder, config=config, dropout=0.0, model=model, resume=False)
    if processes.world == 1:
        made.scorer.to(processes.device)
    layers = list(made.scorer.causal_model.model.layers)
    if "whole" in how and processes.world > 1:
        parallel.replicate(made.scorer, processes)
    else:
        parallel.shard(made.scorer, layers, processes, bf16=in_8_bits)
    made.processes = processes
    made.optimizer = optimizer.make_optimizer(made.scorer, config.optimizer)
    rows = made.batches.source
    made.batches = Batches(
        rows,
        tokens_per_batch=config.tokens_per_batch,
        contexts=config.contexts,
        num_steps=24,
        seed=5,
        rank=processes.rank,
        world=processes.world,
    )
    made.validation = [rows.batch(np.arange(4), 32).rows(processes.rank, 4, processes.world)]
    if processes.rank == odd_rank:
        made.identity = {**made.identity, "inputs": {"data": "other"}}
    resuming.resume(made)
    loop.fit(made)


def run(arguments: list[str]) -> int:
    """Train as the command line says; return the exit code."""
    try:
        main(Path(arguments[0]), int(arguments[1]), int(arguments[2]), *arguments[3:])
    except SevenfoldError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


class Fork:
    """A process of the launcher's that has imported everything already."""

    def __init__(self, command: list[str], *, env: dict[str, str], pass_fds: tuple[int, ...]):
        self.returncode: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                for number in (signal.SIGTERM, signal.SIGINT):  # not the launcher's handlers
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(env)
                code = run(command[command.index(__name__) + 1 :])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        self._wait(os.WNOHANG)
        return self.returncode

    def wait(self) -> None:
        self._wait(0)

    def _wait(self, how: int) -> None:
        if self.returncode is None:
            ended, status = os.waitpid(self._pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start() -> None:
    """Train in a warm process, or in as many of its forks as the first word says."""
    num_processes = int(sys.argv[1])
    if num_processes == 1:
        sys.exit(run(sys.argv[2:]))
    launch.subprocess = types.SimpleNamespace(Popen=Fork)  # type: ignore[assignment]
    sys.exit(launch.launch(["-m", __name__, *sys.argv[2:]], num_processes))


if __name__ == "__main__":
    os._exit(run(sys.argv[1:]))  # without waiting for the others' part of an exchange
