"""One worst-case step of a stage on random tokens: does it fit, before anything starts?"""

from __future__ import annotations

from sevenfold.train.config import TrainConfig
from sevenfold.workflow import trial
from sevenfold.workflow.recipe import Recipe


def rehearse(recipe: Recipe, stage: str, config: TrainConfig) -> list[dict[str, float]]:
    """Train a few steps of the stage at every context length, on random weights and tokens.

    ``config`` is the stage's, with what the hardware decides decided. The optimizer's state exists
    from the second step on, so the peak of the last step is the run's.

    Returns:
        a row per context length: seq_len, peak_gib, step_s and tok_s of the last step.
    Errors:
        MemoryExhaustedError: it does not fit at the configured micro-batch.
    """
    tried = trial.prepare(recipe, stage, config)
    rows = []
    for length in sorted({phase.length for phase in config.contexts}):
        found = trial.measure(tried, length, num_steps=1)
        rate = config.tokens_per_batch / found.step_s / tried.processes.world
        rows.append(
            {
                "seq_len": length,
                "peak_gib": found.peak_gib,
                "step_s": found.step_s,
                "tok_s": rate,
            }
        )
    return rows
