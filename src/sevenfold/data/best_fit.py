"""Items of different lengths into rows of one length: which goes where, and pretraining's rows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sevenfold.base.errors import UsageError

# How rows of conversations and of pairs are filled: by best_fit in drawn order, or by tight_fit.
Packing = Literal["drawn", "tight"]


def packs_of(
    lengths: Sequence[int], capacity: int, *, packing: Packing, seed: int
) -> list[list[int]]:
    """Return which items share a row of ``capacity`` tokens.

    Errors:
        UsageError: an item is longer than a row.
    """
    fit = tight_fit if packing == "tight" else best_fit
    return fit(lengths, capacity, seed=seed)


def best_fit(lengths: Sequence[int], capacity: int, *, seed: int | None) -> list[list[int]]:
    """Put every item, in an order drawn from ``seed``, into the fullest row that has room for it.

    Without a seed the longest come first, which fills rows best, but makes rows of long items and
    rows of short ones: on the village, DPO batches then held now pairs, now single answers, and
    the same steps ended at a refusal rate of 0.52 instead of above 0.9.
    """
    if seed is None:
        order = np.argsort(-np.asarray(lengths), kind="stable")
    else:
        order = np.random.default_rng(seed).permutation(len(lengths))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for item in order.tolist():
        need = lengths[item]
        _require_fit(item, need, capacity)
        found = bisect.bisect_left(room, (need, -1))
        if found == len(room):
            packs.append([item])
            left, pack = capacity - need, len(packs) - 1
        else:
            left, pack = room.pop(found)
            packs[pack].append(item)
            left -= need
        if left:
            bisect.insort(room, (left, pack))
    return packs


def tight_fit(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Fill row after row: with items in an order drawn from ``seed``, closed with what fits best.

    As long as a row has room for one and a half usual items it takes the next that was drawn; after
    that, and where that one does not fit, the longest of all that are left and still fit. So every
    row begins by chance and none waits for an item that never comes.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    for item in reversed(order):
        _require_fit(item, lengths[item], capacity)
        waiting[lengths[item]].append(item)
    enough = 1.5 * sum(lengths) / max(1, len(lengths))
    placed = [False] * len(lengths)
    drawn = (item for item in order if not placed[item])
    packs: list[list[int]] = []
    following = next(drawn, None)
    while following is not None:
        pack, room = [following], capacity - lengths[following]
        placed[following] = True
        following = next(drawn, None)
        while room:
            if following is not None and enough < room >= lengths[following]:
                chosen: int | None = following
            else:
                chosen = _longest(waiting, room, placed)
            if chosen is None:
                break
            pack.append(chosen)
            placed[chosen] = True
            room -= lengths[chosen]
            if chosen == following:
                following = next(drawn, None)
        packs.append(pack)
    return packs


def _longest(waiting: list[list[int]], room: int, placed: list[bool]) -> int | None:
    """Return an item of the greatest length up to ``room`` that is in no row yet."""
    for items in reversed(waiting[: room + 1]):
        while items and placed[items[-1]]:
            items.pop()
        if items:
            return items[-1]
    return None


def _require_fit(item: int, length: int, capacity: int) -> None:
    if length > capacity:
        raise UsageError(f"item {item} has {length} tokens; a row holds {capacity}")


def fill_rows(
    ids: NDArray[np.unsignedinteger],
    lengths: NDArray[np.int64],
    row_length: int,
    *,
    bos_id: int,
    pad_id: int,
) -> NDArray[np.unsignedinteger]:
    """Pack documents that lie one after the other in ``ids``, longest first; cut what is too long.

    Only documents longer than a row are cut, and every piece begins with ``bos_id``, so that it
    cannot be taken for the end of the document before it; what stays empty is ``pad_id``.

    Shapes:
        ids [n]; lengths [d]; returns [rows, row_length], of the same type.
    Source:
        Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv:2404.10830).
    """
    starts, sizes, continues = _pieces(lengths, row_length)
    packs = best_fit(sizes, row_length, seed=None)
    rows = np.full((len(packs), row_length), pad_id, dtype=ids.dtype)
    for row, pack in zip(rows, packs, strict=True):
        at = 0
        for piece in pack:
            stop = at + sizes[piece]
            if continues[piece]:
                row[at] = bos_id
                at += 1
            row[at:stop] = ids[starts[piece] : starts[piece] + stop - at]
            at = stop
    return rows


def _pieces(lengths: NDArray[np.int64], row_length: int) -> tuple[list[int], list[int], list[bool]]:
    """Return where each piece begins, how much of a row it takes, and if it continues another."""
    starts: list[int] = []
    sizes: list[int] = []
    continues: list[bool] = []
    start = 0
    for length in lengths.tolist():
        done = min(length, row_length)
        starts.append(start)
        sizes.append(done)
        continues.append(False)
        while done < length:
            taken = min(length - done, row_length - 1)
            starts.append(start + done)
            sizes.append(taken + 1)
            continues.append(True)
            done += taken
        start += length
    return starts, sizes, continues
