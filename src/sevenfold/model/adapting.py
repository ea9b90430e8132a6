"""LoRA on frozen linear layers that reads each input once and writes each output once.

At the 7B an adapter's products are small and their inputs and outputs are not: what they cost is
memory's time. So layers of one input (queries, keys, values; gate, up) have one product with all
their A, side by side, which autograd turns into one product each for the gradients of the A and of
the input; and what B makes of it is added inside that product to what the frozen weight's product
has written, instead of being written, read and added.

The modules stay PEFT's, with its names and weights.

Shapes: n tokens, i inputs, o outputs, r the adapter's rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.nn import functional

from sevenfold.model.float8 import input_name
from sevenfold.model.float8_linear import Float8Linear
from sevenfold.model.low_rank import add_low_rank

ADAPTER = "default"


class _Product(torch.autograd.Function):
    """``input @ weight.T + inner @ up.T`` with a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any, input_ni: Tensor, weight_oi: Tensor, inner_nr: Tensor, up_or: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight_oi, inner_nr, up_or)
        output_no = functional.linear(input_ni, weight_oi)
        add_low_rank(output_no, inner_nr, up_or)
        return output_no

    @staticmethod
    def backward(ctx: Any, gradient_no: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor]:
        weight_oi, inner_nr, up_or = ctx.saved_tensors
        of_input = gradient_no @ weight_oi if ctx.needs_input_grad[0] else None
        return of_input, None, gradient_no @ up_or, gradient_no.t() @ inner_nr


class SharedInput:
    """What the A of several layers make of one input, computed when the first layer asks.

    Held from then until the last has asked; another input is another product. Where a forward
    pass ends in between, all of its activations hang on what is held: see :func:`forget`.
    """

    def __init__(self, layers: list[Any]):
        """Be what ``layers``, PEFT's, ask."""
        self._layers = layers
        self.forget()
        for number, layer in enumerate(layers):
            layer.shared_input, layer.number = self, number

    def forget(self) -> None:
        """Hold nothing."""
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def inner(self, number: int, input: Tensor) -> Tensor:
        """Return [..., r] for layer ``number`` and the very tensor [..., i] that it was given."""
        if self._input is not input or number not in self._waiting:
            down = [layer.lora_A[ADAPTER].weight for layer in self._layers]
            inner = functional.linear(input, torch.cat(down).to(input.dtype))
            self._waiting = dict(enumerate(inner.split([len(each) for each in down], dim=-1)))
            self._input = input
        found = self._waiting.pop(number)
        if not self._waiting:
            self._input = None
        return found


@functools.cache
def linear_class() -> Any:
    """Return the class of our layers; importing PEFT takes seconds."""
    from peft.tuners.lora import Linear

    class AdaptedLinear(Linear):  # type: ignore[misc, unused-ignore]
        shared_input: SharedInput
        number: int

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Do what PEFT's does, its own way where the layer is as precise as the adapter."""
            base, up = self.base_layer, self.lora_B[ADAPTER].weight
            if (
                args
                or kwargs
                or self.disable_adapters
                or self.merged
                or base.weight.requires_grad
                or x.dtype == up.dtype
                or torch.is_autocast_enabled(x.device.type)
            ):
                plain: Tensor = super().forward(x, *args, **kwargs)
                return plain
            # In the input's own shape: where gradients of the input, from here and from the base,
            # met flat, a compiler would add the one inside the other's product, which copies it.
            inner_nr = self.shared_input.inner(self.number, x).flatten(0, -2)
            up_or = (up * self.scaling[ADAPTER]).to(x.dtype)
            if isinstance(base, Float8Linear):
                found: Tensor = base(x, inner_nr, up_or)
                return found
            output_no: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
                x.flatten(0, -2), base.weight, inner_nr, up_or
            )
            if base.bias is not None:
                output_no = output_no + base.bias
            return output_no.view(*x.shape[:-1], base.out_features)

    return AdaptedLinear


def make_linear(target: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Make PEFT's module for ``target``; None where PEFT knows better how its weights are kept."""
    if type(target) not in (nn.Linear, Float8Linear):
        return None
    return linear_class()(target, *args, **kwargs)


def share_inputs(model: nn.Module) -> None:
    """Let the layers of ``model`` that :func:`make_linear` made read what they share once."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, linear_class()):
            parent, _, own = name.rpartition(".")
            groups.setdefault((parent, input_name(own)), []).append(module)
    for layers in groups.values():
        SharedInput(layers)
    # As for FP8: compiled layers are cached as what they were traced to.
    functorch.autograd_cache_allow_custom_autograd_functions = True


def forget(model: nn.Module) -> None:
    """Let go of what layers of ``model`` hold of a forward pass that ended between two of them."""
    for module in model.modules():
        if isinstance(shared := getattr(module, "shared_input", None), SharedInput):
            shared.forget()
