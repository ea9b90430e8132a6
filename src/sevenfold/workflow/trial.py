"""A stage on random weights and random tokens: what is rehearsed before a run, and benchmarked.

Everything else is the stage's own: model, kernels, precision, sharding, objective, optimizer and
`loop.fit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sevenfold.base import records, storage
from sevenfold.base.config import to_plain
from sevenfold.base.errors import DivergedError, StoppedError
from sevenfold.base.gpu_clock import ClockWatch
from sevenfold.base.hardware import (
    OOMHandler,
    detect_gpu_type,
    peak_memory_gib,
    reset_peak_memory,
)
from sevenfold.data.batches import Batches
from sevenfold.data.packing import PackedConversations, PackedPreferences
from sevenfold.data.random_rows import RandomRows, random_conversations, random_preferences
from sevenfold.model import attention
from sevenfold.model import lora as adapters
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer
from sevenfold.train import checkpoint, loop, optimizer, parallel
from sevenfold.train.config import ContextPhase, TrainConfig
from sevenfold.train.recovery import Decisions, StepGuard
from sevenfold.train.watching import COMPUTE, OTHER, UPDATE, WAIT, Stopwatch, TimeIsUp, totals
from sevenfold.workflow import dpo, workbench
from sevenfold.workflow.recipe import Recipe

# The first step compiles, the second allocates with the optimizer's state in place.
WARM_UP = 2
DOCUMENTS_PER_ROW = 8
NEVER = 1 << 30
# At the GPU's clock; a step of the 7B lasts nine seconds.
LOOK_EVERY_S = 2.0
# Of packed rows: enough to be packed as a run's are and not to hang on a few drawn lengths
# (docs/performance.md, "DPO in rows of two contexts"); few enough to be made in a second or two.
FEWEST_ROWS, MOST_TOKENS = 2048, 1 << 22


Rows = RandomRows | PackedConversations | PackedPreferences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A stage's model with random weights, and its optimizer."""

    recipe: Recipe
    stage: str
    config: TrainConfig
    processes: parallel.Processes
    scorer: Scorer
    optimizer: torch.optim.Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the steps after the warm-up, in seconds, and the peak of memory since then.

    ``rows`` are what was trained on; ``sm_clock_mhz`` and ``slowed_by`` the GPU's clock meanwhile.
    """

    first_step_s: float
    step_s: float
    slowest_step_s: float
    phases_s: dict[str, float]
    peak_gib: float
    rows: Rows
    sm_clock_mhz: float | None
    slowed_by: list[str]

    @property
    def scored_share(self) -> float:
        """The share of the rows' positions that carry loss."""
        rows = self.rows
        if isinstance(rows, RandomRows):
            return 1.0
        if isinstance(rows, PackedPreferences):
            scored = sum(len(pair.chosen) + len(pair.rejected) for pair in rows.preferences)
        else:
            scored = sum(sum(piece.mask) for piece in rows.pieces)
        return scored / (rows.num_rows * rows.row_length)


class _NotKept(checkpoint.Checkpoints):
    """Checkpoints of a trial that is to leave nothing behind."""

    def reserve(self, parts: checkpoint.Parts) -> None:
        """Do nothing."""

    def save(self, snapshot: checkpoint.Snapshot) -> None:
        """Do nothing."""


class _NotWritten(storage.JsonLines):
    """Metrics of a trial, which are measured from outside."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def rewind(self, last_step: int) -> None:
        """Do nothing."""


def prepare(recipe: Recipe, stage: str, config: TrainConfig) -> Trial:
    """Build the stage's model with random weights, as ``config`` (decided) wants it trained."""
    processes = parallel.join()
    scorer = _random_scorer(recipe, stage, config, processes)
    return Trial(
        recipe=recipe,
        stage=stage,
        config=config,
        processes=processes,
        scorer=scorer,
        optimizer=optimizer.make_optimizer(scorer, config.optimizer),
    )


def _random_scorer(
    recipe: Recipe, stage: str, config: TrainConfig, processes: parallel.Processes
) -> Scorer:
    kernel = workbench.set_backends(config, recipe.kernels)
    torch.manual_seed(recipe.seed)
    model = random_model(
        recipe,
        workbench.DTYPES[config.weights],
        processes.device,
        attn_implementation=attention.IMPLEMENTATION,
    )
    if stage == "lora" and recipe.lora.base == "nf4":
        workbench.freeze(model, config, processes)
    scorer = workbench.make_scorer(model.train(), config, kernel)
    if stage == "lora":
        scorer.model = adapters.add_adapter(scorer.model, recipe.lora.adapter)
    if stage == "sft":
        scorer.neftune_noise_alpha = recipe.sft.neftune_noise_alpha
    workbench.place(scorer, recipe, stage, config, processes)
    return scorer


def random_model(
    recipe: Recipe, dtype: torch.dtype, device: torch.device, *, attn_implementation: str
) -> Any:
    """Build the recipe's model with random weights, on ``device`` from the start."""
    from transformers import LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM._from_config(
                recipe.model.to_hf(), attn_implementation=attn_implementation
            )
    finally:
        torch.set_default_dtype(before)


