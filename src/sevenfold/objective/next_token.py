"""Predict the next token: pretraining, SFT and LoRA.

An objective is two functions: ``weigh(batch)`` counts what carries loss, ``total(scorer, batch)``
returns the loss summed over it. The training loop divides by the weight of the whole global batch.

Shapes: b rows, t tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sevenfold.data.batches import NO_TARGET, Batch
from sevenfold.model.attention import document_mask
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
    """A causal language model that answers with the negative log-likelihood of each target."""

    def __init__(self, model: nn.Module, *, kernel: str):
        """Wrap a causal model of transformers or PEFT; ``kernel`` as in linear_cross_entropy."""
        super().__init__()
        self.model = model
        self.kernel = kernel

    @property
    def causal_model(self) -> Any:
        """The transformers model, with adapters in place where there are some."""
        inner: Any = self.model
        return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

    def forward(self, batch: Batch) -> Tensor:
        """Return [b, t] in nats, 0 where there is no target."""
        causal = self.causal_model
        hidden_bth = causal.get_decoder()(
            input_ids=batch.inputs_bt,
            position_ids=batch.positions_bt,
            attention_mask=document_mask(batch.documents_bt, batch.branches_bt),
            use_cache=False,
        ).last_hidden_state
        scores_n = negative_log_likelihood(
            hidden_bth.flatten(0, 1),
            causal.get_output_embeddings().weight,
            batch.targets_bt.flatten(),
            kernel=self.kernel,
        )
        return scores_n.view_as(batch.targets_bt)


def count_targets(batch: Batch) -> float:
    """Number of tokens that carry loss."""
    return float((batch.targets_bt != NO_TARGET).sum())


def summed_negative_log_likelihood(scorer: nn.Module, batch: Batch) -> SummedLoss:
    """Sum the negative log-likelihood over all targets of the batch."""
    total: Tensor = scorer(batch).sum()
    return SummedLoss(total=total, extras={})


NEXT_TOKEN = Objective(weigh=count_targets, total=summed_negative_log_likelihood)


@torch.no_grad()
def mean_loss(scorer: nn.Module, batches: list[Batch]) -> float:
    """Mean negative log-likelihood in nats per target over ``batches``."""
    total = sum(float(scorer(batch).sum()) for batch in batches)
    return total / sum(count_targets(batch) for batch in batches)
