"""Which pieces repeat others, and which are held out: decided from a few numbers a piece.

MinHash (rensa) over runs of five words, in bands: two pieces that agree in one whole band are
near-duplicates, as in datatrove and with its numbers (14 bands of 8: half of the pairs of Jaccard
similarity 0.7 are found, 92 % at 0.8). Groups are closed: what repeats a repetition belongs to it.
Of a group one piece stays, a held-out one before those to train on, then the earliest; so nothing
held out has a near-duplicate among what is trained on, and the outcome does not depend on who
computed which numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError

TRAIN, VALIDATION, DUPLICATE, NEAR_DUPLICATE = range(4)
UNDECIDED = -1
NUM_BANDS, BAND_ROWS = 14, 8
SHINGLE_WORDS = 5

_WORD = re.compile(r"\w+")
_SEED = 1
_BATCH_PIECES = 1024
# Odd 64-bit numbers: sums of products with them, modulo 2^64, keep different runs apart.
_FACTORS = np.random.Generator(np.random.PCG64(_SEED)).integers(
    2**63, 2**64 - 1, size=max(SHINGLE_WORDS, BAND_ROWS), dtype=np.uint64
) | np.uint64(1)


class Keys:
    """What is kept of each piece of one shard, in order; see :func:`decide`."""

    def __init__(self, *, near: bool) -> None:
        """``near``: also compute what near-duplicates are found by."""
        self._exact: list[bytes] = []
        self._fractions: list[float] = []
        self._given: list[int] = []
        self._signatures: list[list[int]] = []
        self._bands: list[NDArray[np.uint64]] = []
        self._sign = signer() if near else None

    def add(self, text: str, fraction: float, split: str | None) -> None:
        """Note one piece; ``split`` where its source says what is held out."""
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
        self._exact.append(digest[:16])
        self._fractions.append(fraction)
        self._given.append({"train": TRAIN, "validation": VALIDATION}.get(str(split), UNDECIDED))
        if self._sign is not None:
            self._signatures.append(self._sign(text))
            if len(self._signatures) == _BATCH_PIECES:
                self._put_into_bands()

    def write(self, folder: Path) -> None:
        """Write the numbers into ``folder``."""
        exact = np.frombuffer(b"".join(self._exact), np.uint64).reshape(-1, 2).T
        storage.write_array(folder / "exact.npy", np.ascontiguousarray(exact))
        storage.write_array(folder / "fractions.npy", np.array(self._fractions, np.float64))
        storage.write_array(folder / "given.npy", np.array(self._given, np.int8))
        if self._sign is not None:
            self._put_into_bands()
            storage.write_array(folder / "bands.npy", np.concatenate(self._bands, axis=1))

    def _put_into_bands(self) -> None:
        """Keep 112 bytes of each signature instead of 112 numbers of Python's."""
        self._bands.append(bands(self._signatures))
        self._signatures = []


def signer() -> Callable[[str], list[int]]:
    """Return what computes a text's MinHash signature."""
    from rensa import RMinHash

    num_hashes = NUM_BANDS * BAND_ROWS

    def sign(text: str) -> list[int]:
        shingles = hash_shingles(text, RMinHash.hash_token_sets)
        offsets = np.array([0, len(shingles)], np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, num_hashes, _SEED)
        signature: list[int] = matrix.to_rows()[0]
        return signature

    return sign


def hash_shingles(text: str, hash_words: Callable[[list[list[str]]], Any]) -> NDArray[np.uint64]:
    """Return one number for each run of five words, case and punctuation aside.

    A shorter text has one run; one without a word is its own.
    """
    words = _WORD.findall(text.lower()) or [text]
    hashes = np.array(hash_words([words])[0], np.uint64)
    count = min(SHINGLE_WORDS, len(hashes))
    num_runs = len(hashes) - count + 1
    runs = np.zeros(num_runs, np.uint64)
    for place in range(count):
        runs += hashes[place : place + num_runs] * _FACTORS[place]
    return runs


