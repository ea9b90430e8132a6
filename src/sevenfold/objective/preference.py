"""Prefer the chosen answer over the rejected one: direct preference optimisation.

Shapes: b rows, t tokens, s examples in a row, 2 answers: chosen, rejected.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sevenfold.data.batches import ANSWER, PAIR, Batch
from sevenfold.data.packing import PackedPreferences
from sevenfold.objective.next_token import Objective, SummedLoss


def answer_scores(scores_bt: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum log-probabilities answer by answer.

    Shapes:
        scores_bt [b, t]: negative log-likelihood in nats.

    Returns:
        log-probability [b, s, 2] in nats summed over each answer's tokens, and their number.
    """
    assert batch.answers_bt is not None
    assert batch.examples_bs is not None
    num_rows, num_examples = batch.examples_bs.shape
    slots_bt = torch.where(batch.answers_bt < 0, 2 * num_examples, batch.answers_bt)
    empty = scores_bt.new_zeros(num_rows, 2 * num_examples + 1)
    summed = empty.scatter_add(1, slots_bt, -scores_bt)[:, :-1]
    counted = empty.scatter_add(1, slots_bt, torch.ones_like(scores_bt))[:, :-1]
    shape = (num_rows, num_examples, 2)
    return summed.view(shape), counted.view(shape)


def count_examples(batch: Batch) -> float:
    """Number of pairs and single answers."""
    assert batch.examples_bs is not None
    return float((batch.examples_bs > 0).sum())


def summed_preference_loss(
    scorer: nn.Module, batch: Batch, *, beta: float, nll_weight: float
) -> SummedLoss:
    """Raise chosen above rejected answers, relative to the reference model.

    Each pair adds -log sigmoid(beta * margin) and ``nll_weight`` times the chosen answer's mean
    negative log-likelihood; a single answer adds only the latter.

    Returns:
        total []: nats, summed over examples; extras: ``accuracy`` and ``margin`` summed over
        pairs, and ``pairs``.
    Source:
        Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); the added likelihood term: Pang et al.
        2024 (arXiv:2404.19733).
    """
    assert batch.examples_bs is not None
    assert batch.reference_bs2 is not None
    logps_bs2, counts_bs2 = answer_scores(scorer(batch), batch)
    gain_bs2 = logps_bs2 - batch.reference_bs2
    margin_bs = beta * (gain_bs2[..., 0] - gain_bs2[..., 1])
    is_pair = (batch.examples_bs == PAIR).to(margin_bs.dtype)
    is_example = is_pair + (batch.examples_bs == ANSWER).to(margin_bs.dtype)
    nll_bs = -logps_bs2[..., 0] / counts_bs2[..., 0].clamp(min=1)
    loss_bs = -functional.logsigmoid(margin_bs) * is_pair + nll_weight * nll_bs * is_example
    margins = margin_bs.detach() * is_pair
    return SummedLoss(
        total=loss_bs.sum(),
        extras={
            "accuracy": ((margins > 0) * is_pair).sum(),
            "margin": margins.sum(),
            "pairs": is_pair.sum(),
        },
    )


def preference_objective(*, beta: float, nll_weight: float) -> Objective:
    """Return the objective with these two weights."""
    total = functools.partial(summed_preference_loss, beta=beta, nll_weight=nll_weight)
    return Objective(weigh=count_examples, total=total)


@torch.no_grad()
def reference_scores(
    scorer: nn.Module,
    rows: PackedPreferences,
    *,
    micro_batch: int,
    device: torch.device,
    autocast: AbstractContextManager[Any],
) -> NDArray[np.float32]:
    """Score all answers with the model as it is, in the very packs that training will use.

    Returns:
        [n, 2] log-probabilities in nats of chosen and rejected; 0 where there is no rejected one.
    """
    scorer.eval()
    scores = np.zeros((len(rows.preferences), 2), dtype=np.float32)
    for start in range(0, rows.num_rows, micro_batch):
        indices = np.arange(start, min(start + micro_batch, rows.num_rows))
        batch = rows.batch(indices, rows.row_length).to(device)
        with autocast:
            found_bs2 = answer_scores(scorer(batch), batch)[0].float().cpu().numpy()
        for found_s2, index in zip(found_bs2, indices.tolist(), strict=True):
            pack = rows.packs[index]
            scores[pack] = found_s2[: len(pack)]
    scorer.train()
    return scores