def random_rows(
    recipe: Recipe, stage: str, config: TrainConfig, *, length: int, num_steps: int
) -> Rows:
    """Return rows of the stage's kind: plain or packed text, conversations, or pairs of answers."""
    longest, vocab_size = config.longest_context, recipe.model.vocab_size
    if stage == "pretrain":
        documents = max(1, DOCUMENTS_PER_ROW * length // longest)
        return RandomRows(
            longest,
            vocab_size=vocab_size,
            documents_per_row=documents if config.mask_documents else None,
        )
    needed = max(FEWEST_ROWS * longest, config.tokens_per_batch * num_steps)
    num_tokens = min(MOST_TOKENS, needed)
    section: Any = getattr(recipe, stage)
    drawn: dict[str, Any] = {
        "vocab_size": vocab_size,
        "seed": recipe.seed,
        "packing": section.packing,
        "longest": min(section.data.max_length, recipe.model.max_seq_len, longest),
    }
    if stage == "dpo":
        share = recipe.dpo.share_prompts
        return random_preferences(num_tokens, longest, share_prompts=share, **drawn)
    return random_conversations(num_tokens, longest, **drawn)


def make_bench(
    trial: Trial,
    length: int,
    *,
    num_steps: int,
    rows: Rows | None = None,
    checkpoints: checkpoint.Checkpoints | None = None,
    checkpoint_every: int = NEVER,
) -> loop.Workbench:
    """Put the trial on a bench, at one context length; ``num_steps`` come before its last step.

    ``rows`` are drawn where there are none. Without ``checkpoints`` nothing is written; the metrics
    never are.
    """
    recipe, config, processes = trial.recipe, trial.config, trial.processes
    config = dataclasses.replace(
        config, validate_every=NEVER, log_every=NEVER, checkpoint_every=checkpoint_every
    )
    return loop.Workbench(
        stage=trial.stage,
        scorer=trial.scorer,
        objective=dpo.objective(recipe.dpo) if trial.stage == "dpo" else NEXT_TOKEN,
        batches=Batches(
            rows or random_rows(recipe, trial.stage, config, length=length, num_steps=num_steps),
            tokens_per_batch=config.tokens_per_batch,
            contexts=[ContextPhase(length=length, until=1.0)],
            num_steps=num_steps + 1,
            seed=recipe.seed,
            rank=processes.rank,
            world=processes.world,
        ),
        validation=[],
        optimizer=trial.optimizer,
        config=config,
        processes=processes,
        checkpoints=checkpoints or _NotKept(Path(os.devnull), keep=1),
        metrics=_NotWritten(Path(os.devnull)),
        memory=OOMHandler(config.rows_at_once, enabled=False),
        progress=workbench.Unseen(),
        identity={"inputs": {}, "config": to_plain(config)},
        flops_per_token=recipe.model.flops_per_token,
        peak_flops=detect_gpu_type()["peak_bf16_tflops"] * 1e12,
        guard=StepGuard(sigma=None, max_in_a_row=NEVER),
        decisions=Decisions(),
        program={"code": records.code_version()},
    )


def train(
    bench: loop.Workbench,
    num_steps: int,
    *,
    warm_up: int = 0,
    when_warm: Callable[[], None] = reset_peak_memory,
) -> list[dict[str, float]]:
    """Train ``num_steps`` by `loop.fit` and return the seconds of each phase of each step.

    After the first ``warm_up`` of them ``when_warm`` is called, for what is measured beside time.

    Errors:
        DivergedError: a step was skipped, so its time is not that of a step.
        StoppedError: a signal came; nothing is kept.
    """
    device = bench.processes.device
    watch = Stopwatch(num_steps, device=device, warm_up=warm_up, when_warm=when_warm)
    bench.clock = watch
    try:
        with contextlib.suppress(TimeIsUp):
            loop.fit(bench)
    except StoppedError:
        raise StoppedError("stopped by a signal; a trial keeps nothing, start it again") from None
    if bench.guard.num_skipped:
        raise DivergedError(
            f"{bench.guard.num_skipped} of {num_steps} steps on random tokens were skipped, since "
            "their numbers were not finite; choose another precision, or report it"
        )
    return watch.seconds()


def measure(trial: Trial, length: int, *, num_steps: int) -> Measured:
    """Train a few steps to warm up and ``num_steps`` more; return what they took.

    Errors:
        MemoryExhaustedError: it does not fit at the configured micro-batch.
        DivergedError, StoppedError: as in :func:`train`.
    """
    whole = WARM_UP + num_steps
    rows = random_rows(trial.recipe, trial.stage, trial.config, length=length, num_steps=whole)
    bench = make_bench(trial, length, num_steps=whole, rows=rows)
    with ClockWatch(LOOK_EVERY_S) as clock:

        def begin() -> None:
            reset_peak_memory()
            clock.forget()

        steps = train(bench, whole, warm_up=WARM_UP, when_warm=begin)
    warm = steps[WARM_UP:]
    return Measured(
        first_step_s=totals(steps)[0],
        step_s=statistics.median(totals(warm)),
        slowest_step_s=max(totals(warm)),
        phases_s={
            phase: statistics.median(step[phase] for step in warm)
            for phase in (WAIT, COMPUTE, UPDATE, OTHER)
        },
        peak_gib=peak_memory_gib(),
        rows=rows,
        sm_clock_mhz=clock.sm_clock_mhz,
        slowed_by=clock.slowed_by,
    )
