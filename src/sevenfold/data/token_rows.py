"""Token ids as they lie in files, and numbered rows of them; files are watched while they are read.

Files are mapped into memory: one that is cut short meanwhile would end the process with a signal,
one that is written over would be trained on. So each is looked at before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.base.errors import BadDataError

AnyArray = NDArray[Any]
State = tuple[int, int]

_CHUNK_ROWS = 2**14
_KEY_TOKENS = 16


@dataclass(frozen=True)
class TokenIds:
    """Flat ids; ``name`` says where they lie, ``files`` what those were before they were read."""

    name: str
    array: AnyArray
    files: Mapping[Path, State]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.array.size

    def read(self, start: int, stop: int) -> AnyArray:
        """Return these tokens.

        Errors:
            BadDataError: a file has changed since it was opened.
        """
        for path, known in self.files.items():
            if state(path) != known:
                raise BadDataError(
                    f"{path}: changed while it was being read; leave the data alone, then run the "
                    "same command again, which looks at every file first"
                )
        return self.array[start:stop]


def watched(name: str, array: AnyArray, files: Mapping[Path, State]) -> TokenIds:
    """Return the ids of ``array``, which is mapped from ``files``, in their :func:`state`."""
    return TokenIds(name, array.reshape(-1), files)


def state(path: Path) -> State:
    """Return by what a change of a file is seen: its size, and when it was last written."""
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


class TokenShards:
    """Numbered rows of token ids that lie one after the other in one or more places."""

    def __init__(self, parts: Sequence[TokenIds], row_length: int, rows: range | None = None):
        """Read ``parts`` one after the other, in rows; ``rows``: only these of them."""
        self.row_length = row_length
        self._parts = parts
        self._starts = np.cumsum([0, *(part.size for part in parts)])
        every = range(int(self._starts[-1]) // row_length)
        self._rows = every if rows is None else rows

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return self.num_rows * self.row_length

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return rows [n, row_length] as int64.

        Errors:
            BadDataError: a file has changed since it was opened.
        """
        found = np.empty((len(indices), self.row_length), dtype=np.int64)
        for place, index in enumerate(indices.tolist()):
            self._copy(self._rows[index] * self.row_length, found[place])
        return found

    def _copy(self, start: int, target: NDArray[np.int64]) -> None:
        """Copy the tokens from ``start`` on, across the ends of parts."""
        done = 0
        while done < len(target):
            number = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            offset = start + done - int(self._starts[number])
            piece = self._parts[number].read(offset, offset + len(target) - done)
            target[done : done + len(piece)] = piece
            done += len(piece)

    def keys(self) -> NDArray[np.uint64]:
        """Return one number a row, equal for equal rows; a few tokens of each are looked at.

        Empty where rows lie across the ends of parts.
        """
        if any(part.size % self.row_length for part in self._parts):
            return np.empty(0, dtype=np.uint64)
        places = np.unique(np.linspace(0, self.row_length - 1, _KEY_TOKENS).astype(np.int64))
        factors = np.random.default_rng(0).integers(1, 2**63, len(places), dtype=np.uint64)
        keys = []
        for part in self._parts:
            table = part.array.reshape(-1, self.row_length)
            for start in range(0, len(table), _CHUNK_ROWS):
                chosen = table[start : start + _CHUNK_ROWS][:, places].astype(np.uint64)
                keys.append((chosen * factors).sum(axis=1, dtype=np.uint64))
        return np.concatenate(keys)[self._rows.start : self._rows.stop]


def repeated_rows(train: TokenShards, held_out: TokenShards) -> tuple[int, list[tuple[int, int]]]:
    """Return how many training rows repeat another, and which held-out rows are training rows.

    Returns:
        the number, and pairs (held-out row, training row).
    """
    train_keys, held_out_keys = train.keys(), held_out.keys()
    distinct, first = np.unique(train_keys, return_index=True)
    rows = np.flatnonzero(np.isin(held_out_keys, distinct))
    others = first[np.searchsorted(distinct, held_out_keys[rows])]
    shared = [
        (row, other)
        for row, other in zip(rows.tolist(), others.tolist(), strict=True)
        if np.array_equal(held_out.rows(np.array([row])), train.rows(np.array([other])))
    ]
    return len(train_keys) - len(distinct), shared
