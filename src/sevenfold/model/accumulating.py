"""Linear layers that add their weight's gradient up inside the matrix product that computes it.

A batch is trained as several micro-batches. PyTorch writes each one's weight gradients and then
adds them to the sum: four passes over memory for what the product can do in two (read the sum,
write it). Sums are rounded once a micro-batch instead of twice.

Shapes: n tokens, i inputs, o outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sevenfold.model.remembered import Remembered


@torch.library.custom_op(
    "sevenfold::add_product",
    mutates_args=("total",),
    schema="(Tensor(a!) total, Tensor gradient, Tensor input) -> ()",
)
def add_product(total: Tensor, gradient: Tensor, input: Tensor) -> None:
    """Add ``gradient.T @ input`` to ``total``: [n, o] and [n, i] to [o, i].

    An operator that torch.compile does not look into: it would compute the product into memory of
    its own and copy it.
    """
    total.addmm_(gradient.t(), input)


@add_product.register_fake
def _(total: Tensor, gradient: Tensor, input: Tensor) -> None:
    return None


class _Product(torch.autograd.Function):
    """``input @ weight.T``, whose backward pass changes ``total`` and has no weight gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_oi: Tensor, total_oi: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight_oi, total_oi)
        return functional.linear(input, weight_oi)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        input, weight_oi, total_oi = ctx.saved_tensors
        torch.ops.sevenfold.add_product(total_oi, gradient.flatten(0, -2), input.flatten(0, -2))
        wanted = gradient @ weight_oi if ctx.needs_input_grad[0] else None
        return wanted, None, None


class AccumulatingLinear(nn.Linear):
    """A linear layer with the sum of its weight's gradients, ``total`` [o, i]."""

    total: Tensor

    def __init__(self, linear: nn.Linear):
        """Take over the weight and the bias of ``linear``."""
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("total", torch.zeros_like(linear.weight), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply."""
        if not torch.is_grad_enabled():
            return functional.linear(input, self.weight, self.bias)
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.total
        )
        return output if self.bias is None else output + self.bias


def accumulate_in_products(model: nn.Module) -> None:
    """Replace the trained linear layers of ``model``'s decoder, in place, before it is compiled.

    Their weights, their inputs and the gradients of their outputs must have one precision: no
    autocast. The head stays, since the objective multiplies by its weight itself.
    """
    decoder: nn.Module = getattr(model, "get_decoder", lambda: model)()
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear and module.weight.requires_grad:
            decoder.set_submodule(name, AccumulatingLinear(module))
    _layers.forget()


@Remembered
def _layers(model: nn.Module) -> list[AccumulatingLinear]:
    return [module for module in model.modules() if isinstance(module, AccumulatingLinear)]


def begin_step(model: nn.Module) -> None:
    """Begin the gradients of a step, or begin them again."""
    layers = _layers(model)
    if layers:
        torch._foreach_zero_([layer.total for layer in layers])
    for layer in layers:
        layer.weight.grad = layer.total
