"""A linear layer whose three matrix products are computed in FP8, and the casts around them.

Inputs and weights are cast to e4m3, gradients to e5m2, each tensor with one scale, a power of two,
so that only the rounding to 8 bits costs precision. What is cast depends on no other element of
its tensor, so that a compiler can fuse the cast with whatever computes the values:

- weights are cast when they have changed, and the cast is kept over the micro-batches of a step,
  that of a frozen weight also as its transpose, which each backward pass reads;
- inputs and gradients are cast with the scale that earlier steps found (delayed scaling), while
  their largest magnitude is noted for later ones; values beyond the range are set to its end;
- where no gradients are wanted, inputs are cast with the scale that their own values ask for,
  unless their scales are held: what is to be compared must round alike (`float8.hold_inputs`).

Infinities become NaN, so that no cast hides them.

Shapes: n tokens, i inputs, o outputs, r an adapter's rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sevenfold.model.low_rank import add_low_rank
from sevenfold.model.transposing import transpose

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (E4M3, E5M2)}
# Below this a tensor counts as zero; it keeps scales and their inverses normal fp32 numbers.
SMALLEST_AMAX = 2.0**-100
# The bits of an fp32 number's exponent: without the others it is a power of two.
EXPONENT = 0x7F800000
# The smallest block an FP8 matrix product takes, in elements of the summed dimension.
DIVISOR = 16


def largest(values: Tensor) -> Tensor:
    """Return the largest magnitude []; row by row first, as a compiler can fuse it with a norm."""
    return values.detach().abs().amax(-1).amax().float()


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest powers of two that keep ``amax`` in range; 1 where it is 0."""
    exact = LARGEST[dtype] / amax.clamp(min=SMALLEST_AMAX)
    rounded = (exact.view(torch.int32) & EXPONENT).view(torch.float32)
    return torch.where(amax > 0, rounded, torch.ones_like(rounded))


def cast(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values * scale`` rounded to FP8; what is too large saturates, infinity is NaN."""
    scaled = values.float() * scale
    saturated = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    # A constant NaN would differ from itself, and a compiler would not see that two casts are one.
    return torch.where(scaled.isinf(), scaled * 0, saturated).to(dtype)


def written(values: Tensor) -> Tensor:
    """Return ``values`` in a form that torch.compile writes to memory once for all products.

    It would compute what is cheap anew for each of its users, each time into memory of its own;
    but to view memory in a given layout it needs that memory.
    """
    return values.as_strided(values.shape, values.stride())


def multiply(
    left: Tensor,
    right_transposed: Tensor,
    inverses: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    *,
    emulate: bool,
    fast: bool = False,
) -> Tensor:
    """Return ``left @ right`` of two FP8 tensors whose rows are what is summed over.

    ``emulate`` sums exactly, on any machine; autocast leaves fp64 alone. ``fast`` keeps fewer bits
    of the sums, as torchao does in the forward pass.
    """
    if emulate:
        product = left.double() @ right_transposed.double().t()
        return (product * (inverses[0] * inverses[1]).double()).to(dtype)
    return torch._scaled_mm(
        left,
        right_transposed.t(),
        scale_a=inverses[0],
        scale_b=inverses[1],
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def transposed(values: Tensor) -> Tensor:
    """Return the transpose, its rows contiguous and padded with zeros to whole blocks."""
    if missing := -values.shape[0] % DIVISOR:
        # As bytes, since not every operation knows FP8; a byte of zeros is the number 0.
        bytes_of_it = functional.pad(values.view(torch.uint8), (0, 0, 0, missing))
        values = bytes_of_it.view(values.dtype)
    turned: Tensor = transpose(values)
    return turned


class Scaling(nn.Module):
    """How one tensor, or several that are the same, is brought into FP8: scale and its inverse.

    ``amax`` is the largest magnitude seen in this step; seeing the same values again, as when
    activations are recomputed, does not change it. ``held``: nothing is cast by any other scale,
    with gradients or without. Each is a tensor of its own, not a part of a
    larger one, so that compiled layers can change it in place.
    """

    scale: Tensor
    inverse: Tensor
    amax: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device):
        """Start with scale 1."""
        super().__init__()
        self.dtype = dtype
        self.held = False
        for name, value in (("scale", 1.0), ("inverse", 1.0), ("amax", 0.0)):
            start = torch.tensor(value, dtype=torch.float32, device=device)
            self.register_buffer(name, start, persistent=False)


class _Product(torch.autograd.Function):
    """``input @ weight.T`` and its gradients, of FP8 tensors; the input is kept in FP8.

    What an adapter adds, ``inner @ up.T``, is added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_ni: Tensor,
        weight_oi: Tensor,
        weight8_oi: Tensor,
        weight8_io: Tensor | None,
        weight_inverse: Tensor,
        input_scale: Tensor,
        input_inverse: Tensor,
        gradient_scale: Tensor,
        gradient_inverse: Tensor,
        gradient_amax: Tensor,
        inner_nr: Tensor | None,
        up_or: Tensor | None,
        dtype: torch.dtype,
        emulate: bool,
    ) -> Tensor:
        input8_ni = written(cast(input_ni, input_scale, E4M3))
        ctx.save_for_backward(
            input8_ni,
            weight8_oi,
            weight8_io,
            input_inverse,
            weight_inverse,
            gradient_scale,
            gradient_inverse,
            gradient_amax,
            inner_nr,
            up_or,
        )
        ctx.dtypes = input_ni.dtype, weight_oi.dtype
        ctx.emulate = emulate
        inverses = input_inverse, weight_inverse
        output_no = multiply(input8_ni, weight8_oi, inverses, dtype, emulate=emulate, fast=True)
        if inner_nr is not None and up_or is not None:
            add_low_rank(output_no, inner_nr, up_or)
        return output_no

    @staticmethod
    def backward(ctx: Any, gradient_no: Tensor) -> Any:
        (
            input8_ni,
            weight8_oi,
            weight8_io,
            input_inverse,
            weight_inverse,
            gradient_scale,
            gradient_inverse,
            gradient_amax,
            inner_nr,
            up_or,
        ) = ctx.saved_tensors
        input_dtype, weight_dtype = ctx.dtypes
        gradient_amax.copy_(torch.maximum(gradient_amax, largest(gradient_no)))
        gradient8_no = written(cast(gradient_no, gradient_scale, E5M2).contiguous())
        gradients: list[Tensor | None] = [None] * 14
        if ctx.needs_input_grad[0]:
            gradients[0] = multiply(
                gradient8_no,
                transposed(weight8_oi) if weight8_io is None else weight8_io,
                (gradient_inverse, weight_inverse),
                input_dtype,
                emulate=ctx.emulate,
            )
        if ctx.needs_input_grad[1]:
            gradients[1] = multiply(
                transposed(gradient8_no),
                transposed(input8_ni),
                (gradient_inverse, input_inverse),
                weight_dtype,
                emulate=ctx.emulate,
            )
        if inner_nr is not None:
            gradients[10] = gradient_no @ up_or
            gradients[11] = gradient_no.t() @ inner_nr
        return tuple(gradients)


