"""Several documents to a row: conversations for SFT, pairs of answers for DPO.

Shapes: b rows, t tokens, s examples in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sevenfold.base.errors import UsageError
from sevenfold.data.batches import ANSWER, NO_TARGET, PAIR, Batch
from sevenfold.data.best_fit import Packing, packs_of


@dataclasses.dataclass(frozen=True)
class Piece:
    """One document of a row: its tokens, and which of them carry loss.

    With a ``branch`` above 0 it continues the document before it, at position ``start``, and is
    seen by that branch only.
    """

    ids: Sequence[int]
    mask: Sequence[int]
    branch: int = 0
    start: int = 0


class PackedConversations:
    """SFT rows: whole documents, several to a row, loss where the mask says so."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        row_length: int,
        *,
        pad_id: int,
        seed: int,
        packing: Packing = "drawn",
    ):
        """Pack ``pieces`` into rows of ``row_length`` tokens."""
        self.pieces = pieces
        self.row_length = row_length
        self.pad_id = pad_id
        sizes = [len(piece.ids) for piece in pieces]
        self.packs = packs_of(sizes, row_length, packing=packing, seed=seed)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.packs)

    @property
    def fill(self) -> float:
        """Fraction of all positions that is not padding."""
        used = sum(len(piece.ids) for piece in self.pieces)
        return used / (self.num_rows * self.row_length)

    def batch(self, indices: NDArray[np.int64], length: int) -> Batch:
        """Return the rows; ``length`` must be the row length, since documents stay whole."""
        _require_whole(length, self.row_length)
        rows = [[self.pieces[item] for item in self.packs[i]] for i in indices.tolist()]
        return _lay_out(rows, length, self.pad_id)


def _require_whole(length: int, row_length: int) -> None:
    if length != row_length:
        raise UsageError(
            f"contexts: length {length}, but packed rows have {row_length} tokens; "
            "this stage takes one context length"
        )


def _lay_out(
    rows: Sequence[Sequence[Piece]], length: int, pad_id: int, *, branching: bool = False
) -> Batch:
    shape = (len(rows), length)
    ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, NO_TARGET, dtype=np.int64)
    documents = np.full(shape, -1, dtype=np.int64)
    branches = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        start, number = 0, -1
        for piece in row:
            stop = start + len(piece.ids)
            number += piece.branch == 0
            ids[r, start:stop] = piece.ids
            documents[r, start:stop] = number
            branches[r, start:stop] = piece.branch
            positions[r, start:stop] = np.arange(piece.start, piece.start + len(piece.ids))
            carries = np.asarray(piece.mask[1:], dtype=bool)
            targets[r, start : stop - 1][carries] = ids[r, start + 1 : stop][carries]
            start = stop
    return Batch(
        inputs_bt=torch.from_numpy(ids),
        targets_bt=torch.from_numpy(targets),
        positions_bt=torch.from_numpy(positions),
        documents_bt=torch.from_numpy(documents),
        branches_bt=torch.from_numpy(branches) if branching else None,
    )


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt with its chosen and rejected answer; no rejected one for a plain answer."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    @property
    def pieces(self) -> list[Piece]:
        """The documents of this example: prompt and answer, once or twice."""
        answers = [self.chosen, self.rejected] if self.rejected else [self.chosen]
        return [
            Piece([*self.prompt, *answer], [0] * len(self.prompt) + [1] * len(answer))
            for answer in answers
        ]

    @property
    def branching_pieces(self) -> list[Piece]:
        """The same with the prompt once: its tokens but the last, then a branch for each answer.

        The last one begins both branches, since it has another next token in each.
        """
        shared = len(self.prompt) - 1
        if not (shared and self.rejected):
            return self.pieces
        branches = [
            Piece([self.prompt[-1], *answer], [0] + [1] * len(answer), branch=n, start=shared)
            for n, answer in enumerate((self.chosen, self.rejected), 1)
        ]
        return [Piece(self.prompt[:-1], [0] * shared), *branches]


class PackedPreferences:
    """DPO rows: both answers of a pair stand in one row, several pairs to a row.

    ``share_prompts``: as two branches of one document, else as two documents.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        row_length: int,
        *,
        pad_id: int,
        seed: int,
        packing: Packing = "drawn",
        share_prompts: bool = False,
        reference_n2: NDArray[np.float32] | None = None,
    ):
        """Pack; ``reference_n2`` [n, 2] are the reference model's log-probabilities in nats."""
        self.preferences = preferences
        self.row_length = row_length
        self.pad_id = pad_id
        self.share_prompts = share_prompts
        self.reference_n2 = reference_n2
        sizes = [sum(len(piece.ids) for piece in self._pieces(p)) for p in preferences]
        self.packs = packs_of(sizes, row_length, packing=packing, seed=seed)
        self.examples_per_row = max(map(len, self.packs), default=0)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.packs)

    def _pieces(self, preference: Preference) -> list[Piece]:
        return preference.branching_pieces if self.share_prompts else preference.pieces

    @property
    def fill(self) -> float:
        """Fraction of all positions that is not padding."""
        used = sum(len(piece.ids) for p in self.preferences for piece in self._pieces(p))
        return used / (self.num_rows * self.row_length)

    def batch(self, indices: NDArray[np.int64], length: int) -> Batch:
        """Return the rows with their answers numbered."""
        _require_whole(length, self.row_length)
        packs = [self.packs[i] for i in indices.tolist()]
        rows = [
            [piece for n in pack for piece in self._pieces(self.preferences[n])] for pack in packs
        ]
        laid = _lay_out(rows, length, self.pad_id, branching=self.share_prompts)
        shape = (len(packs), self.examples_per_row)
        kinds = np.zeros(shape, dtype=np.int64)
        reference = np.zeros((*shape, 2), dtype=np.float32)
        answers = np.full((len(packs), length), -1, dtype=np.int64)
        for r, pack in enumerate(packs):
            start = 0
            for s, n in enumerate(pack):
                kinds[r, s] = PAIR if self.preferences[n].rejected else ANSWER
                if self.reference_n2 is not None:
                    reference[r, s] = self.reference_n2[n]
                side = 0
                for piece in self._pieces(self.preferences[n]):
                    answers[r, start : start + len(piece.ids)] = 2 * s + side
                    side += any(piece.mask)
                    start += len(piece.ids)
        answers[laid.targets_bt.numpy() == NO_TARGET] = -1
        return dataclasses.replace(
            laid,
            answers_bt=torch.from_numpy(answers),
            examples_bs=torch.from_numpy(kinds),
            reference_bs2=torch.from_numpy(reference),
        )
