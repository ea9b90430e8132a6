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
from sevenfold.model import float8
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
    scorer: nn.Module,
    batch: Batch,
    *,
    beta: float,
    nll_weight: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> SummedLoss:
    """Raise chosen above rejected answers, relative to the reference model.

    Each pair adds its ``loss`` and ``nll_weight`` times the chosen answer's mean negative
    log-likelihood; a single answer adds only the latter. ``length_normalized`` compares gains per
    token instead of per answer in the loss; rewards stay as they are.

    Returns:
        total []: nats, summed over examples; extras as :func:`_metrics`.
    Source:
        Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); the added likelihood term: Pang et al.
        2024 (arXiv:2404.19733).
    """
    assert batch.examples_bs is not None
    assert batch.reference_bs2 is not None
    logps_bs2, counts_bs2 = answer_scores(scorer(batch), batch)
    gain_bs2 = logps_bs2 - batch.reference_bs2
    mean_gain_bs2 = gain_bs2 / counts_bs2.clamp(min=1)
    compared_bs2 = mean_gain_bs2 if length_normalized or loss == "ipo" else gain_bs2
    pair_loss_bs = pair_loss(
        compared_bs2[..., 0] - compared_bs2[..., 1],
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    is_pair = (batch.examples_bs == PAIR).to(gain_bs2.dtype)
    is_example = is_pair + (batch.examples_bs == ANSWER).to(gain_bs2.dtype)
    nll_bs = -logps_bs2[..., 0] / counts_bs2[..., 0].clamp(min=1)
    loss_bs = pair_loss_bs * is_pair + nll_weight * nll_bs * is_example
    return SummedLoss(
        total=loss_bs.sum(),
        extras=_metrics(gain_bs2.detach(), mean_gain_bs2.detach(), is_pair, beta),
    )


def pair_loss(delta_bs: Tensor, *, loss: str, beta: float, label_smoothing: float) -> Tensor:
    """Return what each pair costs, from the chosen answer's gain less the rejected one's [b, s].

    ``label_smoothing`` is the share of pairs believed to be the wrong way round: ``sigmoid``
    expects it, ``robust`` takes its effect out of the mean.

    Source:
        sigmoid: Rafailov et al. 2023, eq. 7; with smoothing: Mitchell 2023, "A note on DPO with
        noisy preferences", eq. 3; robust: Chowdhury et al. 2024, eq. 12 (arXiv:2403.00409); hinge:
        Zhao et al. 2023 (arXiv:2305.10425) on DPO's margin; ipo: Azar et al. 2023, eq. 17
        (arXiv:2310.12036), on gains per token, with beta as its tau.
    """
    margin_bs = beta * delta_bs
    if loss == "ipo":
        return (delta_bs - 1 / (2 * beta)).square()
    if loss == "hinge":
        return functional.relu(1 - margin_bs)
    right_bs = -functional.logsigmoid(margin_bs)
    if not label_smoothing:
        return right_bs
    wrong_bs = -functional.logsigmoid(-margin_bs)
    if loss == "robust":
        unmixed_bs = (1 - label_smoothing) * right_bs - label_smoothing * wrong_bs
        return unmixed_bs / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_bs + label_smoothing * wrong_bs


def _metrics(
    gain_bs2: Tensor, mean_gain_bs2: Tensor, is_pair: Tensor, beta: float
) -> dict[str, Tensor]:
    """Return what is worth knowing about the pairs, summed over them; ``pairs`` is their number.

    ``reward_chosen`` and ``reward_rejected`` are the implicit rewards, beta times the gain over the
    reference; ``margin`` their difference, ``accuracy`` how often it is above 0. ``kl`` is the
    gain per token of both answers with the sign changed: the divergence of reference from policy
    in nats per token, as far as the reference would have written these answers.
    """
    rewards = beta * gain_bs2
    margins = beta * (gain_bs2[..., 0] - gain_bs2[..., 1]) * is_pair
    return {
        "accuracy": ((margins > 0) * is_pair).sum(),
        "margin": margins.sum(),
        "reward_chosen": (rewards[..., 0] * is_pair).sum(),
        "reward_rejected": (rewards[..., 1] * is_pair).sum(),
        "kl": (-mean_gain_bs2.mean(-1) * is_pair).sum(),
        "pairs": is_pair.sum(),
    }


def preference_objective(
    *,
    beta: float,
    nll_weight: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Objective:
    """Return the objective with these settings (:func:`summed_preference_loss`)."""
    total = functools.partial(
        summed_preference_loss,
        beta=beta,
        nll_weight=nll_weight,
        loss=loss,
        label_smoothing=label_smoothing,
        length_normalized=length_normalized,
    )
    return Objective(weigh=count_examples, total=total)


def input_magnitudes(
    scorer: nn.Module,
    rows: PackedPreferences,
    *,
    num_rows: int,
    micro_batch: int,
    device: torch.device,
    autocast: AbstractContextManager[Any],
) -> NDArray[np.float32] | None:
    """Return the largest magnitudes [inputs] that FP8 has to cast in some rows; None without FP8.

    Seen by passes as training does them, that of the first rows often enough for its scales.
    """
    scorer.train()
    for _ in range(float8.ROUNDS):
        float8.begin_step(scorer)
        for start in range(0, min(num_rows, rows.num_rows), micro_batch):
            indices = np.arange(start, min(start + micro_batch, rows.num_rows))
            batch = rows.batch(indices, rows.row_length).to(device)
            with autocast:
                scorer(batch)
        float8.end_step(scorer)
    found = float8.inputs_of_last_step(scorer)
    float8.forget_history(scorer)
    return None if found is None else found.cpu().numpy()


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
