"""Log-probabilities of target tokens, without ever holding all logits at once.

Shapes: n positions, h hidden size, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_POSITIONS = 2048


def negative_log_likelihood(
    hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, *, kernel: str
) -> Tensor:
    """Score each position's target.

    Shapes:
        hidden_nh [n, h]; weight_vh [v, h]; targets_n [n], -100 where nothing is to be predicted.

    Returns:
        [n] in nats, fp32, 0 where the target is -100.

    ``kernel`` is ``plain`` (skips ignored positions: dynamic shapes, for a CPU), ``chunked``
    (compiled, logits of 2,048 positions at a time, recomputed in backward) or ``cce``
    (cut-cross-entropy's kernel, never writes logits).
    """
    if kernel == "cce":
        return _cut_cross_entropy()(hidden_nh, weight_vh, targets_n, reduction="none").float()
    if kernel == "chunked":
        score = _compiled_score()
        parts = [
            checkpoint(score, hidden, weight_vh, targets, use_reentrant=False)
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


@functools.cache
def _compiled_score() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(_score)
    return compiled


@functools.cache
def _cut_cross_entropy() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    kernel: Callable[..., Tensor] = linear_cross_entropy
    return kernel
