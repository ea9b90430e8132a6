"""Learning rates as a pure function of the step."""

from __future__ import annotations

import math

from sevenfold.train.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Learning rate of ``step``, counted from 0.

    The warm-up ends at the peak; the last step is the last of the descent, so that ``final_lr``
    would be reached one step after the end.
    """
    warmup_steps = round(config.warmup_fraction * num_steps)
    if step < warmup_steps:
        return config.peak_lr * (step + 1) / warmup_steps
    span = config.peak_lr - config.final_lr
    if config.kind == "cosine":
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return config.final_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = round(config.decay_fraction * num_steps)
    left = num_steps - step
    if left >= decay_steps:
        return config.peak_lr
    return config.final_lr + span * left / decay_steps
