"""Before anything starts: what each stage will need, and a worst-case step on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import console
from sevenfold.base.hardware import GPUInfo, detect_gpu_type
from sevenfold.base.records import GATED_STAGES, Run
from sevenfold.model.config import ModelConfig, describe_folder
from sevenfold.train import launch, planner
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Precision
from sevenfold.workflow import choosing, row_counts
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.remaining import num_steps, train_config
from sevenfold.workflow.training import decide

UNKNOWN_LENGTH = ("tokens", "compute", "time", "cost")


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
) -> StagePlan:
    """Plan one stage on this machine, or on one GPU of the usual kind where there is none.

    ``model`` is the one that is trained, where it is not the recipe's.
    """
    model = model or recipe.model
    gpu = detect_gpu_type()
    config = train_config(recipe, stage)
    on_gpu = choosing.is_for_gpu(model, gpu)
    recipe, _ = choosing.settle_kernels(run.stage(stage), recipe, gpu)
    counted = None if stage == "pretrain" else row_counts.count_rows(run, recipe, stage)
    demand = choosing.demand_of(
        recipe,
        stage,
        config,
        precision=_precision(config, gpu),
        world_size=max(1, gpu["num_gpus"]),
        on_gpu=on_gpu,
        model=model,
    )
    settled, _ = choosing.settle(run.stage(stage), demand, gpu)
    # The stage chooses before it looks at its rows, so what carries loss is no part of the choice.
    scored_share = counted.scored_share if counted and on_gpu else 1.0
    if rate is None and on_gpu:
        peak = gpu["peak_bf16_tflops"] * 1e12 or planner.ASSUMED_PEAK_FLOPS
        rate = planner.Rate(assumed_mfu=planner.assumed_mfu(demand), peak_flops=peak)
    steps = num_steps(run, recipe, stage)
    plan = planner.plan(
        dataclasses.replace(demand, train=settled, scored_share=scored_share),
        num_steps=steps or 1,
        rate=rate,
        price_per_gpu_hour=recipe.gpu_hour_price,
    )
    return StagePlan(
        stage=stage,
        plan=plan,
        asked=config,
        config=settled,
        where=f"{demand.precision}, {_machine(gpu, on_gpu)}",
        has_length=steps is not None,
    )


def _precision(config: TrainConfig, gpu: GPUInfo) -> Precision:
    precision = config.precision
    if precision == "auto":
        # Without a GPU the plan is about the GPU that the recipe is meant for.
        precision = "fp8" if gpu["supports_fp8"] else "bf16"
    return "fp8_torchao" if precision == "fp8" and gpu["num_gpus"] > 1 else precision


def _machine(gpu: GPUInfo, on_gpu: bool) -> str:
    if gpu["num_gpus"]:
        return f"{gpu['num_gpus']} x {gpu['name']}"
    return "one GPU of 80 GB (here is none)" if on_gpu else "this machine's CPU"


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


def plan_all(run: Run, recipe: Recipe) -> None:
    """Print the plan of every training stage."""
    model = _model_from_outside(run)
    for stage in GATED_STAGES:
        print_plan(plan_stage(run, recipe, stage, model=model))


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
    decide(train_config(recipe, stage))
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
    gpu = detect_gpu_type()
    for each in planned:
        _require_computable(recipe, each.stage)
        planner.require_room(each.plan, gpu)
    if planned and gpu["num_gpus"] and model is None:
        worst = max(planned, key=lambda each: each.plan.peak_gib)
        _rehearse(recipe, worst)
    console.print_line("dry run: everything asked for can be done here; nothing was written")


def _rehearse(recipe: Recipe, planned: StagePlan) -> None:
    from sevenfold.workflow.rehearsal import rehearse

    stage = planned.stage
    config = dataclasses.replace(
        decide(planned.asked),
        micro_batch=planned.config.micro_batch,
        recompute=planned.config.recompute,
    )
    predicted = {part.seq_len: part.peak_gib for part in planned.plan.memory}
    rows = [
        [int(row["seq_len"]), predicted.get(int(row["seq_len"])), row["peak_gib"], row["tok_s"]]
        for row in rehearse(recipe, stage, config)
    ]
    columns = ["context", "predicted GiB", "measured GiB", "tokens/s per GPU"]
    console.print_table(f"a few steps of {stage} on random tokens", columns, rows)
