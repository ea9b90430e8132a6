"""What ``auto`` means for micro-batch, recomputation and kernels, on the GPU that there is.

Of everything the planner expects to fit, what takes the least time; of kernels, what was measured
to be fastest. It is chosen once: a stage keeps it beside its checkpoints, so that a run that goes
on goes on with the same.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from sevenfold.base import hardware, storage
from sevenfold.base.config import to_plain
from sevenfold.base.errors import BadDataError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model import float8, kernels
from sevenfold.model.config import KernelConfig, ModelConfig, describe_folder
from sevenfold.train import layout, parallel
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Adapter, Demand, Precision
from sevenfold.train.planner import ASSUMED_PEAK_FLOPS, assumed_mfu, machine_memory_gib
from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)

FILE = "chosen.json"
# Of a GPU's memory, what may be planned to be taken: plans are up to 3 % off, and a little more is
# lost between blocks of memory.
SHARE_OF_ONE_GPU = 0.95
# Where there is no GPU, a model larger than this is planned for one of 80 GB: an H100 in the
# precision that an A100 has, too.
LARGEST_ON_CPU = 1e8
USUAL_GPU = GPUInfo(
    **{
        **hardware.gpu_of_kind("H100"),
        "name": "GPU of 80 GB (here is none)",
        "supports_fp8": False,
    }
)
# Bytes a second that an H100 moves in a large copy (measured).
BANDWIDTH = 3.0e12
# What recomputing adds to the time of a token. True: measured. Cheap: counted from the bytes that
# norms and SwiGLU read and write a second time, 120 kB a token and layer of the 7B; not measured.
EXTRA_TIME: dict[bool | str, float] = {False: 0.0, "cheap": 0.02, True: 0.21}


def demand_of(
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    *,
    precision: Precision,
    world_size: int,
    on_gpu: bool,
    per_node: int | None = None,
    model: ModelConfig | None = None,
) -> Demand:
    """Return what a stage of ``recipe`` asks of each of ``world_size`` GPUs."""
    model = model or recipe.model
    lora = recipe.lora if stage == "lora" else None
    compiled = config.compile != "none"
    kernel: Any = "chunked" if on_gpu and compiled else "plain"
    cce = kernels.decide(recipe.kernels, hardware.detect_gpu_type()).cce
    return Demand(
        model=model,
        train=config,
        precision=precision,
        world_size=world_size,
        loss_kernel="cce" if cce else kernel,
        compiled=compiled,
        adapter=None if lora is None else adapter_of(recipe, model),
        four_bits=lora is not None and lora.base == "nf4",
        per_node=per_node,
    )


def adapter_of(recipe: Recipe, model: ModelConfig) -> Adapter:
    """Return the recipe's adapter as the planner sees it."""
    shape = recipe.lora.adapter
    adapter = Adapter(num_parameters=shape.num_parameters(model), rank=shape.r)
    if shape.targets == "all-linear":
        return adapter
    return dataclasses.replace(adapter, targets=shape.targets)


def is_open(config: TrainConfig) -> bool:
    """True while something is to be chosen."""
    return "auto" in (config.micro_batch, config.recompute)


def choose(demand: Demand, gpu: GPUInfo) -> TrainConfig:
    """Return the stage's settings with the fastest micro-batch and recomputation that fit.

    Where nothing fits, those that need least, which are then refused with the numbers.
    """
    plans = _plans(demand, gpu)
    fitting = [config for peak, config in plans if peak <= _room_gib(demand, gpu)]
    if not fitting:
        return min(plans, key=lambda each: each[0])[1]
    return min(fitting, key=lambda each: seconds_per_token(demand, each, gpu))


def _plans(demand: Demand, gpu: GPUInfo) -> list[tuple[float, TrainConfig]]:
    """Return the planned peak of every way to fill in what is open, however GPUs hold the model."""
    memory_gib = _memory_gib(demand.model, gpu)
    asked = (dataclasses.replace(demand, train=config) for config in candidates(demand))
    return [(layout.lay_out(a, memory_gib=memory_gib).peak_gib, a.train) for a in asked]


def _room_gib(demand: Demand, gpu: GPUInfo) -> float:
    # Our FP8 is for whole weights, which on several GPUs leave as much room as others do.
    is_whole = demand.precision == "fp8" and demand.world_size > 1
    share = layout.PLANNED_SHARE if is_whole else SHARE_OF_ONE_GPU
    return _memory_gib(demand.model, gpu) * share