def bands(signatures: Sequence[Sequence[int]]) -> NDArray[np.uint64]:
    """Return one number a band and piece, [bands, pieces]."""
    rows = np.array(signatures, np.uint64).reshape(-1, NUM_BANDS, BAND_ROWS)
    return np.ascontiguousarray((rows * _FACTORS[:BAND_ROWS]).sum(axis=2, dtype=np.uint64).T)


def decide(
    folders: Sequence[Path],
    *,
    validation_fraction: float,
    deduplicate: Literal["none", "exact", "minhash"],
) -> list[NDArray[np.uint8]]:
    """Return what becomes of each piece of each folder of :class:`Keys`.

    A piece is held out if its source says so, else if the number drawn from its text is below
    ``validation_fraction``; if that leaves none, the text with the lowest number is.

    Some 85 bytes a piece are held at a time, one band after the other.

    Errors:
        BadDataError: there is nothing for one of the two splits.
    """
    fractions = _joined(folders, "fractions.npy")
    given = _joined(folders, "given.npy")
    fates = np.where(given == UNDECIDED, fractions < validation_fraction, given).astype(np.uint8)
    if deduplicate != "none":
        order = np.argsort(fates != VALIDATION, kind="stable")
        copies = _repetitions(folders, order, near=deduplicate == "minhash")
        fates[order[copies != 0]] = copies[copies != 0]
    if not (fates == VALIDATION).any() and ((fates == TRAIN) & (given == UNDECIDED)).any():
        drawn = np.where((fates == TRAIN) & (given == UNDECIDED), fractions, np.inf)
        fates[drawn == drawn.min()] = VALIDATION  # with its copies, where these are kept
    num_train, num_held_out = (int((fates == split).sum()) for split in (TRAIN, VALIDATION))
    if not num_train or not num_held_out:
        raise BadDataError(
            f"{num_train + num_held_out} documents are left after cleaning, {num_train} to train "
            "on; at least one must train and one be held out; give more text or loosen 'clean'"
        )
    sizes = [len(_read(folder / "given.npy")) for folder in folders]
    return np.split(fates, np.cumsum(sizes)[:-1])


def _repetitions(folders: Sequence[Path], order: NDArray[np.intp], *, near: bool) -> Any:
    """Return for the pieces in ``order`` 0, or DUPLICATE or NEAR_DUPLICATE of one before it."""
    high, low = (_joined(folders, "exact.npy", row)[order] for row in (0, 1))
    first = _first_alike(np.lexsort((low, high)), high, low)
    del high, low
    copies = np.where(first < np.arange(len(order)), DUPLICATE, 0).astype(np.uint8)
    if not near:
        return copies
    for band in range(NUM_BANDS):
        join_alike(first, _joined(folders, "bands.npy", band)[order])
    copies[(first < np.arange(len(order))) & (copies == 0)] = NEAR_DUPLICATE
    return copies


def join_alike(first: NDArray[np.int64], column: NDArray[np.uint64]) -> None:
    """Join the groups of pieces with the same number; ``first`` names each group's first piece."""
    _join_groups(first, _first_alike(np.argsort(column, kind="stable"), column))


def _first_alike(ascending: NDArray[np.intp], *columns: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each piece the first one with the same numbers, given a stable sorting."""
    starts = np.zeros(len(ascending), bool)
    starts[:1] = True
    for column in columns:
        ordered = column[ascending]
        starts[1:] |= ordered[1:] != ordered[:-1]
    first = np.empty(len(ascending), np.int64)
    first[ascending] = ascending[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first


def _join_groups(first: NDArray[np.int64], alike: NDArray[np.int64]) -> None:
    """Join the groups of each piece and the one it is alike; ``first`` names each group's first."""
    members = np.flatnonzero(alike != np.arange(len(alike)))
    others = alike[members]
    while True:
        mine, theirs = first[members], first[others]
        apart = mine != theirs
        if not apart.any():
            return
        lower, higher = np.minimum(mine, theirs)[apart], np.maximum(mine, theirs)[apart]
        np.minimum.at(first, higher, lower)
        while not np.array_equal(followed := first[first], first):
            first[:] = followed


def _joined(folders: Sequence[Path], name: str, row: int | None = None) -> Any:
    parts = [_read(folder / name) for folder in folders]
    return np.concatenate([part if row is None else part[row] for part in parts])


def _read(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
