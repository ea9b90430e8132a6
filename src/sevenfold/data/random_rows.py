"""Rows of random tokens for every kind of stage: what is rehearsed and benchmarked before data.

Never zeros: matrix products of constant data run up to 13 % faster than those of real data.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sevenfold.data.batches import Batch, document_positions
from sevenfold.data.best_fit import Packing
from sevenfold.data.packing import PackedConversations, PackedPreferences, Piece, Preference

# Lengths are log-normal, as in chat data: mean and spread of the logarithm where 2048 tokens are
# the most, and shorter where fewer are. Conversations; prompts; answers. A pair's median is 900
# tokens then, a third of them its prompt, as in UltraFeedback.
REFERENCE_LENGTH = 2048
CONVERSATION, PROMPT, ANSWER = (5.8, 0.8), (5.7, 0.65), (5.6, 0.6)


class RandomRows:
    """Rows of random tokens, for a trial step before there is data."""

    def __init__(self, row_length: int, *, vocab_size: int, documents_per_row: int | None):
        """Serve any number of rows; None for plain causal ones."""
        self.num_rows = 1 << 20
        self.row_length = row_length
        self.vocab_size = vocab_size
        self.documents_per_row = documents_per_row

    def batch(self, indices: NDArray[np.int64], length: int) -> Batch:
        """Return rows that depend on the indices only."""
        pieces = len(indices) * self.row_length // length
        generator = np.random.default_rng(indices.tolist())
        ids = generator.integers(0, self.vocab_size, (pieces, length))
        documents = None
        positions = np.broadcast_to(np.arange(length), ids.shape)
        if self.documents_per_row is not None:
            starts = generator.random(ids.shape) < self.documents_per_row / length
            documents = np.cumsum(starts, axis=1, dtype=np.int64)
            positions = document_positions(documents)
        return Batch(
            inputs_bt=torch.from_numpy(ids),
            targets_bt=torch.from_numpy(np.roll(ids, -1, axis=1)),
            positions_bt=torch.from_numpy(np.ascontiguousarray(positions)),
            documents_bt=None if documents is None else torch.from_numpy(documents),
        )


def random_conversations(
    num_tokens: int,
    row_length: int,
    *,
    vocab_size: int,
    seed: int,
    packing: Packing = "drawn",
    longest: int | None = None,
) -> PackedConversations:
    """Pack conversations of about ``num_tokens`` in all; the second half of each carries loss.

    None has more than ``longest`` tokens; without that a row holds the longest.
    """
    generator = np.random.default_rng(seed)
    bound = longest or row_length
    mean = _typical(CONVERSATION, bound)
    lengths = _lengths(generator, CONVERSATION, max(1, round(num_tokens / mean)), bound)
    lengths = np.minimum(lengths, bound)
    pieces = []
    for length in lengths.tolist():
        ids = generator.integers(0, vocab_size, length).tolist()
        pieces.append(Piece(ids, [0] * (length // 2) + [1] * (length - length // 2)))
    return PackedConversations(pieces, row_length, pad_id=0, seed=seed, packing=packing)


def random_preferences(
    num_tokens: int,
    row_length: int,
    *,
    vocab_size: int,
    seed: int,
    share_prompts: bool,
    packing: Packing = "drawn",
    longest: int | None = None,
) -> PackedPreferences:
    """Pack pairs of answers of about ``num_tokens`` in all.

    None has more than ``longest`` tokens, its prompt counted twice; without that a row holds the
    longest. The reference's log-probabilities are 0: they are read, but decide nothing about speed.
    """
    generator = np.random.default_rng(seed)
    bound = longest or row_length
    typical = 2 * (_typical(PROMPT, bound) + _typical(ANSWER, bound))
    count = max(8, round(num_tokens / typical))
    sizes = [_lengths(generator, kind, count, bound) for kind in (PROMPT, ANSWER, ANSWER)]
    preferences = [
        Preference(*(generator.integers(0, vocab_size, size).tolist() for size in three))
        for three in zip(*(size.tolist() for size in sizes), strict=True)
        if 2 * three[0] + three[1] + three[2] <= bound
    ]
    return PackedPreferences(
        preferences,
        row_length,
        pad_id=0,
        seed=seed,
        packing=packing,
        share_prompts=share_prompts,
    )


def _typical(kind: tuple[float, float], bound: int) -> float:
    """Mean length of a kind of text, in tokens."""
    return float(np.exp(kind[0] + kind[1] ** 2 / 2)) * bound / REFERENCE_LENGTH


def _lengths(
    generator: np.random.Generator, kind: tuple[float, float], count: int, bound: int
) -> NDArray[np.int64]:
    drawn = generator.lognormal(*kind, count) * bound / REFERENCE_LENGTH
    return np.clip(drawn, 2, None).astype(np.int64)
