"""From a stage's job to a bench that trains: model, kernels, precision, batches, progress."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch._functorch import config as functorch

from sevenfold.base import records, storage
from sevenfold.base.console import TrainingProgress, print_line
from sevenfold.base.errors import UsageError
from sevenfold.base.gpu_clock import ClockWatch
from sevenfold.base.hardware import (
    OOMHandler,
    detect_gpu_type,
    reset_peak_memory,
    setup_torch_backends,
)
from sevenfold.data.batches import Batch, Batches, RowSource
from sevenfold.model import (
    accumulating,
    attention,
    float8,
    four_bits,
    kernels,
    llama,
    rounded_weights,
)
from sevenfold.model.config import KernelConfig, from_hf
from sevenfold.objective.agreement import require_agreement
from sevenfold.objective.next_token import Objective, Scorer
from sevenfold.train import checkpoint, loop, optimizer, parallel, resuming
from sevenfold.train.config import TrainConfig
from sevenfold.train.recovery import Decisions, StepGuard
from sevenfold.workflow import choosing, remaining, tracking, training, watching
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.training import Job

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The share that torch.compile may keep of the activations it would keep at the highest speed. Where
# computing all again but products and attention needs less (0.70 at the 7B's shape), it does that.
CHEAP = 0.9
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}


def set_backends(config: TrainConfig, wanted: KernelConfig) -> str:
    """Choose kernels and attention before a model is built; return the loss kernel's name."""
    gpu = detect_gpu_type()
    setup_torch_backends(deterministic=config.deterministic)
    attention.prefer_fast_kernels(gpu["compute_capability"], deterministic=config.deterministic)
    active = kernels.setup_kernel_optimizations(liger=wanted.liger, cce=wanted.cce)
    attention.register_attention()
    if active["cce"]:
        return "cce"
    return "chunked" if gpu["num_gpus"] and config.compile != "none" else "plain"


def load_scorer(job: Job) -> Scorer:
    """Load the model to train, ready for the precision that the stage asks for.

    Where a checkpoint is going to fill all weights in, those to start from are not read. Peak
    memory counts from here on, so that a stage's is its own.

    Errors:
        UsageError: the model is from outside and computes something that training would not, or
            a kernel has no effect on it.
    """
    config = job.config
    reset_peak_memory()
    kernel = set_backends(config, job.recipe.kernels)
    torch.manual_seed(job.recipe.seed)
    is_small = job.stage == "lora" and job.recipe.lora.base == "nf4"
    folder, dtype, attend = job.source.folder, DTYPES[config.weights], attention.IMPLEMENTATION
    if _all_comes_from_a_checkpoint(job):
        device = job.processes.device
        model = llama.build_unfilled(folder, dtype, device, attn_implementation=attend)
    elif job.processes.is_main:
        # One of several keeps it in main memory, from where all get their shares.
        shared_out = is_small or job.processes.world > 1
        place = "cpu" if shared_out else job.processes.device
        model = llama.load_model(folder, dtype, place, attn_implementation=attend)
    else:
        model = llama.build_empty(folder, dtype, attn_implementation=attend)
    require_effect(job.recipe.kernels, model.config.model_type)
    if job.source.external and job.processes.is_main:
        require_agreement(Scorer(model, kernel="plain"))
    if is_small:
        freeze(model, config, job.processes)
    if job.processes.is_main and config.precision in ("fp8", "fp8_torchao") and job.stage != "lora":
        names = [f"{name}.weight" for name in sorted(float8.float8_names(model))]
        rounded_weights.spread(map(model.get_parameter, names), job.recipe.seed)
    return make_scorer(model, config, kernel)


def _all_comes_from_a_checkpoint(job: Job) -> bool:
    """Whether the weights to start from are neither trained on nor asked for anything.

    DPO's reference is the model that it starts from, LoRA's base as well; several processes get
    their shares of what the first has loaded.
    """
    if job.stage not in ("pretrain", "sft") or job.source.external or job.processes.world > 1:
        return False
    if not training.goes_on(job.folder, job.options):
        return False
    return str(storage.read_json(job.source.folder / "config.json").get("model_type")) == "llama"


