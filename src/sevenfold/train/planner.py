"""What a stage will need before it starts: memory by part, tokens, time and cost.

Memory is counted (`train/memory.py`), against peaks measured on one H100 with 8-bit AdamW for the
7B at 2048 tokens, and fp32 weights under autocast for the model of 125 M parameters:

    ========================================  =========  =========  ======
    case                                      measured   predicted  error
    ========================================  =========  =========  ======
    7B, bf16, micro-batch 2, 32 a step        59.5 GiB   59.5 GiB   -0.1 %
    fp8 (ours), micro-batch 4, 16 a step      74.6 GiB   74.5 GiB   -0.1 %
    bf16, micro-batch 2, 8 a step             59.1 GiB   59.1 GiB   -0.1 %
    bf16, micro-batch 4, 4 a step             76.4 GiB   76.3 GiB   -0.1 %
    bf16, micro-batch 4, on each of two GPUs  57.2 GiB   58.2 GiB   +1.7 %
    fp8_torchao, micro-batch 2, 1 a step      43 GiB     43.1 GiB   +0.2 %
    fp8_torchao, micro-batch 2, 8 a step      54 GiB     54.7 GiB   +1.2 %
    fp8_torchao, micro-batch 4, 4 a step      66 GiB     67.5 GiB   +2.3 %
    bf16, micro-batch 8, two of 140 GiB       105.1 GiB  106.4 GiB  +1.2 %
    fp8_torchao, the same                     82.0 GiB   81.9 GiB   -0.2 %
    125 M, pretraining, micro-batch 16        12.16 GiB  12.26 GiB  +0.8 %
    125 M, SFT and DPO, micro-batch 8         7.12 GiB   7.24 GiB   +1.6 %
    125 M, LoRA of rank 16, micro-batch 8     6.31 GiB   6.21 GiB   -1.6 %
    ========================================  =========  =========  ======

The first two are of today. The others of the 7B were measured with CCE or, on two GPUs, with FSDP2,
before weight gradients were added up inside their products; the last three when the loss kept the
logits of 2,048 positions and their gradients. They are predicted with those. On two GPUs, layers
stayed gathered from forward to backward where that is said to have room (`layout.py`). Nothing is
fitted to these figures.
Four-bit bases and uncompiled layers follow from the same counting and may be further off.
"""

from __future__ import annotations

import dataclasses
import os

from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model.config import ModelConfig
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import GIB, Demand, MemoryPlan

# Measured on two CPU cores: 5.4 M parameters, 3,000 tokens/s, eager fp32.
CPU_FLOPS = 0.1e12
LONGEST_CPU_RUN_S = 30 * 86_400
USABLE_FRACTION = 0.97
# Where no rate has been measured, the share of a GPU's dense BF16 peak that training at least 4096
# wide has reached on an H100, optimizer and accumulation included (docs/performance.md); fp32 is a
# guess, nobody trains the 7B in it. The 124 M of preset small, 768 wide, reached 0.28.
REACHED: dict[str, float] = {"bf16": 0.60, "fp8": 0.89, "fp8_torchao": 0.75, "fp32": 0.25}
WIDE, NARROWING = 4096, 0.455
# Of full training's work, what an adapter on frozen weights leaves: no gradients of the weights,
# two products of three, and its own (measured at the 7B, bf16 and fp8).
ADAPTER_WORK = 0.79
ASSUMED_PEAK_FLOPS = 989e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage needs; times in seconds, None where neither a rate nor an assumption is known.

    ``rate_source`` says where the rate comes from: measured, or an assumed MFU.
    """

    num_parameters: int
    memory: tuple[MemoryPlan, ...]
    peak_gib: float
    micro_batches_per_step: int
    num_steps: int
    tokens: int
    flops: float
    tokens_per_s_per_gpu: float | None
    rate_source: str
    world_size: int
    elapsed_s: float | None
    gpu_hours: float | None
    cost: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast one GPU trains: a measured rate, or a share of the peak that is assumed."""

    tokens_per_s: float | None = None
    assumed_mfu: float | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        """Check that exactly one of the two is given."""
        if (self.tokens_per_s is None) == (self.assumed_mfu is None):
            raise ValueError("give exactly one of tokens_per_s and assumed_mfu")
        if self.assumed_mfu is not None and not self.peak_flops:
            raise ValueError("assumed_mfu needs peak_flops, the GPU's dense BF16 peak")


