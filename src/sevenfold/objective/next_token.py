"""Predict the next token: pretraining, SFT and LoRA.

An objective is two functions: ``weigh(batch)`` counts what carries loss, ``total(scorer, batch)``
returns the loss summed over it. The training loop divides by the weight of the whole global batch.

Shapes: b rows, t tokens, h hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sevenfold.data.batches import NO_TARGET, Batch
from sevenfold.model.attention import layer_masks
from sevenfold.objective.linear_cross_entropy import negative_log_likelihood


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummedLoss:
    """``total`` []: loss in nats, summed; ``extras``: named sums over the same things []."""

    total: Tensor
    extras: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a stage minimises."""

    weigh: Callable[[Batch], float]
    total: Callable[[nn.Module, Batch], SummedLoss]


class Scorer(nn.Module):
    """A causal language model that answers with the negative log-likelihood of each target.

    With a ``neftune_noise_alpha`` its embeddings are noisy while it trains (:func:`add_noise`).
    """

    def __init__(self, model: nn.Module, *, kernel: str):
        """Wrap a causal model of transformers or PEFT; ``kernel`` as in linear_cross_entropy."""
        super().__init__()
        self.model = model
        self.kernel = kernel
        self.neftune_noise_alpha = 0.0

    @property
    def causal_model(self) -> Any:
        """The transformers model, with adapters in place where there are some."""
        inner: Any = self.model
        return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

    def forward(self, batch: Batch) -> Tensor:
        """Return [b, t] in nats, 0 where there is no target."""
        causal = self.causal_model
        inputs = {"input_ids": batch.inputs_bt}
        if self.training and self.neftune_noise_alpha:
            embedded_bth = causal.get_input_embeddings()(batch.inputs_bt)
            noisy_bth = add_noise(embedded_bth, batch.documents_bt, self.neftune_noise_alpha)
            inputs = {"inputs_embeds": noisy_bth}
        hidden_bth = causal.get_decoder()(
            **inputs,
            position_ids=batch.positions_bt,
            attention_mask=layer_masks(
                causal.config, batch.documents_bt, batch.branches_bt, batch.positions_bt
            ),
            use_cache=False,
        ).last_hidden_state
        hidden_nh, targets_n = hidden_bth.flatten(0, 1), batch.targets_bt.flatten()
        head_vh, places = causal.get_output_embeddings().weight, batch.scored_n
        if places is None:
            scores_n = negative_log_likelihood(hidden_nh, head_vh, targets_n, kernel=self.kernel)
            return scores_n.view_as(batch.targets_bt)
        found = negative_log_likelihood(
            hidden_nh.index_select(0, places), head_vh, targets_n[places], kernel=self.kernel
        )
        scores_n = found.new_zeros(targets_n.shape).index_put((places,), found)
        return scores_n.view_as(batch.targets_bt)


def add_noise(embedded_bth: Tensor, documents_bt: Tensor | None, alpha: float) -> Tensor:
    """Add uniform noise of at most alpha / sqrt(tokens of the document x h) to embeddings.

    Source:
        Jain et al. 2023, NEFTune, algorithm 1 (arXiv:2310.05914); the length is that of each
        document, as if it stood alone in its row.
    """
    num_rows, length, width = embedded_bth.shape
    lengths_bt = embedded_bth.new_full((num_rows, length), length, dtype=torch.float32)
    if documents_bt is not None:
        slots_bt = documents_bt + 1  # padding is document -1
        counts = lengths_bt.new_zeros(num_rows, length + 2)
        counts.scatter_add_(1, slots_bt, torch.ones_like(lengths_bt))
        lengths_bt = counts.gather(1, slots_bt)
    bounds_bt1 = (alpha / (lengths_bt * width).sqrt())[..., None]
    noise_bth = torch.empty_like(embedded_bth, dtype=torch.float32).uniform_(-1, 1)
    return embedded_bth + (noise_bth * bounds_bt1).to(embedded_bth.dtype)


def count_targets(batch: Batch) -> float:
    """Number of tokens that carry loss."""
    return float((batch.targets_bt != NO_TARGET).sum())


def summed_negative_log_likelihood(scorer: nn.Module, batch: Batch) -> SummedLoss:
    """Sum the negative log-likelihood over all targets of the batch."""
    total: Tensor = scorer(batch).sum()
    return SummedLoss(total=total, extras={})


NEXT_TOKEN = Objective(weigh=count_targets, total=summed_negative_log_likelihood)