def with_fp8_that_fits(demand: Demand, gpu: GPUInfo) -> Demand:
    """Return ``demand`` with torchao's FP8 where GPUs are to keep whole weights, and cannot.

    Ours is not sharded.
    """
    if demand.precision != "fp8" or demand.world_size == 1:
        return demand
    if any(peak <= _room_gib(demand, gpu) for peak, _ in _plans(demand, gpu)):
        return demand
    train = dataclasses.replace(demand.train, precision="fp8_torchao")
    return dataclasses.replace(demand, train=train, precision="fp8_torchao")


def planned_for(model: ModelConfig, gpu: GPUInfo) -> GPUInfo:
    """Return the machine that a plan is about: a large model is not trained on a CPU."""
    if gpu["num_gpus"] or model.num_parameters <= LARGEST_ON_CPU:
        return gpu
    return USUAL_GPU


def _memory_gib(model: ModelConfig, gpu: GPUInfo) -> float:
    gpu = planned_for(model, gpu)
    return gpu["memory_gib"] if gpu["num_gpus"] else machine_memory_gib()


def candidates(demand: Demand) -> list[TrainConfig]:
    """Return every way to fill in what is open.

    Micro-batches divide a step, so that all have one size. ``cheap`` is torch.compile's.
    """
    train = demand.train
    rows = max(1, train.tokens_per_batch // train.longest_context // demand.world_size)
    sizes = [train.micro_batch]
    if train.micro_batch == "auto":
        sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    ways: list[Any] = [train.recompute]
    if train.recompute == "auto":
        ways = [False, "cheap", True] if demand.compiled else [False, True]
    return [
        dataclasses.replace(train, micro_batch=size, recompute=way)
        for way in ways
        for size in sizes
    ]


def seconds_per_token(demand: Demand, config: TrainConfig, gpu: GPUInfo) -> float:
    """Return about how long a token takes: its products, and its share of what a pass costs.

    Each pass reads all weights twice, forward and backward, and adds to all gradients.
    """
    model = demand.model
    flops = model.flops_per_token(config.longest_context)
    peak = gpu["peak_bf16_tflops"] * 1e12 or ASSUMED_PEAK_FLOPS
    products_s = flops / peak / assumed_mfu(demand) * (1 + EXTRA_TIME[config.recompute])
    gradients = model.num_parameters if demand.adapter is None else demand.adapter.num_parameters
    moved = 2 * demand.compute_bytes * (model.num_parameters + gradients)
    return products_s + moved / BANDWIDTH / (config.rows_at_once * config.longest_context)


def settle(
    folder: Path,
    demand: Demand,
    gpu: GPUInfo,
    *,
    keep: bool = True,
    chosen_kernels: KernelConfig | None = None,
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Choose what is open, or take what the stage in ``folder`` has chosen before.

    A finished stage keeps its choice on any machine, another one if it would be asked the same
    again; ``keep`` False (a stage that is to begin anew): none does. ``chosen_kernels`` are
    :func:`settle_kernels`'s where these were open.

    Returns:
        the settings, and what :func:`note` is to write, None where nothing was open.
    Errors:
        BadDataError: what was chosen before cannot be read.
    """
    config = demand.train
    more = {} if chosen_kernels is None else {"kernels": to_plain(chosen_kernels)}
    if not is_open(config) and not more:
        return config, None
    asked = {"settings": _decisive(demand), "machine": _machine(demand, gpu)}
    before = _chosen_before(folder / FILE, keep=keep)
    if before is not None and (before["asked"] == asked or (folder / "record.json").is_file()):
        left_open = [n for n in ("micro_batch", "recompute") if getattr(config, n) == "auto"]
        kept = {name: before[name] for name in left_open}
        return dataclasses.replace(config, **kept), {**before, **more}
    found = choose(demand, gpu)
    fresh = {"micro_batch": found.micro_batch, "recompute": found.recompute, "asked": asked}
    return found, {**fresh, **more}


def settle_kernels(
    folder: Path,
    recipe: Recipe,
    gpu: GPUInfo,
    *,
    keep: bool = True,
    model_folder: Path | None = None,
) -> tuple[Recipe, KernelConfig | None]:
    """Choose the kernels that are open, or take those that the stage in ``folder`` has chosen.

    It keeps them on the same kind of GPU, once finished on any; ``keep`` as in :func:`settle`.
    ``model_folder`` holds what is trained, where that need not be the recipe's Llama.

    Returns:
        the recipe with its kernels, and these if they were open.
    Errors:
        BadDataError: what was chosen before cannot be read.
    """
    if "auto" not in (recipe.kernels.liger, recipe.kernels.cce):
        return recipe, None
    found = _chosen_before(folder / FILE, keep=keep) or {}
    kept = None
    if "kernels" in found and (
        found["asked"]["machine"]["gpu"] == gpu["name"] or (folder / "record.json").is_file()
    ):
        kept = KernelConfig(**found["kernels"])
    model_type = "llama"
    if model_folder is not None:
        model_type = str(storage.read_json(model_folder / "config.json").get("model_type"))
    chosen = kernels.decide(recipe.kernels, gpu, model_type=model_type, before=kept)
    return dataclasses.replace(recipe, kernels=chosen), chosen


def _chosen_before(path: Path, *, keep: bool) -> dict[str, Any] | None:
    if not (keep and path.is_file()):
        return None
    try:
        found = storage.read_json(path)
        if not (isinstance(found, dict) and {"asked", "micro_batch", "recompute"} <= set(found)):
            raise BadDataError(f"{path}: not what was chosen for a stage")
    except BadDataError as problem:
        what = str(problem).partition(";")[0]
        raise BadDataError(f"{what}; remove the file, and it is chosen again") from None
    return found


def _decisive(demand: Demand) -> dict[str, Any]:
    """Return the settings that memory or time depend on."""
    train, adapter = demand.train, demand.adapter
    return {
        "model": to_plain(demand.model),
        "tokens_per_batch": train.tokens_per_batch,
        "lengths": sorted({phase.length for phase in train.contexts}),
        "micro_batch": train.micro_batch,
        "recompute": train.recompute,
        "weights": train.weights,
        "optimizer": train.optimizer.kind,
        "precision": demand.precision,
        "loss_kernel": demand.loss_kernel,
        "compiled": demand.compiled,
        "four_bits": demand.four_bits,
        "adapter": None if adapter is None else [adapter.rank, sorted(adapter.targets)],
    }


def _machine(demand: Demand, gpu: GPUInfo) -> dict[str, Any]:
    return {"gpu": gpu["name"], "memory_gib": gpu["memory_gib"], "gpus": demand.world_size}


def note(folder: Path, chosen: dict[str, Any] | None) -> None:
    """Write a choice beside a stage's checkpoints, if it is new."""
    path = folder / FILE
    if chosen is not None and not (path.is_file() and storage.read_json(path) == chosen):
        storage.write_json(path, chosen)


def settle_stage(
    folder: Path,
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    *,
    model_folder: Path,
    processes: parallel.Processes,
    keep: bool,
) -> tuple[Recipe, TrainConfig, dict[str, Any] | None]:
    """Settle a stage that is about to train the model in ``model_folder``; see :func:`settle`.

    ``config`` has its precision and compiling decided already; the recipe gets its kernels.

    Errors:
        UsageError: shared weights are to train in FP8, and torchao cannot be had.
    """
    gpu = hardware.detect_gpu_type()
    recipe, chosen = settle_kernels(folder, recipe, gpu, keep=keep, model_folder=model_folder)
    may_be_shared = config.precision == "fp8" and processes.world > 1
    if not is_open(config) and chosen is None and not may_be_shared:
        return recipe, config, None
    model = describe_folder(model_folder)
    demand = _trainable(_demand_here(recipe, stage, config, processes, model), gpu)
    return recipe, *settle(folder, demand, gpu, keep=keep, chosen_kernels=chosen)


def for_trial(recipe: Recipe, stage: str, config: TrainConfig) -> TrainConfig:
    """Choose for a trial of a stage, whose precision and compiling are decided."""
    gpu = hardware.detect_gpu_type()
    demand = _demand_here(recipe, stage, config, parallel.join(), recipe.model)
    return choose(_trainable(demand, gpu), gpu)


def _trainable(demand: Demand, gpu: GPUInfo) -> Demand:
    found = with_fp8_that_fits(demand, gpu)
    if found.precision != demand.precision:
        log.warning("fp8: whole weights do not fit; shared ones train with torchao's recipe")
        float8.require_float8(torchao=True)
    return found


def laid_out(
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    model: ModelConfig,
    processes: parallel.Processes,
) -> Demand:
    """Return what a stage that is decided asks of each of ``processes``, and how they hold it.

    All of them are to call this, and see to it that all decide alike.
    """
    demand = _demand_here(recipe, stage, config, processes, model)
    total = processes.sum([float(processes.per_node)])
    if not processes.agree(total == [float(processes.per_node * processes.world)]):
        demand = dataclasses.replace(demand, per_node=1)  # nodes of different sizes
    memory_gib = hardware.detect_gpu_type()["memory_gib"]
    return layout.lay_out(demand, memory_gib=memory_gib, agree=processes.agree)


def _demand_here(
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    processes: parallel.Processes,
    model: ModelConfig,
) -> Demand:
    assert config.precision != "auto"
    return demand_of(
        recipe,
        stage,
        config,
        precision=config.precision,
        world_size=processes.world,
        per_node=processes.per_node,
        on_gpu=processes.device.type == "cuda",
        model=model,
    )