class Float8Linear(nn.Linear):
    """A linear layer with FP8 products; its weight stays what it was, for optimizer and export."""

    weight8: Tensor
    weight8_turned: Tensor | None
    weight_inverse: Tensor

    def __init__(self, linear: nn.Linear, input_scaling: Scaling, *, emulate: bool):
        """Take over the weight of ``linear``; layers of one input share its ``input_scaling``."""
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight = linear.weight
        self.bias = linear.bias
        self.emulate = emulate
        device = linear.weight.device
        self.input_scaling = input_scaling
        self.gradient_scaling = Scaling(E5M2, device)
        self.register_buffer(
            "weight8", torch.zeros_like(linear.weight, dtype=E4M3), persistent=False
        )
        self.register_buffer("weight8_turned", None, persistent=False)
        one = torch.ones((), dtype=torch.float32, device=device)
        self.register_buffer("weight_inverse", one, persistent=False)

    def forward(
        self, input: Tensor, inner_nr: Tensor | None = None, up_or: Tensor | None = None
    ) -> Tensor:
        """Multiply; with gradients by delayed scaling, without by the input's own scale.

        An adapter's ``inner_nr @ up_or.T`` is added where it is given, not in FP8.
        """
        input_ni = input.reshape(-1, self.in_features)
        if torch.is_grad_enabled() or self.input_scaling.held:
            scale, inverse = self.input_scaling.scale, self.input_scaling.inverse
        else:
            scale = scale_for(largest(input_ni), E4M3)
            inverse = 1 / scale
        kind = input.device.type
        autocast = torch.is_autocast_enabled(kind)
        output_no: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input_ni,
            self.weight,
            self.weight8,
            self.weight8_turned,
            self.weight_inverse,
            scale,
            inverse,
            self.gradient_scaling.scale,
            self.gradient_scaling.inverse,
            self.gradient_scaling.amax,
            inner_nr,
            up_or,
            torch.get_autocast_dtype(kind) if autocast else input.dtype,
            self.emulate,
        )
        if torch.is_grad_enabled():
            # After the cast: torch.compile computes a cast again in the backward pass instead of
            # keeping it, but not where a reduction of the same values comes first.
            noted = self.input_scaling.amax
            noted.copy_(torch.maximum(noted, largest(input_ni)))
        if self.bias is not None:
            output_no = output_no + self.bias.to(output_no.dtype)
        return output_no.view(*input.shape[:-1], self.out_features)
