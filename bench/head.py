"""The head's loss three ways: milliseconds, memory, and how far its gradients are from fp32's.

    PYTHONPATH=src python bench/head.py

The 7B's vocabulary and width, forward and backward; once with targets as unlikely as an untrained
model's, once with likely ones. One JSON line a case. Needs a GPU and cut-cross-entropy.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sevenfold.base.console import print_raw
from sevenfold.objective.linear_cross_entropy import negative_log_likelihood

VOCABULARY, WIDTH, SPREAD, REPEATS = 50_304, 4096, 0.0078, 12
# What a gradient is divided by in training: the tokens of a step.
TOKENS_PER_STEP = 131_072
# How far hidden states lie towards their targets' rows: a loss of about 6.4.
TOWARDS_TARGET = 8 * 1.15 / (SPREAD * 64)


def kernels() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return what is compared: hidden states, weights and targets to scores."""
    from cut_cross_entropy import linear_cross_entropy

    def unfiltered(hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor) -> Tensor:
        scores: Tensor = linear_cross_entropy(
            hidden_nh, weight_vh, targets_n, reduction="none", filter_eps=None
        )
        return scores.float()

    return {
        "cce": lambda *inputs: negative_log_likelihood(*inputs, kernel="cce"),
        "cce, unfiltered": unfiltered,
        "chunked": lambda *inputs: negative_log_likelihood(*inputs, kernel="chunked"),
    }


def exact(hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor) -> tuple[float, list[Tensor]]:
    """Return the mean loss and the summed loss's gradients, in fp32."""
    inputs = [tensor.detach().float() for tensor in (hidden_nh, weight_vh)]
    probabilities_nv = (inputs[0] @ inputs[1].t()).softmax(-1)
    places = torch.arange(len(targets_n), device=targets_n.device), targets_n
    loss = -float(probabilities_nv[places].log().mean())
    probabilities_nv[places] -= 1
    return loss, [probabilities_nv @ inputs[1], probabilities_nv.t() @ inputs[0]]


def measure(score: Callable[[], Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """Return the median milliseconds of forward and backward, and the GiB they need beyond."""
    lying, times = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(REPEATS):
        for tensor in tensors:
            tensor.grad = None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        (score().sum() / TOKENS_PER_STEP).backward()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - lying) / 2**30


def case(positions: int, *, likely: bool) -> list[dict[str, Any]]:
    """Measure all kernels on one input."""
    torch.manual_seed(0)
    drawn = torch.randn(VOCABULARY, WIDTH, device="cuda") * SPREAD
    weight_vh = drawn.bfloat16().requires_grad_()
    targets_n = torch.randint(VOCABULARY, (positions,), device="cuda")
    hidden = torch.randn(positions, WIDTH, device="cuda")
    if likely:
        hidden += weight_vh.detach()[targets_n].float() * TOWARDS_TARGET
    hidden_nh = hidden.bfloat16().requires_grad_()
    loss, wanted = exact(hidden_nh, weight_vh, targets_n)
    found = []
    for name, kernel in kernels().items():
        tensors = [hidden_nh, weight_vh]
        hidden_nh.grad = weight_vh.grad = None

        def score(kernel: Any = kernel) -> Tensor:
            scores: Tensor = kernel(hidden_nh, weight_vh, targets_n)
            return scores

        milliseconds, memory_gib = measure(score, tensors)
        errors = [
            float((tensor.grad.float() * TOKENS_PER_STEP - right).norm() / right.norm())
            for tensor, right in zip(tensors, wanted, strict=True)
            if tensor.grad is not None
        ]
        row = {"kernel": name, "positions": positions, "loss": round(loss, 2)}
        row |= {"ms": round(milliseconds, 2), "gib": round(memory_gib, 2)}
        found.append(
            row | {"error_hidden": round(errors[0], 4), "error_weight": round(errors[1], 4)}
        )
    return found


def main() -> None:
    """Measure both inputs at both sizes."""
    for likely in (False, True):
        for positions in (4096, 8192):
            for row in case(positions, likely=likely):
                print_raw(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
