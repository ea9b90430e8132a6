"""FP8 training: which layers, with which scales, on which machines.

Ours (``convert_to_float8``): weights cast once a step, delayed scaling of inputs and gradients.
torchao's tensorwise recipe (``convert_with_torchao``): everything cast with its own scale whenever
it is used; the reference, and what sharded weights train with.

The embedding and the head stay as they are: the head's logits need the precision, and the
embedding is no matrix product.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch

from sevenfold.base.errors import UsageError, install_command
from sevenfold.model import many_tensors
from sevenfold.model.float8_linear import (
    DIVISOR,
    E4M3,
    Float8Linear,
    Scaling,
    scale_for,
    transposed,
)
from sevenfold.model.remembered import Remembered

log = logging.getLogger(__name__)

NEEDED_CAPABILITY = (8, 9)
INSTALL = install_command("fp8")
# Steps whose largest magnitude, the largest of all, decides the scale of the next.
# Source: Transformer Engine's delayed scaling recipe, with the length of its tutorial
# (DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, amax_compute_algo="max")).
HISTORY_LENGTH = 16
# Backward passes until scales without a history hold: the first finds those of the layers' outputs,
# whose gradients come along the residual stream, the second those before them, the third all anew.
ROUNDS = 3
# How much larger than what was seen inputs may become before their held scales change.
HELD_ROOM = 2.0
# Layers of a decoder that get the same input.
SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
NAME = "float8"
HISTORY = f"{NAME}.history"


def why_not_float8(*, emulate: bool = False, torchao: bool = False) -> str | None:
    """Return why this machine cannot train in FP8 and what to do about it, or None if it can."""
    if not emulate and not torch.cuda.is_available():
        return (
            "fp8 needs a GPU of compute capability 8.9 or above (H100, H200) and this machine "
            "has none; use --no-fp8"
        )
    if not emulate:
        capability = torch.cuda.get_device_capability()
        if capability < NEEDED_CAPABILITY:
            found = f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
            return (
                f"fp8 needs compute capability 8.9 or above (H100, H200) and {found}; use --no-fp8"
            )
    if not torchao:
        return None
    try:
        importlib.import_module("torchao.float8")
    except ImportError as error:
        return f"fp8_torchao needs torchao ({error}); install it with {INSTALL}, or use --no-fp8"
    return None


def require_float8(*, emulate: bool = False, torchao: bool = False) -> None:
    """Do nothing if this machine can train in FP8.

    Errors:
        UsageError: it cannot; the message says why, and what to install or to use instead.
    """
    if reason := why_not_float8(emulate=emulate, torchao=torchao):
        raise UsageError(reason)


def convert_to_float8(model: nn.Module, *, emulate: bool = False) -> nn.Module:
    """Replace the layers' linear modules by FP8 ones, in place, and return ``model``.

    Call it before compiling, with the weights where they are to be trained. ``emulate`` computes
    the same roundings without FP8 hardware, slowly; it is for tests.

    Errors:
        UsageError: the machine cannot, or no linear module has sides divisible by 16.
    """
    require_float8(emulate=emulate)
    decoder: nn.Module = getattr(model, "get_decoder", lambda: model)()
    linears: list[Float8Linear] = []
    shared: dict[tuple[str, str], Scaling] = {}
    for name in sorted(_chosen(model)):
        parent_name, _, own = name.rpartition(".")
        parent, linear = model.get_submodule(parent_name), model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scaling = shared.setdefault(
            (parent_name, input_name(own)), Scaling(E4M3, linear.weight.device)
        )
        linears.append(Float8Linear(linear, scaling, emulate=emulate))
        setattr(parent, own, linears[-1])
    # Compiled layers are cached as what they were traced to, in which no Python function is left.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    decoder.add_module(NAME, Scalings(linears))
    decoder.register_forward_pre_hook(_refresh)
    _scalings_of.forget()
    log.info("fp8: %d linear layers converted", len(linears))
    return model


def convert_with_torchao(
    model: nn.Module, *, emulate: bool = False, sharded: bool = False
) -> nn.Module:
    """Replace the layers' linear modules by torchao's with its tensorwise recipe, in place.

    Call it before compiling and sharding. Weights that are going to be ``sharded`` by FSDP2 are
    cast where they lie and gathered in FP8.

    Errors:
        UsageError: the machine cannot, or no linear module has sides divisible by 16.
    """
    require_float8(emulate=emulate, torchao=True)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = _chosen(model)
    recipe: Any = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(
        model,
        config=dataclasses.replace(recipe, emulate=emulate, enable_fsdp_float8_all_gather=sharded),
        module_filter_fn=lambda module, name: name in chosen,
    )
    _is_torchaos.forget()
    log.info("fp8: %d linear layers converted with torchao's tensorwise recipe", len(chosen))
    return model


def _chosen(model: nn.Module) -> set[str]:
    chosen = float8_names(model)
    if not chosen:
        raise UsageError(
            f"fp8: no linear layer has both sides divisible by {DIVISOR}; change hidden_size and "
            "intermediate_size, or use --no-fp8"
        )
    return chosen


def input_name(own: str) -> str:
    """Return a name that is the same for modules of one parent that get the same input."""
    return next((min(names) for names in SAME_INPUT if own in names), own)


def float8_names(model: nn.Module) -> set[str]:
    """Return the names of the linear modules that can and should compute in FP8."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and module.in_features % DIVISOR == 0
        and module.out_features % DIVISOR == 0
    }


