"""Whether an adapter, switched off, leaves its base alone, and merged says what it says itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sevenfold.base import storage
from sevenfold.model.llama import load_model
from sevenfold.model.lora import load_adapter
from sevenfold.verify.config import ADAPTER_METRICS


@torch.inference_mode()
def adapter_metrics(
    base: Path,
    adapter: Path,
    merged: Path,
    rows: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Return how far the models are apart on ``rows`` of token ids.

    The largest difference of a logit is ``adapter_off_change`` between the base model alone and
    under the switched-off adapter, ``merge_error`` between the adapter and the merged model;
    ``merge_kl`` is the mean divergence of the latter two in nats a token, which tells a rounding
    of bf16 weights from a merge that went wrong.
    """
    inputs = [torch.tensor([list(ids)], device=device) for ids in rows]
    model: Any = load_model(base, dtype, device).eval()
    plain = [model(ids_bt).logits.float().cpu() for ids_bt in inputs]
    known = (base / storage.MANIFEST).is_file()
    fingerprint = storage.read_manifest(base)["fingerprint"] if known else None
    model = load_adapter(model, adapter, base_fingerprint=fingerprint).eval()
    with model.disable_adapter():
        off = [model(ids_bt).logits.float().cpu() for ids_bt in inputs]
    on = [model(ids_bt).logits.float().cpu() for ids_bt in inputs]
    del model
    model = load_model(merged, dtype, device).eval()
    together = [model(ids_bt).logits.float().cpu() for ids_bt in inputs]
    num_logits = sum(logits.numel() for logits in plain)
    values = {
        "adapter_off_change": (_largest_difference(plain, off), num_logits),
        "merge_error": (_largest_difference(on, together), num_logits),
        "merge_kl": (_mean_divergence(on, together), sum(map(len, rows))),
    }
    return {
        name: {
            "value": values[name][0],
            "low": values[name][0],
            "high": values[name][0],
            "n": values[name][1],
            "kind": "measured",
            "confidence": 1.0,
            "better": better,
            "task": None,
            "seconds": 0.0,
        }
        for name, better in ADAPTER_METRICS.items()
    }


def _largest_difference(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]
) -> float | None:
    """Return the largest absolute difference; None if there is nothing, or one is not finite."""
    largest = [(a - b).abs().max() for a, b in zip(first, second, strict=True)]
    # torch's max keeps NaN, Python's would lose it.
    value = float(torch.stack(largest).max()) if largest else math.nan
    return value if math.isfinite(value) else None


def _mean_divergence(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float | None:
    """Return the mean KL divergence over all tokens, in nats; None as above."""
    divergences = []
    for a_btv, b_btv in zip(first, second, strict=True):
        a, b = a_btv.double().log_softmax(-1), b_btv.double().log_softmax(-1)
        divergences.append((a.exp() * (a - b)).sum(-1).flatten())
    value = float(torch.cat(divergences).mean()) if divergences else math.nan
    return value if math.isfinite(value) else None
