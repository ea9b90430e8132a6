"""Log-probabilities of target tokens, from hidden states and the head's weights.

Shapes: n positions, h hidden size, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100
# 0.8 GB of logits in bf16 for a vocabulary of 50,304: one chunk of the 7B's largest micro-batch.
CHUNK_POSITIONS = 8192


def negative_log_likelihood(
    hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, *, kernel: str
) -> Tensor:
    """Score each position's target.

    Shapes:
        hidden_nh [n, h]; weight_vh [v, h]; targets_n [n], -100 where nothing is to be predicted.

    Returns:
        [n] in nats, fp32, 0 where the target is -100.

    ``kernel`` is ``plain`` (skips ignored positions: dynamic shapes, for a CPU), ``chunked``
    (compiled, logits of 8,192 positions at a time, which are kept and turned into their own
    gradients) or ``cce`` (cut-cross-entropy's kernel: never writes logits, computes them twice, and
    leaves out gradients below 2**-12 where a block has no larger one).
    """
    if kernel == "cce":
        scores_n: Tensor = _cut_cross_entropy()(hidden_nh, weight_vh, targets_n, reduction="none")
        return scores_n.float()
    if kernel == "chunked":
        parts = [
            _KeptLogits.apply(hidden, weight_vh, targets)  # type: ignore[no-untyped-call]
            for hidden, targets in zip(
                hidden_nh.split(CHUNK_POSITIONS), targets_n.split(CHUNK_POSITIONS), strict=True
            )
        ]
        return torch.cat(parts)
    wanted = (targets_n != IGNORED).nonzero().squeeze(1)
    scores = hidden_nh.new_zeros(targets_n.shape, dtype=torch.float32)
    return scores.index_put((wanted,), _score(hidden_nh[wanted], weight_vh, targets_n[wanted]))


def _score(hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor) -> Tensor:
    logits_nv = functional.linear(hidden_nh, weight_vh).float()
    return functional.cross_entropy(logits_nv, targets_n, ignore_index=IGNORED, reduction="none")


class _KeptLogits(torch.autograd.Function):
    """The score of each target; in the backward pass the logits give way to their gradients.

    Nothing is computed twice: three matrix products, and one pass over the logits in each
    direction. What is kept is in the products' precision.
    """

    @staticmethod
    def forward(ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor) -> Tensor:
        logits_nv = functional.linear(hidden_nh, weight_vh)
        scores_n: Tensor
        scores_n, log_sums_n = _compiled(_scores)(logits_nv, targets_n)
        ctx.save_for_backward(hidden_nh, weight_vh, targets_n, logits_nv, log_sums_n)
        return scores_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_n: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_nh, weight_vh, targets_n, logits_nv, log_sums_n = ctx.saved_tensors
        _compiled(_turn_into_gradient)(logits_nv, log_sums_n, targets_n, gradient_n)
        kind = logits_nv.dtype
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            hidden_gradient = (logits_nv @ weight_vh.to(kind)).to(hidden_nh.dtype)
        if ctx.needs_input_grad[1]:
            weight_gradient = (logits_nv.t() @ hidden_nh.to(kind)).to(weight_vh.dtype)
        return hidden_gradient, weight_gradient, None


def _scores(logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of each target [n], and the logarithm of each sum of exponentials [n]."""
    wide_nv = logits_nv.float()
    log_sums_n = wide_nv.logsumexp(dim=-1)
    aimed_at_n = wide_nv.gather(1, targets_n.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(targets_n == IGNORED, 0.0, log_sums_n - aimed_at_n), log_sums_n


def _turn_into_gradient(
    logits_nv: Tensor, log_sums_n: Tensor, targets_n: Tensor, gradient_n: Tensor
) -> None:
    """Put the gradients of the logits into their place, given the gradients of the scores."""
    probabilities_nv = (logits_nv.float() - log_sums_n[:, None]).exp()
    is_target_nv = torch.arange(logits_nv.shape[1], device=logits_nv.device) == targets_n[:, None]
    factors_n = torch.where(targets_n == IGNORED, 0.0, gradient_n)
    logits_nv.copy_((probabilities_nv - is_target_nv.float()) * factors_n[:, None])


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return compiled


@functools.cache
def _cut_cross_entropy() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    kernel: Callable[..., Tensor] = linear_cross_entropy
    return kernel
