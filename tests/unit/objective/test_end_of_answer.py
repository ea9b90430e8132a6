"""The token that ends an answer is learnt, also where it is the one that pads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sevenfold.data.batches import NO_TARGET
from sevenfold.data.packing import PackedConversations, Piece
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer

EOS = 0
PIECES = [
    Piece([5, 6, 7, 8, EOS], [0, 0, 1, 1, 1]),
    Piece([5, 9, 10, EOS], [0, 0, 1, 1]),
]


def packed() -> Any:
    rows = PackedConversations(PIECES, 16, pad_id=EOS, seed=1)
    return rows.batch(np.array([0]), 16)


@pytest.mark.fault("H08")
def test_the_end_carries_loss_and_padding_does_not() -> None:
    batch = packed()
    targets = batch.targets_bt[0].tolist()
    assert targets.count(EOS) == len(PIECES)
    assert batch.inputs_bt[0, 9:].tolist() == [EOS] * 7
    assert set(targets[8:]) == {NO_TARGET}


@pytest.mark.fault("H08")
def test_a_model_that_learnt_two_answers_by_heart_stops_after_each() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sevenfold.model.attention import IMPLEMENTATION, register_attention

    register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=IMPLEMENTATION,
    )
    scorer = Scorer(LlamaForCausalLM(config), kernel="plain")
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-2)
    for _ in range(60):
        loss = NEXT_TOKEN.total(scorer, packed()).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for piece in PIECES:
        ids = list(piece.ids[:2])
        while len(ids) < 12 and ids[-1] != EOS:
            with torch.no_grad():
                ids.append(int(scorer.causal_model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids == list(piece.ids)