def plan(
    demand: Demand,
    *,
    num_steps: int,
    rate: Rate | None = None,
    price_per_gpu_hour: float | None = None,
) -> Plan:
    """Plan a stage of ``num_steps`` optimizer steps.

    Without a ``rate``, how fast a GPU is, there is no time and no cost; the price is in any
    currency.
    """
    model, train, world_size = demand.model, demand.train, demand.world_size
    memory = tuple(map(demand.memory, sorted({phase.length for phase in train.contexts})))
    tokens = num_steps * train.tokens_per_batch
    flops = _total_flops(model, train, tokens) * (ADAPTER_WORK if demand.adapter else 1)
    tokens_per_s, source = _tokens_per_s(rate, flops / tokens, world_size)
    elapsed_s = tokens / tokens_per_s / world_size if tokens_per_s else None
    gpu_hours = elapsed_s and elapsed_s * world_size / 3600
    return Plan(
        num_parameters=model.num_parameters,
        memory=memory,
        peak_gib=demand.peak_gib,
        micro_batches_per_step=demand.micro_batches_per_step,
        num_steps=num_steps,
        tokens=tokens,
        flops=flops,
        tokens_per_s_per_gpu=tokens_per_s,
        rate_source=source,
        world_size=world_size,
        elapsed_s=elapsed_s,
        gpu_hours=gpu_hours,
        cost=gpu_hours and price_per_gpu_hour and gpu_hours * price_per_gpu_hour,
    )


def _total_flops(model: ModelConfig, train: TrainConfig, tokens: int) -> float:
    start, flops = 0.0, 0.0
    for phase in train.contexts:
        flops += (phase.until - start) * tokens * model.flops_per_token(phase.length)
        start = phase.until
    return flops


def assumed_mfu(demand: Demand) -> float:
    """Return the share of the dense BF16 peak that a stage may be expected to reach."""
    narrow: float = min(1.0, demand.model.hidden_size / WIDE) ** NARROWING
    return REACHED[demand.precision] * narrow


def _tokens_per_s(
    rate: Rate | None, flops_per_token: float, world_size: int
) -> tuple[float | None, str]:
    if rate is None:
        return None, "unknown"
    if rate.tokens_per_s is not None:
        return rate.tokens_per_s, "measured"
    assert rate.assumed_mfu is not None
    assert rate.peak_flops is not None
    share = f"assumed: {rate.assumed_mfu:.0%} of {rate.peak_flops / 1e12:.0f} TFLOP/s"
    if world_size > 2:
        share += ", as measured on up to two"
    return rate.assumed_mfu * rate.peak_flops / flops_per_token, share


def require_room(plan: Plan, gpu: GPUInfo, *, memory_gib: float | None = None) -> None:
    """Refuse a plan that this machine cannot carry out.

    Args:
        plan: what is planned.
        gpu: what the machine has.
        memory_gib: the CPU's memory; None to ask the system. Used only without a GPU.

    Errors:
        UsageError: no GPU where one is needed, or one with too little memory; with the numbers.
    """
    days = plan.flops / CPU_FLOPS / 86_400
    if gpu["gpu_type"] == "cpu":
        room_gib = memory_gib if memory_gib is not None else machine_memory_gib()
        if plan.peak_gib <= room_gib and plan.flops / CPU_FLOPS <= LONGEST_CPU_RUN_S:
            return
        raise UsageError(
            f"no GPU on this machine: {plan.num_parameters / 1e9:.2f} B parameters need "
            f"{plan.peak_gib:.1f} GiB on {_gpus(plan)} ({_parts(plan)}) and {plan.flops:.2g} FLOP, "
            f"about {days:,.0f} days at the {CPU_FLOPS / 1e12:.1f} TFLOP/s of two CPU cores; run "
            f"it on a GPU with at least {_size(plan.peak_gib)} GiB, or take --preset demo"
        )
    room_gib = gpu["memory_gib"] * USABLE_FRACTION
    if plan.peak_gib > room_gib:
        raise UsageError(
            f"{plan.peak_gib:.1f} GiB are needed on {_gpus(plan)} ({_parts(plan)}) but "
            f"{gpu['name']} has {gpu['memory_gib']:.1f} GiB; set a smaller micro_batch, "
            "recompute: true, optimizer.kind: adamw_8bit with weights: bf16, or use more GPUs"
        )


def machine_memory_gib() -> float:
    """Return this machine's main memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _gpus(plan: Plan) -> str:
    return "one GPU" if plan.world_size == 1 else f"each of {plan.world_size} GPUs"


def _size(peak_gib: float) -> int:
    """Return the smallest usual memory size that holds ``peak_gib``."""
    sizes = (16, 24, 40, 48, 80, 141, 192)
    return next((size for size in sizes if peak_gib <= size * USABLE_FRACTION), 288)


def _parts(plan: Plan) -> str:
    worst = max(plan.memory, key=lambda part: part.peak_gib)
    return (
        f"weights {worst.weights_gib:.1f}, gradients {worst.gradients_gib:.1f}, optimizer "
        f"{worst.optimizer_gib:.1f}, activations {worst.activations_gib:.1f} at context "
        f"{worst.seq_len}"
    )
