"""Before anything starts: what each stage will need, and a worst-case step on a GPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import console
from sevenfold.base.hardware import GPUInfo, detect_gpu_type, gpu_of_kind
from sevenfold.base.records import GATED_STAGES, Run
from sevenfold.data.batches import require_even_shares
from sevenfold.model.config import ModelConfig, describe_folder
from sevenfold.train import launch, layout, planner
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Demand
from sevenfold.workflow import choosing, row_counts
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.remaining import num_steps, train_config
from sevenfold.workflow.thresholds import missing_items
from sevenfold.workflow.training import decide

UNKNOWN_LENGTH = ("tokens", "compute", "time", "cost")
MOST_PER_NODE = 8
Gpus = tuple[str | None, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The plan of one stage; ``has_length`` is False while data that decides it is missing.

    ``config`` are its settings, with what was ``auto`` in ``asked`` chosen; ``where`` says for
    which machine.
    """

    stage: str
    plan: planner.Plan
    asked: TrainConfig
    config: TrainConfig
    where: str
    has_length: bool


def plan_stage(
    run: Run,
    recipe: Recipe,
    stage: str,
    rate: planner.Rate | None = None,
    model: ModelConfig | None = None,
    gpus: Gpus | None = None,
) -> StagePlan:
    """Plan one stage on ``gpus``, or on this machine, or on one GPU of the usual kind.

    ``model`` is the one that is trained, where it is not the recipe's.

    Errors:
        UsageError: there is no such kind, or so many cannot share a batch evenly.
    """
    model = model or recipe.model
    gpu = _planned_for(model, gpus)
    demand = _laid_out(run, recipe, stage, model, gpu, keep=gpus is None)
    on_gpu = gpu["num_gpus"] > 0
    counted = None if stage == "pretrain" else row_counts.count_rows(run, recipe, stage)
    # The stage chooses before it looks at its rows, so what carries loss is no part of the choice.
    scored_share = counted.scored_share if counted and on_gpu else 1.0
    if rate is None and on_gpu:
        peak = gpu["peak_bf16_tflops"] * 1e12 or planner.ASSUMED_PEAK_FLOPS
        rate = planner.Rate(assumed_mfu=planner.assumed_mfu(demand), peak_flops=peak)
    steps = num_steps(run, recipe, stage)
    plan = planner.plan(
        dataclasses.replace(demand, scored_share=scored_share),
        num_steps=steps or 1,
        rate=rate,
        price_per_gpu_hour=recipe.gpu_hour_price,
    )
    held = layout.in_words(demand)
    return StagePlan(
        stage=stage,
        plan=plan,
        asked=train_config(recipe, stage),
        config=demand.train,
        where=f"{demand.precision}, {_machine(gpu)}{held and f'; weights: {held}'}",
        has_length=steps is not None,
    )


def _laid_out(
    run: Run, recipe: Recipe, stage: str, model: ModelConfig, gpu: GPUInfo, *, keep: bool
) -> Demand:
    """Return what a stage will ask of each GPU, with what is open chosen as the stage would.

    ``keep`` what it has chosen already, which is for the GPUs that it trained on.
    """
    config = train_config(recipe, stage)
    num_gpus = max(1, gpu["num_gpus"])
    per_node = _per_node(num_gpus)
    section = stage if stage == "pretrain" else f"{stage}.train"
    require_even_shares(
        config.tokens_per_batch,
        config.longest_context,
        num_gpus,
        setting=f"{section}.tokens_per_batch",
    )
    recipe, _ = choosing.settle_kernels(run.stage(stage), recipe, gpu, keep=keep)
    demand = choosing.demand_of(
        recipe,
        stage,
        config,
        precision=layout.precision_on(
            config, gpu, num_gpus=num_gpus, per_node=per_node, compares=stage == "dpo"
        ),
        world_size=num_gpus,
        per_node=per_node,
        on_gpu=gpu["num_gpus"] > 0,
        model=model,
    )
    demand = choosing.with_fp8_that_fits(demand, gpu)
    settled, _ = choosing.settle(run.stage(stage), demand, gpu, keep=keep)
    demand = dataclasses.replace(demand, train=settled)
    return layout.lay_out(demand, memory_gib=gpu["memory_gib"])


