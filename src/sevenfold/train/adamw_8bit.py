"""AdamW whose moments take 8 bits a value, for bf16 weights, whole or sharded.

Block-wise dynamic quantization (Dettmers et al. 2022, arXiv:2110.02861): a code is an index into
a table of 256 values between -1 and 1, dense around 0; every 256 neighbours of a row share a
scale. Blocks never cross rows, so FSDP2, which shards rows, leaves them whole, and moments can be
gathered and shared out anew like weights. bf16 weights are rounded stochastically, since the
nearest bf16 number would swallow most updates.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sevenfold.model import float8

BLOCK = 256
SMALLEST = 4096  # values; below it 8 bits save nothing
SMALLEST_SCALE = 1e-12
MOMENTS = ("exp_avg", "exp_avg_sq")
# Of an fp32 number: its sign and exponent and the first 7 bits behind, fine enough that no two
# middles between neighbours of a table agree in them. Counted from 2**-23, below every middle.
SHIFT = 16
FIRST_BIN = 0x34000000 >> SHIFT
NUM_BINS = (0x3F800000 >> SHIFT) - FIRST_BIN + 1


class Codes(NamedTuple):
    """How a moment is put into codes and back; ``n`` bins of fp32 numbers, then of negative ones.

    ``values`` [256]: what codes stand for, rising. ``lowest`` [2n]: the code of a bin's lowest
    number. ``next_from`` [256]: the number from which on the next code is nearer.
    """

    values: Tensor
    lowest: Tensor
    next_from: Tensor


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with 8-bit moments where a matrix has whole blocks a row.

    The state of such a matrix [rows, columns] is a step count, and of each moment codes [rows,
    columns] and scales [rows, columns / 256]; other parameters have fp32 moments.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        epsilon: float,
        lr: float = 0.0,
    ):
        """Train ``groups`` of parameters, each with its ``weight_decay``."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": epsilon, "weight_decay": 0.0})
        self._gradient_factor: Tensor | None = None

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients by ``factor`` [], in fp32, when they are applied next."""
        self._gradient_factor = factor.float()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the gradients."""
        loss = None if closure is None else closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        seeds = _seeds(trained)
        for group in self.param_groups:
            factors: dict[tuple[float, torch.device], Tensor] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._begin(parameter)
                state["step"] += 1
                key = (float(state["step"]), parameter.device)
                if key not in factors:
                    factors[key] = self._factors(group, *key)
                _apply(parameter, state, factors[key], seeds[parameter], group)
        self._gradient_factor = None
        return loss

    def _factors(self, group: dict[str, Any], step: float, device: torch.device) -> Tensor:
        """Return what changes from step to step, [4].

        Kept weight, step size, 1 / sqrt(correction 2), factor of the gradients, which is known to
        the device only.
        """
        beta1, beta2 = group["betas"]
        kept = 1 - group["lr"] * group["weight_decay"]
        step_size = group["lr"] / (1 - beta1**step)
        numbers = (kept, step_size, (1 - beta2**step) ** -0.5, 1.0)
        # Filled there: to copy them to a GPU would be to wait for the groups before.
        known = torch.cat([torch.full((1,), number, device=device) for number in numbers])
        if self._gradient_factor is not None:
            known[3] = self._gradient_factor
        return known

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.tensor(0.0)
        for moment in MOMENTS:
            if in_8_bits(parameter.shape):
                state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[f"{moment}_scale"] = _zero_scales(parameter)
            else:
                state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
        return state


def in_8_bits(shape: torch.Size) -> bool:
    """Whether the moments of a parameter of this shape, sharded or not, are kept in 8 bits."""
    return len(shape) >= 2 and shape[-1] % BLOCK == 0 and math.prod(shape) >= SMALLEST


