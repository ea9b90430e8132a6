"""Trains the tiny model of test_loop in the processes that torchrun started; writes its losses."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from tests.unit.train.test_loop import CONFIG, bench

from sevenfold.data.batches import Batches
from sevenfold.train import loop, optimizer, parallel, resuming
from sevenfold.train.parallel import shard


def main(folder: Path) -> None:
    """Train to the end, going on from a checkpoint where there is one."""
    processes = parallel.join()
    config = dataclasses.replace(CONFIG, micro_batch=1)
    made = bench(folder, config=config, dropout=0.0, resume=False)
    shard(made.scorer, list(made.scorer.causal_model.model.layers), processes, bf16=False)
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
    resuming.resume(made)
    loop.fit(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