def _planned_for(model: ModelConfig, gpus: Gpus | None) -> GPUInfo:
    here = detect_gpu_type()
    if gpus is None:
        return choosing.planned_for(model, here)
    kind, num_gpus = gpus
    found = here if here["num_gpus"] else choosing.USUAL_GPU
    if kind is not None and kind.upper() != here["gpu_type"]:
        found = gpu_of_kind(kind)
    return GPUInfo(**{**found, "num_gpus": num_gpus})


def _per_node(num_gpus: int) -> int:
    """Return how many GPUs a node has: all of up to eight, of more as many as nodes can share."""
    most = max(MOST_PER_NODE, detect_gpu_type()["num_gpus"])
    return num_gpus if num_gpus <= most else math.gcd(num_gpus, most)


def _machine(gpu: GPUInfo) -> str:
    if not gpu["num_gpus"]:
        return "this machine's CPU"
    per_node = _per_node(gpu["num_gpus"])
    nodes = f" in nodes of {per_node}" if per_node < gpu["num_gpus"] else ""
    return f"{gpu['num_gpus']} x {gpu['name']}{nodes}"


def print_plan(planned: StagePlan) -> None:
    """Print one stage's plan as a table."""
    rows = describe(planned.plan)
    rows.insert(1, ("planned for", planned.where))
    rows.insert(4, ("rows at once", _at_once(planned)))
    if not planned.has_length:
        rows = [row for row in rows if row[0] not in UNKNOWN_LENGTH]
        rows.insert(2, ("tokens", "known once the data has been prepared"))
    console.print_table(f"plan of {planned.stage}", ["what", "needs"], rows)


def _at_once(planned: StagePlan) -> str:
    asked, config = planned.asked, planned.config
    again: dict[Any, str] = {False: "nothing", "cheap": "norms and products", True: "whole layers"}
    rows, recomputed = (
        " (chosen)" if each == "auto" else "" for each in (asked.micro_batch, asked.recompute)
    )
    return (
        f"{config.micro_batch}{rows} of {config.longest_context} tokens; recomputed: "
        f"{again[config.recompute]}{recomputed}"
    )


def describe(plan: planner.Plan) -> list[tuple[str, str]]:
    """Return the plan as rows of a table: what, and how much."""
    worst = max(plan.memory, key=lambda part: part.peak_gib)
    each = f" on each of {plan.world_size} GPUs" if plan.world_size > 1 else ""
    rows = [
        ("parameters", f"{plan.num_parameters / 1e6:,.2f} M"),
        ("tokens", f"{plan.tokens:,} in {plan.num_steps:,} steps"),
        ("micro-batches a step", f"{plan.micro_batches_per_step}{each}"),
        ("compute", f"{plan.flops:.3g} FLOP"),
        ("memory: weights", f"{worst.weights_gib:.2f} GiB"),
        ("memory: gradients", f"{worst.gradients_gib:.2f} GiB"),
        ("memory: optimizer", f"{worst.optimizer_gib:.2f} GiB"),
        ("memory: gathered or cast weights", f"{worst.gathered_gib:.2f} GiB"),
    ]
    for part in plan.memory:
        rows.append((f"memory: activations at {part.seq_len}", f"{part.activations_gib:.2f} GiB"))
        rows.append((f"memory: loss at {part.seq_len}", f"{part.loss_gib:.2f} GiB"))
        rows.append((f"memory: peak at {part.seq_len}", f"{part.peak_gib:.2f} GiB"))
    if plan.tokens_per_s_per_gpu is not None:
        rate = f"{plan.tokens_per_s_per_gpu:,.0f} tokens/s per GPU ({plan.rate_source})"
        rows.append(("rate", rate))
    if plan.elapsed_s is not None:
        rows.append(("time", f"{plan.elapsed_s / 3600:,.1f} h, {plan.gpu_hours:,.1f} GPU-hours"))
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    return rows