class Scalings(nn.Module):
    """The scales of all FP8 layers of a model, and what they come from.

    ``history`` holds the largest magnitude of every scaled tensor in the last steps, newest last,
    0 for unknown. It is all that a checkpoint needs: scales follow from it, casts from weights.
    Nothing that follows from something else can be out of date, since before each forward pass
    the versions that PyTorch counts for tensors are compared.
    """

    history: Tensor

    def __init__(self, linears: list[Float8Linear]):
        """Scale ``linears``: their inputs, each once, then their gradients, in this order."""
        super().__init__()
        # In a plain list, so that they do not become modules of this one, too.
        self._linears = linears
        inputs = dict.fromkeys(linear.input_scaling for linear in linears)
        self._scalings = [*inputs, *(linear.gradient_scaling for linear in linears)]
        self._num_inputs = len(inputs)
        self._cast_of: dict[Float8Linear, tuple[int, int, bool]] = {}
        self._scales_of = -1
        self._has_history = False
        self._held: Tensor | None = None
        empty = torch.zeros(len(self._scalings), HISTORY_LENGTH, dtype=torch.float32)
        self.register_buffer("history", empty.to(linears[0].weight.device))

    @property
    def has_history(self) -> bool:
        """False until a step has ended after the rounds before it; asks the device until then."""
        self._has_history = self._has_history or bool(self.history[:, :-ROUNDS].any())
        return self._has_history

    def forget(self) -> None:
        """Have no history."""
        self.history.zero_()
        self._has_history = False

    def begin(self) -> None:
        """Forget the magnitudes noted since the last :meth:`end`: their step was given up."""
        torch._foreach_zero_([scaling.amax for scaling in self._scalings])

    def _noted(self) -> Tensor:
        """Return a step's magnitudes; those that are not finite say nothing."""
        noted = torch.stack([scaling.amax for scaling in self._scalings])
        return torch.where(noted.isfinite(), noted, 0.0)

    @torch.no_grad()
    def agree(self, group: Any) -> None:
        """Note the largest of the magnitudes that the processes of ``group`` have noted."""
        noted = self._noted()
        dist.all_reduce(noted, dist.ReduceOp.MAX, group=group)
        torch._foreach_copy_([scaling.amax for scaling in self._scalings], list(noted.unbind()))

    @torch.no_grad()
    def end(self) -> None:
        """Take a step's magnitudes into the history."""
        noted = self._noted()
        self.history.copy_(torch.cat([self.history[:, 1:], noted[:, None]], dim=1))
        self.begin()

    def hold_inputs(self, amax: Tensor) -> None:
        """See :func:`hold_inputs`."""
        self._held = amax.to(self.history) * HELD_ROOM
        self._scales_of = -1
        for scaling in self._scalings[: self._num_inputs]:
            scaling.held = True

    def inputs_of_last_step(self) -> Tensor:
        """Return the largest magnitudes [inputs] that the last step noted."""
        return self.history[: self._num_inputs, -1].clone()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the scales and cast the weights that have changed since this was done last."""
        if self.history._version != self._scales_of:
            self._set_scales()
            self._scales_of = self.history._version
        present = {linear: _version(linear.weight) for linear in self._linears}
        changed = [
            linear for linear in self._linears if self._cast_of.get(linear) != present[linear]
        ]
        if changed:
            _cast_weights(changed)
            self._cast_of = present

    def _set_scales(self) -> None:
        inputs, gradients = self.history.amax(dim=1).split([self._num_inputs, len(self._linears)])
        kinds = self._scalings[0].dtype, self._scalings[-1].dtype
        parts = (inputs if self._held is None else inputs.maximum(self._held)), gradients
        scales = torch.cat([scale_for(part, kind) for part, kind in zip(parts, kinds, strict=True)])
        for name, values in (("scale", scales), ("inverse", 1 / scales)):
            targets = [getattr(scaling, name) for scaling in self._scalings]
            torch._foreach_copy_(targets, list(values.unbind()))


def _version(weight: Tensor) -> tuple[int, int, bool]:
    return weight.data_ptr(), weight._version, weight.requires_grad


def _cast_weights(linears: list[Float8Linear]) -> None:
    """Cast weights by the scales that they ask for; these are powers of two, so bf16 is exact."""
    weights: list[Tensor] = [linear.weight.detach() for linear in linears]
    scales = scale_for(many_tensors.norms(weights, math.inf), E4M3)
    torch._foreach_copy_([linear.weight_inverse for linear in linears], list((1 / scales).unbind()))
    many_tensors.cast(weights, scales, [linear.weight8 for linear in linears])
    for linear in linears:
        frozen = not linear.weight.requires_grad
        linear.weight8_turned = transposed(linear.weight8) if frozen else None


def _refresh(decoder: nn.Module, _: Any) -> None:
    scalings = getattr(decoder, NAME)
    scalings.refresh()


@Remembered
def _scalings_of(model: nn.Module) -> Scalings | None:
    return next((module for module in model.modules() if isinstance(module, Scalings)), None)


@Remembered
def _is_torchaos(model: nn.Module) -> bool:
    from torchao.float8.float8_linear import Float8Linear as TorchaosLinear

    return any(isinstance(module, TorchaosLinear) for module in model.modules())


def begin_step(model: nn.Module) -> None:
    """Begin the gradients of a step, or begin them again."""
    if scalings := _scalings_of(model):
        scalings.begin()


def agree(model: nn.Module, group: Any) -> None:
    """Let processes with whole weights end a step with the same magnitudes, so the same scales."""
    if scalings := _scalings_of(model):
        scalings.agree(group)


def end_step(model: nn.Module) -> None:
    """Let the next step's scales learn from this one; a step that is given up is not ended."""
    if scalings := _scalings_of(model):
        scalings.end()
    scale_sharded_weights(model)


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrapper of a weight that is gathered in FP8, or ``tensor``."""
    inner: Tensor = getattr(tensor, "_tensor", tensor)
    return inner


def scale_sharded_weights(model: nn.Module) -> None:
    """Compute the scales of all weights that are gathered in FP8, in one exchange.

    To be called whenever weights have changed: they are cast by these until it is called again.
    """
    torchao = sys.modules.get("torchao.float8")  # else nothing was converted with it
    if torchao and _is_torchaos(model):
        torchao.precompute_float8_dynamic_scale_for_fsdp(model)


def forget_history(model: nn.Module) -> None:
    """Start again without scales."""
    if scalings := _scalings_of(model):
        scalings.forget()


def inputs_of_last_step(model: nn.Module) -> Tensor | None:
    """Return the largest magnitudes of inputs [inputs] in the last step; None without our FP8."""
    scalings = _scalings_of(model)
    return None if scalings is None else scalings.inputs_of_last_step()


def hold_inputs(model: nn.Module, amax: Tensor) -> None:
    """Cast inputs by one scale each from now on, with gradients or without.

    It leaves room for twice ``amax`` [inputs]; only where a step sees more, it follows as ever.
    So what is scored without gradients, once, rounds as it does in each later pass.
    """
    if scalings := _scalings_of(model):
        scalings.hold_inputs(amax)


def has_history(model: nn.Module) -> bool:
    """False while a model's scales, if it needs any, come from no whole step."""
    scalings = _scalings_of(model)
    return scalings is None or scalings.has_history
