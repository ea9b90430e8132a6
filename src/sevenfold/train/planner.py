"""What a stage will need before it starts: memory by part, tokens, time and cost.

Memory is counted for layers compiled one by one, from what their backward keeps. Against the peaks
measured on one H100 with the 7B at 2048 tokens, 8-bit AdamW and CCE:

    ===================================  ========  =========  ======
    case                                 measured  predicted  error
    ===================================  ========  =========  ======
    bf16, micro-batch 2, 1 a step        45.6 GiB  45.7 GiB   +0.3 %
    bf16, micro-batch 2, 8 a step        59.1 GiB  59.1 GiB   +0.0 %
    bf16, micro-batch 4, 4 a step        76.4 GiB  76.5 GiB   +0.1 %
    fp8_torchao, micro-batch 2, 1        43 GiB    43.3 GiB   +0.7 %
    fp8_torchao, micro-batch 2, 8        54 GiB    54.6 GiB   +1.1 %
    fp8_torchao, micro-batch 4, 4        66 GiB    67.5 GiB   +2.2 %
    ===================================  ========  =========  ======

One constant (``OVERHEAD_GIB``) was fitted to these six; the rest is counted. Measured since: our
fp8 with micro-batch 4, 72.0 GiB (73.0 predicted); bf16 with micro-batch 4 on each of two GPUs, 57.2
(58.1); 125 M fp32 weights under autocast, 12.2 GiB, where 15.3 were predicted. Recomputation, LoRA,
four-bit bases and uncompiled layers follow from the same counting and may be further off.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Literal

from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model.config import ModelConfig
from sevenfold.train.config import TrainConfig

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp8_torchao": 2}
# Two moments of fp32; two of 8 bits with an fp32 scale for every 256 values.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
# NF4: half a byte, a scale of one byte for 64 weights and one of four bytes for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# The 8-bit optimizer's step works in fp32, tensor by tensor: two copies of the largest.
OPTIMIZER_STEP_BYTES = {"adamw": 0.0, "adamw_8bit": 8.0}
# Workspaces of the matrix libraries and rounding of the allocator, from the measured peaks.
OVERHEAD_GIB = 0.25
# Measured on two CPU cores: 5.4 M parameters, 3,000 tokens/s, eager fp32.
CPU_FLOPS = 0.1e12
LONGEST_CPU_RUN_S = 30 * 86_400
USABLE_FRACTION = 0.97

LossKernel = Literal["plain", "chunked", "cce"]
Precision = Literal["fp32", "bf16", "fp8", "fp8_torchao"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Memory of one GPU at one context length, by part, in GiB."""

    seq_len: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    gathered_gib: float
    activations_gib: float
    loss_gib: float
    overhead_gib: float
    peak_gib: float


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
    model: ModelConfig,
    train: TrainConfig,
    *,
    num_steps: int,
    precision: Precision,
    world_size: int = 1,
    loss_kernel: LossKernel = "chunked",
    compiled: bool = True,
    num_trainable_parameters: int | None = None,
    four_bits: bool = False,
    rate: Rate | None = None,
    price_per_gpu_hour: float | None = None,
) -> Plan:
    """Plan one training stage.

    Args:
        model: what is trained.
        train: the stage's settings.
        num_steps: optimizer steps.
        precision: what ``train.precision`` came to on the hardware meant.
        world_size: GPUs that the weights are sharded over.
        loss_kernel: how the head's loss is computed, as in objective.linear_cross_entropy.
        compiled: whether layers are compiled; uncompiled ones keep more.
        num_trainable_parameters: None for all; with LoRA the adapter's alone.
        four_bits: the layers' frozen matrices are kept in NF4.
        rate: how fast a GPU is; without it there is no time and no cost.
        price_per_gpu_hour: in any currency.
    """
    settings = _Settings(
        model=model,
        train=train,
        precision=precision,
        world_size=world_size,
        loss_kernel=loss_kernel,
        compiled=compiled,
        num_trainable=num_trainable_parameters,
        four_bits=four_bits,
    )
    memory = tuple(map(settings.memory, sorted({phase.length for phase in train.contexts})))
    tokens = num_steps * train.tokens_per_batch
    flops = _total_flops(model, train, tokens)
    tokens_per_s, source = _tokens_per_s(rate, flops / tokens)
    elapsed_s = tokens / tokens_per_s / world_size if tokens_per_s else None
    gpu_hours = elapsed_s * world_size / 3600 if elapsed_s is not None else None
    return Plan(
        num_parameters=model.num_parameters,
        memory=memory,
        peak_gib=max(part.peak_gib for part in memory),
        micro_batches_per_step=settings.micro_batches_per_step,
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


def _tokens_per_s(rate: Rate | None, flops_per_token: float) -> tuple[float | None, str]:
    if rate is None:
        return None, "unknown"
    if rate.tokens_per_s is not None:
        return rate.tokens_per_s, "measured"
    assert rate.assumed_mfu is not None
    assert rate.peak_flops is not None
    share = f"assumed: {rate.assumed_mfu:.0%} of {rate.peak_flops / 1e12:.0f} TFLOP/s"
    return rate.assumed_mfu * rate.peak_flops / flops_per_token, share


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The inputs of the memory formulas."""

    model: ModelConfig
    train: TrainConfig
    precision: str
    world_size: int
    loss_kernel: LossKernel
    compiled: bool
    num_trainable: int | None
    four_bits: bool

    @property
    def micro_batches_per_step(self) -> int:
        """Forward passes of one process per optimizer step."""
        per_forward = self.train.micro_batch * self.train.longest_context * self.world_size
        return max(1, math.ceil(self.train.tokens_per_batch / per_forward))

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.precision]

    def memory(self, seq_len: int) -> MemoryPlan:
        """Return the parts and the peak at ``seq_len``."""
        model, weight_bytes = self.model, BYTES[self.train.weights]
        trainable = self.num_trainable
        trained = model.num_parameters if trainable is None else trainable
        # An adapter is kept in fp32 beside the frozen weights.
        adapter_bytes = 4 * trainable if trainable is not None else 0
        gradient_bytes = weight_bytes if trainable is None else 4
        # Rows of a shorter context are so many more that a forward holds as many tokens.
        tokens = max(1, self.train.micro_batch * self.train.longest_context // seq_len) * seq_len
        in_layers = model.num_layers * model.num_layer_matmul_parameters
        saved = in_layers * (weight_bytes - NF4_BYTES) if self.four_bits else 0.0
        weights = (model.num_parameters * weight_bytes - saved + adapter_bytes) / self.world_size
        gradients = trained * gradient_bytes / self.world_size
        states = trained * OPTIMIZER_BYTES[self.train.optimizer.kind] / self.world_size
        gathered = self._gathered_bytes()
        activations = tokens * self._activation_bytes_per_token()
        loss = self._loss_bytes(tokens)
        overhead = OVERHEAD_GIB * GIB
        static = weights + states + overhead
        embedding = model.vocab_size * model.hidden_size
        # With one micro-batch a step the backward starts without gradients but the head's.
        kept = (
            gradients
            if self.micro_batches_per_step > 1
            else min(gradients, embedding * gradient_bytes / self.world_size)
        )
        backward = static + kept + gathered + activations + max(loss, tokens * self._transient())
        temporary = OPTIMIZER_STEP_BYTES[self.train.optimizer.kind] * min(embedding, trained)
        step = static + gradients + temporary / self.world_size
        return MemoryPlan(
            seq_len=seq_len,
            weights_gib=weights / GIB,
            gradients_gib=gradients / GIB,
            optimizer_gib=states / GIB,
            gathered_gib=gathered / GIB,
            activations_gib=(activations + tokens * self._transient()) / GIB,
            loss_gib=loss / GIB,
            overhead_gib=OVERHEAD_GIB,
            peak_gib=max(backward, step) / GIB,
        )

    def _gathered_bytes(self) -> float:
        """Bytes of weights that exist a second time while computing."""
        model, compute = self.model, self.compute_bytes
        if self.precision == "fp8":
            # Every layer's weights are kept in 8 bits; the head's are cast where they are fp32.
            head = model.vocab_size * model.hidden_size if self.train.weights == "fp32" else 0
            return float(model.num_layers * model.num_layer_matmul_parameters + 2 * head)
        if self.four_bits:
            # One matrix at a time is made anew from its four bits.
            return float(model.hidden_size * model.intermediate_size * compute)
        if self.world_size == 1:
            # Autocast keeps a bf16 copy of every fp32 weight from forward to backward.
            casts = self.train.weights == "fp32" and self.precision != "fp32"
            return float(model.num_matmul_parameters * 2) if casts else 0.0
        # FSDP2: the root's weights stay whole, two layers are whole at a time, and one layer's
        # gradient is whole in fp32 while it is being summed.
        root = model.num_parameters - model.num_layers * model.num_layer_matmul_parameters
        return float(root * compute + model.num_layer_matmul_parameters * (2 * compute + 4))

    def _activation_bytes_per_token(self) -> float:
        """Bytes that one token leaves for the backward pass, in all layers."""
        model, layer = self.model, self._layer_bytes_per_token()
        if self.train.recompute is True:
            # Every layer keeps its input; one layer at a time is computed again.
            return model.num_layers * model.hidden_size * self.compute_bytes + layer
        return model.num_layers * layer

    def _layer_bytes_per_token(self) -> float:
        """Bytes that one token leaves in one layer.

        Residual stream twice (before attention and before the MLP), both normed inputs, queries,
        keys, values, attention's output, gate, up and their product. In FP8 the normed inputs are
        kept in 8 bits (ours: one input of four, the others are cast again) and the product is
        computed again. Cheap recomputation keeps neither normed inputs nor the product.
        """
        model, compute = self.model, self.compute_bytes
        h, f = model.hidden_size, model.intermediate_size
        q, k = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
        attention = compute * (2 * q + 2 * k) + 4 * model.num_heads
        if self.precision.startswith("fp8"):
            inputs = h if self.precision == "fp8" else 2 * h
            kept = compute * 2 * h + inputs + compute * 2 * f
        elif self.train.recompute == "cheap":
            kept = compute * (2 * h + 2 * f)
        else:
            kept = compute * (4 * h + 3 * f)
        if self.train.weights == "fp32" and self.precision != "fp32" and self.world_size == 1:
            # Under autocast the residual stream and the norms stay in fp32.
            kept += 2 * 2 * h + 2 * 4 * h
        if not self.compiled:
            # Eager norms keep their fp32 input and their normalised values, eager SwiGLU its silu.
            kept += (12 * h if compute == 2 else 8 * h) + compute * f
        return float(kept + attention)

    def _transient(self) -> float:
        """Bytes per token of the gradients inside one layer: of gate, up and their product."""
        return float(3 * self.model.intermediate_size * self.compute_bytes)

    def _loss_bytes(self, tokens: int) -> float:
        """Bytes at the head: final hidden state, its norm and gradient, and the logits held."""
        hidden = tokens * self.model.hidden_size * 4 * self.compute_bytes
        if self.loss_kernel == "cce":
            return float(hidden)
        logits = tokens * self.model.vocab_size
        if self.loss_kernel == "plain":
            # Logits, their fp32 copy, log-probabilities.
            return float(hidden + logits * (self.compute_bytes + 8))
        # Logits, which become their gradients, and the gradient of the head's weight.
        head = self.model.vocab_size * self.model.hidden_size
        return float(hidden + (logits + head) * self.compute_bytes)


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
