"""How far a run has come, and how long its training still takes, from its files alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sevenfold.base import storage
from sevenfold.base.errors import SevenfoldError
from sevenfold.base.records import GATED_STAGES, Run
from sevenfold.train.config import TrainConfig
from sevenfold.workflow import row_counts
from sevenfold.workflow.recipe import Recipe, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageProgress:
    """One stage: how many steps it has done, of how many (None: not known yet), and its metrics.

    ``gate`` is what the gate said: promoted, refused, or None while it has said nothing.
    """

    stage: str
    rows: Sequence[Mapping[str, Any]]
    num_steps: int | None
    tokens_per_step: int | None
    is_done: bool
    gate: str | None

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def tokens_per_s(self) -> float | None:
        """The rate so far, with the checkpoints and measurements that steps wait for."""
        for row in reversed(self.rows):
            tokens, elapsed_s = row.get("tokens"), row.get("elapsed_s")
            if isinstance(tokens, int) and isinstance(elapsed_s, float) and elapsed_s > 0:
                return tokens / elapsed_s
        return None


def train_config(recipe: Recipe, stage: str) -> TrainConfig:
    """Return the training section of a stage."""
    if stage == "pretrain":
        return recipe.pretrain
    config: TrainConfig = getattr(recipe, stage).train
    return config


def num_steps(run: Run, recipe: Recipe, stage: str) -> int | None:
    """Return the steps of a stage, None while they depend on data that is not there yet."""
    config = train_config(recipe, stage)
    if config.duration.epochs is None:
        return config.num_steps(1, 1)
    if stage != "pretrain":
        counted = row_counts.count_rows(run, recipe, stage)
        return None if counted is None else config.num_steps(counted.rows, config.longest_context)
    folder = run.data("packed")
    if not (folder / storage.MANIFEST).is_file():
        return None
    facts = storage.read_manifest(folder)  # padding takes its time, too
    return config.num_steps(facts["counts"]["train"]["rows"], facts["row_length"])


def progress(run: Run) -> list[StageProgress]:
    """Return every stage that is trained, in order; what cannot be read yet is left open."""
    recipe: Recipe | None
    try:
        recipe = resolve(run_folder=run.folder)[1]
    except SevenfoldError:  # of another version: what it logged is shown all the same
        recipe = None
    return [_stage(run, recipe, stage) for stage in GATED_STAGES]


def _stage(run: Run, recipe: Recipe | None, stage: str) -> StageProgress:
    folder = run.stage(stage)
    rows = storage.JsonLines(folder / "metrics.jsonl").read() if folder.is_dir() else []
    steps = tokens = None
    if recipe is not None:
        config = train_config(recipe, stage)
        tokens = config.tokens_per_batch
        try:
            steps = num_steps(run, recipe, stage)
        except SevenfoldError:  # it will be told by the stage itself
            steps = None
    verdict = folder / "verdict.json"
    promoted = storage.read_json(verdict).get("promoted") is True if verdict.is_file() else None
    return StageProgress(
        stage=stage,
        rows=[row for row in rows if row.get("loss") is not None],
        num_steps=steps,
        tokens_per_step=tokens,
        is_done=(folder / "record.json").is_file(),
        gate={True: "promoted", False: "refused", None: None}[promoted],
    )


def seconds_left(stages: Sequence[StageProgress]) -> float | None:
    """Return about how long the training of ``stages`` still takes; None while a length is unknown.

    Each at its own rate, one that has not begun at the rate of the last that has. Preparing and
    measuring are not in it.
    """
    known = [stage.tokens_per_s for stage in stages if stage.tokens_per_s is not None]
    left_s = 0.0
    for stage in stages:
        rate = stage.tokens_per_s or (known[-1] if known else None)
        if stage.is_done:
            continue
        if rate is None or stage.num_steps is None or stage.tokens_per_step is None:
            return None
        left_s += max(0, stage.num_steps - stage.step) * stage.tokens_per_step / rate
    return left_s


def steps_after(stages: Sequence[StageProgress], stage: str, tokens_per_step: int) -> float | None:
    """Return how long the stages after ``stage`` train, in steps of it; None while not known."""
    at = [each.stage for each in stages].index(stage)
    steps = 0.0
    for each in stages[at + 1 :]:
        if each.is_done:
            continue
        if each.num_steps is None or each.tokens_per_step is None:
            return None
        steps += (each.num_steps - each.step) * each.tokens_per_step / tokens_per_step
    return steps
