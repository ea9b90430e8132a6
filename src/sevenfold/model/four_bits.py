"""A frozen base in four bits (NF4), so that an adapter trains on a small GPU: QLoRA.

bitsandbytes keeps 64 weights as indices into 16 values of a normal distribution, with one scale,
itself in 8 bits: 0.516 bytes a weight. Each product makes its weights anew in the compute type.

Source:
    Dettmers et al. 2023, QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

from sevenfold.base.errors import UsageError, install_command

log = logging.getLogger(__name__)

INSTALL = install_command("qlora")


def require_four_bits() -> Any:
    """Return bitsandbytes, which takes seconds to import.

    Errors:
        UsageError: it is not installed; with the command that does it.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UsageError(
            f"lora.base nf4 needs bitsandbytes ({error}); install it with {INSTALL}, or set "
            "lora.base=full"
        ) from error


@torch.no_grad()
def freeze_in_four_bits(model: Any, device: torch.device, compute_dtype: torch.dtype) -> float:
    """Replace the layers' linear modules by frozen ones of four bits, and move all to ``device``.

    One module at a time, so that a model may lie in main memory that would not fit beside its copy.
    The head and the embedding stay as they are.

    Returns:
        how far the weights are off now: root of the summed squares, as a share of the weights'.
    Errors:
        UsageError: bitsandbytes is not installed.
    """
    bnb = require_four_bits()
    head = model.get_output_embeddings()
    error = size = 0.0
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or linear is head:
            continue
        exact = linear.weight.detach()
        small = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        small.weight = bnb.nn.Params4bit(exact.clone(), requires_grad=False, quant_type="nf4")
        small.bias = linear.bias
        small.to(device)
        found = bnb.functional.dequantize_4bit(small.weight.data, small.weight.quant_state)
        difference = found.float() - exact.to(device).float()
        error += float(difference.square().sum())
        size += float(exact.float().square().sum())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, small)
    model.to(device)
    model.is_loaded_in_4bit = True  # which PEFT asks for
    log.info("nf4: weights are %.1f %% off", 100 * (error / size) ** 0.5)
    return float((error / size) ** 0.5)
