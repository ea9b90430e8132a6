"""Rows for benchmarks have the lengths that the documentation says."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from sevenfold.data.random_rows import random_conversations, random_preferences


def test_pairs_are_as_long_as_ultrafeedbacks() -> None:
    found = random_preferences(2_000_000, 2048, vocab_size=9, seed=7, share_prompts=True)
    pairs = found.preferences
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    assert statistics.median(lengths) == pytest.approx(900, rel=0.03)
    assert sum(len(p.prompt) for p in pairs) / sum(lengths) == pytest.approx(1 / 3, abs=0.02)
    again = random_preferences(2_000_000, 2048, vocab_size=9, seed=7, share_prompts=True)
    assert again.preferences == pairs


def test_conversations_fill_their_rows() -> None:
    found = random_conversations(2_000_000, 2048, vocab_size=9, seed=7)
    assert statistics.median(len(p.ids) for p in found.pieces) == pytest.approx(330, rel=0.05)
    assert found.fill > 0.99


def test_rows_of_two_contexts_hold_the_same_pairs_with_a_third_of_the_padding() -> None:
    told = {"vocab_size": 9, "seed": 7, "share_prompts": True, "longest": 2048}
    short, long = (
        random_preferences(2_000_000, length, packing="tight", **told)  # type: ignore[arg-type]
        for length in (2048, 4096)
    )
    assert long.preferences == short.preferences
    assert 1 - long.fill < (1 - short.fill) / 3
    rows = long.batch(np.arange(long.num_rows), 4096)
    assert int(rows.positions_bt.max()) < 2048