def require_effect(wanted: KernelConfig, model_type: str) -> None:
    """Refuse a kernel that is put into another family's classes than the model's.

    Errors:
        UsageError: with the setting to change.
    """
    if wanted.liger and model_type != "llama":
        raise UsageError(
            "kernels.liger patches Llama's classes and has no effect on model type "
            f"'{model_type}'; set kernels.liger=false"
        )


def require_four_bits(num_processes: int) -> None:
    """Do nothing if a base can be kept in four bits here.

    Errors:
        UsageError: there are several processes, or bitsandbytes is missing.
    """
    if num_processes > 1:
        raise UsageError(
            f"lora.base nf4 trains on one GPU, and {num_processes} processes are here; set "
            "lora.base=full, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    four_bits.require_four_bits()


def freeze(model: Any, config: TrainConfig, processes: parallel.Processes) -> float:
    """Put a base into four bits on this process's device; return how far its weights are off.

    Errors:
        UsageError: as :func:`require_four_bits`.
    """
    require_four_bits(processes.world)
    compute = torch.float32 if config.precision == "fp32" else torch.bfloat16
    return four_bits.freeze_in_four_bits(model, processes.device, compute)


def make_scorer(model: Any, config: TrainConfig, kernel: str) -> Scorer:
    """Put FP8 and recomputation into ``model`` as ``config`` says, and make it score."""
    if config.precision == "fp8":
        float8.convert_to_float8(model)
    if config.precision == "fp8_torchao":
        float8.convert_with_torchao(model, sharded=parallel.join().world > 1)
    if config.recompute is True:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Scorer(model, kernel=kernel)


def place(
    scorer: Scorer,
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    processes: parallel.Processes,
) -> None:
    """Compile layer by layer and lay out over the processes, once adapters are in place.

    What earlier stages in this process compiled is forgotten first: PyTorch keeps eight variants
    of a function (lengths, rows, with and without gradients) and runs any further one uncompiled.
    """
    held = None
    if processes.world > 1:
        model = from_hf(scorer.causal_model.config)
        held = choosing.laid_out(recipe, stage, config, model, processes)
        if held.replicated:
            parallel.replicate(scorer, processes)
    alone = held is None or held.replicated
    if alone and processes.device.type == "cuda" and _is_all_bf16(scorer, config):
        accumulating.accumulate_in_products(scorer.model)
    layers = list(scorer.causal_model.get_decoder().layers)
    if config.compile != "none":
        torch.compiler.reset()
        set_what_is_kept(config, adapted=_is_adapted(scorer))
        for layer in layers:
            layer.compile(mode=COMPILE_MODES[config.compile], dynamic=False)
    if held is not None and not held.replicated:
        parallel.shard(
            scorer,
            layers,
            processes,
            bf16=config.precision != "fp32",
            num_copies=held.copies,
            keep_whole=held.stays_gathered,
        )


def set_what_is_kept(config: TrainConfig, *, adapted: bool) -> None:
    """Have torch.compile keep for the backward pass what ``config`` has memory for."""
    functorch.activation_memory_budget = CHEAP if config.recompute == "cheap" else 1.0
    # Where whole weights train, an FP8 product's input is cast again: kept as well, transposed,
    # four rows of 2,048 of the 7B would take 5 GiB more, which 80 GB do not have. An adapter's
    # input, in bf16, is kept, for which there is room beside frozen weights.
    functorch.ban_recompute_materialized_backward = adapted or config.precision != "fp8"


def _is_adapted(scorer: Scorer) -> bool:
    return scorer.model is not scorer.causal_model


def _is_all_bf16(scorer: Scorer, config: TrainConfig) -> bool:
    """Whether whole weights train in the precision that everything is computed in."""
    return not _is_adapted(scorer) and config.weights == config.precision == "bf16"


def validation_batches(job: Job, rows: RowSource) -> list[Batch]:
    """Return the held-out batches of this process, at the longest context."""
    config, world = job.config, job.processes.world
    per_batch = config.tokens_per_batch // rows.row_length
    count = min(rows.num_rows, config.validation_batches * per_batch) // world * world
    if count == 0:
        raise UsageError(
            f"{job.stage}: {rows.num_rows} held-out rows for {world} processes; raise the "
            "validation fraction"
        )
    whole = rows.batch(np.arange(count), rows.row_length)
    return [whole.rows(job.processes.rank, whole.num_rows, world)]


def assemble(
    job: Job, scorer: Scorer, objective: Objective, rows: RowSource, held_out: RowSource
) -> loop.Workbench:
    """Put everything on one bench, and go back to the latest checkpoint where there is one."""
    config, processes = job.config, job.processes
    num_steps = config.num_steps(rows.num_rows, rows.row_length)
    decisions = Decisions.open(job.folder / "recovery.json")
    bench = loop.Workbench(
        stage=job.stage,
        scorer=scorer,
        objective=objective,
        batches=Batches(
            rows,
            tokens_per_batch=config.tokens_per_batch,
            contexts=config.contexts,
            num_steps=num_steps,
            seed=job.recipe.seed,
            rank=processes.rank,
            world=processes.world,
            place=decisions.place,
        ),
        validation=validation_batches(job, held_out),
        optimizer=optimizer.make_optimizer(scorer, config.optimizer),
        config=config,
        processes=processes,
        checkpoints=checkpoint.Checkpoints(
            job.folder / training.CHECKPOINTS,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
        ),
        metrics=storage.JsonLines(job.folder / "metrics.jsonl"),
        memory=OOMHandler(config.rows_at_once, enabled=job.options.oom_recovery),
        progress=Unseen(),
        identity={"inputs": job.inputs, "config": {**job.settings, "num_steps": num_steps}},
        flops_per_token=from_hf(scorer.causal_model.config).flops_per_token,
        peak_flops=detect_gpu_type()["peak_bf16_tflops"] * 1e12,
        guard=StepGuard(sigma=config.spike_sigma, max_in_a_row=config.max_skipped_steps),
        decisions=decisions,
        program={
            "code": records.code_version(),
            "precision": config.precision,
            **records.package_versions(),
        },
    )
    if resuming.resume(bench, force=job.options.force) and processes.is_main:
        print_line(f"{job.stage}: resuming from step {bench.step} of {num_steps}")
    if processes.is_main and bench.step < num_steps:
        trained = sum(p.numel() * p.element_size() for p in bench.trained.values())
        moments = optimizer.state_bytes(scorer, config.optimizer)
        every = config.checkpoint_every
        num_to_come = math.ceil(num_steps / every) - bench.step // every  # the last step's, too
        bench.checkpoints.require_room(trained + moments, num_to_come)
    return bench


def digest(bench: loop.Workbench) -> str:
    """Return a SHA-256 of what a run ends with: weights, optimizer, random states."""
    moments = parallel.gather_optimizer(bench.scorer, bench.optimizer, bench.processes)
    return checkpoint.digest(resuming.trained_state(bench), moments, checkpoint.random_state())


class Unseen:
    """Progress that nobody watches."""

    def update(self, row: dict[str, Any]) -> None:
        """Show nothing."""


class _Shown:
    """The progress bar, and wandb where the run tracks with it."""

    def __init__(self, bar: TrainingProgress, tracker: tracking.Tracker):
        self._bar = bar
        self._tracker = tracker

    def update(self, row: dict[str, Any]) -> None:
        """Show one row of metrics."""
        self._bar.update(row)
        self._tracker.log(row)


def train(job: Job, bench: loop.Workbench) -> dict[str, Any]:
    """Train to the end and return the last row of metrics."""
    if bench.step >= bench.num_steps:
        return bench.last
    stages = remaining.progress(job.run)
    bar = TrainingProgress(
        job.stage,
        num_steps=bench.num_steps,
        start_step=bench.step,
        enabled=job.processes.is_main,
        stages=watching.stage_strip(stages, job.stage),
        later_steps=remaining.steps_after(stages, job.stage, bench.config.tokens_per_batch),
    )
    with bar, tracking.tracked(job) as tracker, ClockWatch():
        bench.progress = _Shown(bar, tracker)
        return loop.fit(bench)