def state_shapes(shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is kept for a parameter of this shape, but for its step count."""
    if not in_8_bits(shape):
        return {moment: tuple(shape) for moment in MOMENTS}
    scales = (*shape[:-1], shape[-1] // BLOCK)
    return {f"{m}_codes": tuple(shape) for m in MOMENTS} | {f"{m}_scale": scales for m in MOMENTS}


def state_bytes(shape: torch.Size) -> int:
    """Bytes that the moments of a parameter of this shape take."""
    return sum(
        math.prod(each) * (1 if name.endswith("_codes") else 4)
        for name, each in state_shapes(shape).items()
    )


def _zero_scales(parameter: Tensor) -> Tensor:
    """Return one scale a block, sharded by rows as the parameter is."""
    local = _local(parameter)
    scales = torch.zeros(
        (*local.shape[:-1], local.shape[-1] // BLOCK), dtype=torch.float32, device=local.device
    )
    if local is parameter:
        return scales
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // BLOCK))
    sharded: Tensor = DTensor.from_local(
        scales,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return sharded


def _local(tensor: Any) -> Tensor:
    """Return this process's part of a tensor."""
    # What torchao gathers in FP8 is wrapped, and compiled code is to see plain tensors.
    return float8.plain(tensor.to_local() if hasattr(tensor, "to_local") else tensor)


def _seeds(parameters: list[Tensor]) -> dict[Tensor, Tensor]:
    """Draw a number [] for each parameter, by the generator of its device."""
    seeds: dict[Tensor, Tensor] = {}
    for device in {parameter.device for parameter in parameters}:
        here = [parameter for parameter in parameters if parameter.device == device]
        drawn = torch.randint(1 << 31, (len(here),), dtype=torch.int32, device=device)
        seeds |= dict(zip(here, drawn.unbind(), strict=True))
    return seeds


def _apply(
    parameter: Tensor,
    state: dict[str, Tensor],
    factors: Tensor,
    seed: Tensor,
    group: dict[str, Any],
) -> None:
    """Update one parameter and its moments in place."""
    weights, gradient = _local(parameter.detach()), _local(parameter.grad)
    if not weights.numel():
        return
    # Kernels count on it; a view alone would leave the steps of a vector as they are.
    gradient = gradient.contiguous()
    assert weights.is_contiguous()
    constants = (factors, seed, *group["betas"], group["eps"])
    if not in_8_bits(parameter.shape):
        moments = [_local(state[moment]).view(-1) for moment in MOMENTS]
        tensors = [weights.view(-1), gradient.view(-1), *moments]
        _fastest(_update, weights)(*tensors, *constants)
        return
    codes = [_local(state[f"{moment}_codes"]).view(-1, BLOCK) for moment in MOMENTS]
    scales = [_local(state[f"{moment}_scale"]).view(-1, 1) for moment in MOMENTS]
    kinds = [_codes_of(moment, weights.device) for moment in MOMENTS]
    tensors = [weights.view(-1, BLOCK), gradient.view(-1, BLOCK), *codes, *scales]
    _fastest(_update_blocks, weights)(*tensors, *kinds, *constants)


def _fastest(update: Callable[..., None], weights: Tensor) -> Callable[..., None]:
    """Return an update as it is written down, or for a GPU the kernel that computes the same."""
    if not weights.is_cuda:
        return update
    # Not everywhere there is Triton; with PyTorch for GPUs there is.
    kernels = importlib.import_module("sevenfold.train.adamw_8bit_triton")
    kernel: Callable[..., None] = getattr(kernels, update.__name__.removeprefix("_"))
    return kernel


def _update_blocks(
    weights: Tensor,
    gradient: Tensor,
    codes: Tensor,
    codes_sq: Tensor,
    scale: Tensor,
    scale_sq: Tensor,
    kind: Codes,
    kind_sq: Codes,
    factors: Tensor,
    seed: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Update blocks of weights, [blocks, 256], with a scale each, [blocks, 1]."""
    moment = kind.values[codes.int()] * scale
    moment_sq = kind_sq.values[codes_sq.int()] * scale_sq
    new = _adamw(weights, gradient, moment, moment_sq, factors, seed, beta1, beta2, epsilon)
    weights.copy_(new[0])
    for value, kind_of_it, code, size in (
        (new[1], kind, codes, scale),
        (new[2], kind_sq, codes_sq, scale_sq),
    ):
        largest = value.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
        code.copy_(_encode(value * (1 / largest), kind_of_it))
        size.copy_(largest)


def _encode(values: Tensor, kind: Codes) -> Tensor:
    """Return the codes, int32, of the nearest values in the table to numbers from -1 to 1.

    A bin holds at most one number at which a code ends, so one look and one comparison find what
    a search would take eight looks for.
    """
    bins = ((values.abs().view(torch.int32) >> SHIFT) - FIRST_BIN).clamp(0, NUM_BINS - 1)
    lowest = kind.lowest[torch.where(values < 0, bins + NUM_BINS, bins)].int()
    return lowest + (values >= kind.next_from[lowest]).int()


def _update(
    weights: Tensor,
    gradient: Tensor,
    moment: Tensor,
    moment_sq: Tensor,
    factors: Tensor,
    seed: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Update weights whose moments are kept in fp32."""
    new = _adamw(weights, gradient, moment, moment_sq, factors, seed, beta1, beta2, epsilon)
    for old, value in zip((weights, moment, moment_sq), new, strict=True):
        old.copy_(value)


def _adamw(
    weights: Tensor,
    gradient: Tensor,
    moment: Tensor,
    moment_sq: Tensor,
    factors: Tensor,
    seed: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return new weights, rounded stochastically to bf16 if they are, and new moments in fp32."""
    gradient = gradient.float() * factors[3]
    moment = moment.lerp(gradient, 1 - beta1)
    moment_sq = moment_sq.lerp(gradient.square(), 1 - beta2)
    change = factors[1] * moment / (moment_sq.sqrt() * factors[2] + epsilon)
    new = weights.float() * factors[0] - change
    if weights.dtype == torch.bfloat16:
        new = _round_stochastically(new, seed)
    return new, moment, moment_sq


def _round_stochastically(values: Tensor, seed: Tensor) -> Tensor:
    """Return fp32 numbers as bf16, up or down by chance so that the mean stays.

    bf16 is the upper half of fp32's bits: what carries over from a random addition to the lower
    half rounds away from zero.
    """
    bits = (values.view(torch.int32) + _noise(values, seed)) & -65_536
    return bits.view(torch.float32).bfloat16()


def _noise(values: Tensor, seed: Tensor) -> Tensor:
    """Return 16 random bits for each of ``values``, int32: a hash of its place and of ``seed`` [].

    An eighth of the work of PyTorch's generator, before two neighbours shared a hash. Source of the
    mixing: Wellons 2018, "Prospecting for Hash Functions" (lowbias32); the constants are its own
    and 2**32 / golden ratio, as int32.
    """
    places = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    places = places.view(values.shape)
    mixed = ((places >> 1) ^ seed) * -1_640_531_535
    mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * 2_146_121_005
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * -2_073_254_261
    mixed = mixed ^ ((mixed >> 16) & 0xFFFF)
    return (mixed >> ((places & 1) * 16)) & 0xFFFF


@functools.cache
def _codes_of(moment: str, device: torch.device) -> Codes:
    """Return the tables of a moment; a square's has no values below 0."""
    values = torch.tensor(dynamic_table(signed=moment == "exp_avg"))
    middles = (values[1:] + values[:-1]) / 2
    edges = ((torch.arange(NUM_BINS + 1, dtype=torch.int32) + FIRST_BIN) << SHIFT).view(
        torch.float32
    )
    edges[0] = 0.0
    lowest = torch.cat([edges[:-1], -edges[1:]])
    return Codes(
        values=values.to(device),
        lowest=torch.bucketize(lowest, middles, right=True).to(torch.uint8).to(device),
        next_from=torch.cat([middles, torch.tensor([math.inf])]).to(device),
    )


def dynamic_table(*, signed: bool) -> list[float]:
    """Return the paper's table: seven decades, each with twice as many values as the one below.

    A value is the middle of a step between 0.1 and 1 of its decade; 0 and 1 are added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        bounds = torch.linspace(0.1, 1, steps + 1)
        middles = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-value for value in middles if signed]
    return sorted(values)
