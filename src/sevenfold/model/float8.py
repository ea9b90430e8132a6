"""FP8 matrix products for training, with torchao's tensorwise recipe.

Weights, inputs and gradients are cast with one scale per tensor. The embedding and the head stay
as they are: the head's logits need the precision, and the embedding is no matrix product.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from typing import Any

import torch
from torch import nn

from sevenfold.base.errors import UsageError

log = logging.getLogger(__name__)

# The smallest block an FP8 matrix product takes, in elements of either side of the weight.
DIVISOR = 16
NEEDED_CAPABILITY = (8, 9)
INSTALL = "pip install 'sevenfold[fp8]'"


def why_not_float8(*, emulate: bool = False) -> str | None:
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
    try:
        importlib.import_module("torchao.float8")
    except ImportError as error:
        return f"fp8 needs torchao ({error}); install it with {INSTALL}, or use --no-fp8"
    return None


def require_float8(*, emulate: bool = False) -> None:
    """Do nothing if this machine can train in FP8.

    Errors:
        UsageError: it cannot; the message says why, and what to install or to use instead.
    """
    if reason := why_not_float8(emulate=emulate):
        raise UsageError(reason)


def convert_to_float8(model: nn.Module, *, emulate: bool = False) -> nn.Module:
    """Replace the layers' linear modules by FP8 ones, in place, and return ``model``.

    Call it before compiling and sharding. ``emulate`` computes the same roundings without FP8
    hardware, slowly; it is for tests.

    Errors:
        UsageError: the machine cannot, or no linear module has sides divisible by 16.
    """
    require_float8(emulate=emulate)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = float8_names(model)
    if not chosen:
        raise UsageError(
            f"fp8: no linear layer has both sides divisible by {DIVISOR}; change hidden_size and "
            "intermediate_size, or use --no-fp8"
        )
    recipe: Any = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(
        model,
        config=dataclasses.replace(recipe, emulate=emulate),
        module_filter_fn=lambda module, name: name in chosen,
    )
    log.info("fp8: %d linear layers converted", len(chosen))
    return model


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
