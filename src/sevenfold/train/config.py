"""Settings of a training stage; the same for pretraining, SFT, DPO and LoRA."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from sevenfold.base.config import configuration
from sevenfold.base.errors import UsageError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

# Settings that may differ between a checkpoint and the run that goes on from it: they change
# speed, memory or what is written, not the result (the micro-batch changes rounding only).
HARMLESS = frozenset(
    {"micro_batch", "compile", "recompute", "log_every", "checkpoint_every", "keep_checkpoints",
     "keep_best", "validate_every"}
)  # fmt: skip


@configuration
class Duration:
    """How long to train: exactly one of the three."""

    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        """Check that one of the three is given."""
        if [self.steps, self.epochs, self.tokens].count(None) != 2:
            raise ValueError("give exactly one of steps, epochs and tokens")


@configuration
class ContextPhase:
    """Train on rows of ``length`` tokens until this fraction of the steps is done."""

    length: Annotated[int, Field(ge=2)]
    until: Annotated[float, Field(gt=0, le=1)]


@configuration
class OptimizerConfig:
    """AdamW; ``adamw_8bit`` keeps its moments in 8 bits and rounds bf16 weights stochastically."""

    kind: Literal["adamw", "adamw_8bit"]
    betas: tuple[Fraction, Fraction]
    epsilon: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)]


@configuration
class ScheduleConfig:
    """Warm-up, then ``cosine`` to the end, or ``wsd``: flat, then linear over the last fraction."""

    kind: Literal["cosine", "wsd"]
    peak_lr: Annotated[float, Field(gt=0)]
    final_lr: Annotated[float, Field(ge=0)]
    warmup_fraction: Fraction
    decay_fraction: Fraction = 1.0

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if self.kind == "cosine" and self.decay_fraction != 1.0:
            raise ValueError("decay_fraction has no effect with kind: cosine; leave it out")
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction together exceed 1")


@configuration
class TrainConfig:
    """One training stage.

    ``tokens_per_batch`` counts a whole step over all processes, ``micro_batch`` rows of the longest
    context in one forward. A context is the length of a row; in all stages but pretraining a row
    may be longer than what the model reads, since no document in it is. ``precision`` is what
    matrix products compute in (``fp8_torchao``: FP8 by torchao's recipe, not ours), ``weights``
    what parameters are kept in. ``recompute`` computes activations again in the backward pass: all
    of a layer's, or those that are ``cheap``, norms and products of elements. ``auto`` chooses for
    either what is fastest of what the planner expects to fit the GPU, once; a run that goes on
    keeps it. ``mask_documents`` keeps packed documents from seeing each other (always so in SFT and
    DPO). ``keep_best`` keeps the checkpoint with the lowest held-out loss beside the newest. A step
    beyond ``spike_sigma`` standard deviations (None: never) or not finite is skipped; after more
    than ``max_skipped_steps`` in a row training goes back to the last checkpoint and passes over
    the data since, ``max_rollbacks`` times.
    """

    duration: Duration
    tokens_per_batch: Count
    contexts: tuple[ContextPhase, ...]
    micro_batch: Count | Literal["auto"]
    mask_documents: bool
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: Literal["auto", "fp32", "bf16", "fp8", "fp8_torchao"]
    weights: Literal["fp32", "bf16"]
    compile: Literal["auto", "none", "default", "max-autotune"]
    recompute: bool | Literal["cheap", "auto"]
    deterministic: bool
    validate_every: Count
    validation_batches: Count
    checkpoint_every: Count
    keep_checkpoints: Count
    keep_best: bool
    log_every: Count
    spike_sigma: Annotated[float, Field(gt=0)] | None
    max_skipped_steps: Annotated[int, Field(ge=0)]
    max_rollbacks: Annotated[int, Field(ge=0)]

    def __post_init__(self) -> None:
        """Check what can be checked without data."""
        if not self.contexts or self.contexts[-1].until != 1.0:
            raise ValueError("the last of contexts must have until: 1.0")
        if [p.until for p in self.contexts] != sorted({p.until for p in self.contexts}):
            raise ValueError("'until' must rise from context to context")
        longest = max(phase.length for phase in self.contexts)
        if self.tokens_per_batch % longest:
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch} is not a multiple of the longest "
                f"context {longest}"
            )
        if self.optimizer.kind == "adamw_8bit" and self.weights == "fp32":
            raise ValueError("optimizer kind adamw_8bit goes with weights: bf16")

    @property
    def rows_at_once(self) -> int:
        """``micro_batch``, once it is a number."""
        assert isinstance(self.micro_batch, int), "micro_batch: auto was not decided"
        return self.micro_batch

    @property
    def longest_context(self) -> int:
        """Tokens in the longest row."""
        return max(phase.length for phase in self.contexts)

    def num_steps(self, num_rows: int, row_length: int) -> int:
        """Optimizer steps that ``duration`` means on this many rows.

        Errors:
            UsageError: it means no step at all.
        """
        duration = self.duration
        if duration.steps is not None:
            return duration.steps
        epochs = duration.epochs or 0.0
        tokens = duration.tokens or epochs * num_rows * row_length
        steps = math.floor(tokens / self.tokens_per_batch)
        if steps < 1:
            raise UsageError(
                f"duration: {tokens:.0f} tokens are less than one batch of "
                f"{self.tokens_per_batch}; add data, epochs, or take a smaller tokens_per_batch"
            )
        return steps