def plan_all(run: Run, recipe: Recipe, gpus: Gpus | None = None) -> None:
    """Print the plan of every training stage, on this machine or on ``gpus``."""
    model = _model_from_outside(run)
    planned = [plan_stage(run, recipe, stage, model=model, gpus=gpus) for stage in GATED_STAGES]
    for each in planned:
        print_plan(each)


def _model_from_outside(run: Run, start_from: Path | None = None) -> ModelConfig | None:
    """Return the sizes of the model in ``start_from``, or of the one that a run has taken in.

    None where it trains its own.
    """
    if start_from is not None:
        return describe_folder(start_from)
    for stage in reversed(GATED_STAGES):
        if (run.stage(stage) / "record.json").is_file() and run.record(stage).get("external"):
            return describe_folder(run.model(stage))
    return None


def require_room(run: Run, recipe: Recipe, stage: str, start_from: Path | None = None) -> None:
    """Refuse a stage that this machine cannot carry out, from its own model or from another.

    Errors:
        UsageError: no GPU where one is needed, one that cannot compute in the precision asked for,
            no package for four bits, or too little memory; with the numbers.
    """
    _require_computable(recipe, stage)
    model = _model_from_outside(run, start_from)
    planner.require_room(plan_stage(run, recipe, stage, model=model).plan, detect_gpu_type())


def _require_computable(recipe: Recipe, stage: str) -> None:
    """Refuse a precision, or four bits, that cannot be had here."""
    decide(train_config(recipe, stage), stage=stage)
    if stage == "lora" and recipe.lora.base == "nf4":
        from sevenfold.workflow.workbench import require_four_bits

        require_four_bits(launch.num_processes_to_start())


def dry_run(
    run: Run, recipe: Recipe, stages: Sequence[str], start_from: Path | None = None
) -> None:
    """Print the plans; on a GPU, rehearse the stage that needs most with random tokens.

    A model from outside is planned by its own sizes, and not rehearsed.

    Errors:
        UsageError: the machine cannot carry out one of the stages.
        MemoryExhaustedError: the rehearsed step did not fit.
    """
    model = _model_from_outside(run, start_from)
    planned = [plan_stage(run, recipe, stage, model=model) for stage in stages]
    for each in planned:
        print_plan(each)
    if missing := missing_items(recipe, stages):
        console.print_line(
            f"not there yet, and needed before anything trains: {', '.join(missing)} "
            "(docs/DATA_FORMATS.md, section 7, says where public items come from)"
        )
    gpu = detect_gpu_type()
    for each in planned:
        _require_computable(recipe, each.stage)
        planner.require_room(each.plan, gpu)
    if planned and gpu["num_gpus"] and model is None:
        worst = max(planned, key=lambda each: each.plan.peak_gib)
        _rehearse(recipe, worst)
    console.print_line("dry run: this machine can do everything asked for; nothing was written")


def _rehearse(recipe: Recipe, planned: StagePlan) -> None:
    from sevenfold.workflow.rehearsal import rehearse

    stage, plan = planned.stage, planned.plan
    config = decide(planned.config, stage=stage)
    predicted = {part.seq_len: part.peak_gib for part in plan.memory}
    measured = {int(row["seq_len"]): row for row in rehearse(recipe, stage, config)}
    rows = [
        [length, predicted.get(length), row["peak_gib"], f"{row['tok_s']:,.0f}"]
        for length, row in measured.items()
    ]
    columns = ["context", "planned GiB", "measured GiB", "tokens/s per GPU"]
    console.print_table(f"a few steps of {stage} on random tokens", columns, rows)
    if planned.has_length and plan.elapsed_s is not None:
        ends = [0.0, *(phase.until for phase in config.contexts)]
        seconds_per_token = sum(
            (phase.until - begin) / measured[phase.length]["tok_s"]
            for begin, phase in zip(ends, config.contexts, strict=False)
        )
        hours = plan.tokens * seconds_per_token / plan.world_size / 3600
        console.print_line(
            f"at the measured rate {stage} takes {hours:,.1f} h (planned: "
            f"{plan.elapsed_s / 3600:,.1f} h)"
        )
