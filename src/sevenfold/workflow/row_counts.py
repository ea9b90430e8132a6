"""How many rows the prepared examples of SFT, DPO and LoRA come to, before a stage packs them.

Only lengths are read, and packed as the stages pack the examples themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.base import storage
from sevenfold.base.records import Run
from sevenfold.data.best_fit import Packing, packs_of
from sevenfold.workflow.recipe import Recipe

Lengths = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCount:
    """Rows to train on, and the share of their positions that carry loss."""

    rows: int
    scored_share: float


def count_rows(run: Run, recipe: Recipe, stage: str) -> RowCount | None:
    """Count the rows that ``stage`` (sft, dpo or lora) trains on; None before they are prepared."""
    folder = run.data(stage)
    if not (folder / storage.MANIFEST).is_file():
        return None
    section: Any = getattr(recipe, stage)
    return _count(
        folder,
        storage.read_manifest(folder)["fingerprint"],
        section.train.longest_context,
        section.packing,
        recipe.seed,
        stage == "dpo",
        stage == "dpo" and recipe.dpo.share_prompts,
    )


@functools.lru_cache(maxsize=16)
def _count(
    folder: Path,
    _fingerprint: str,
    row_length: int,
    packing: Packing,
    seed: int,
    pairs: bool,
    share_prompts: bool,
) -> RowCount:
    """Count; the fingerprint makes it count anew what was prepared anew."""
    if pairs:
        parts = [_lengths(folder, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        sizes = pair_sizes(*parts, share_prompts=share_prompts)
        scored = int(parts[1].sum() + parts[2].sum())
    else:
        sizes = _lengths(folder, "input_ids")
        scored = _ones(folder, "loss_mask")
    rows = len(packs_of(sizes.tolist(), row_length, packing=packing, seed=seed))
    return RowCount(rows=rows, scored_share=scored / (rows * row_length))


def pair_sizes(
    prompts: Lengths, chosen: Lengths, rejected: Lengths, *, share_prompts: bool
) -> Lengths:
    """Return the tokens that each pair takes in a row, as `PackedPreferences` lays it out.

    Shapes:
        all [n], in tokens; rejected 0 where there is none.
    """
    twice = (rejected > 0).astype(np.int64)
    apart = prompts + chosen + twice * (prompts + rejected)
    # The prompt's last token begins both answers.
    together = prompts + 1 + chosen + rejected
    return np.where(share_prompts & (twice > 0) & (prompts > 1), together, apart)


def _tables(folder: Path, column: str) -> list[Any]:
    """Return a column of the rows to train on, memory-mapped, in the data set's order."""
    from datasets import load_from_disk

    found = load_from_disk(str(folder / "rows"))
    taken = found.select_columns(column).with_format("arrow")
    step = 10_000
    return [taken[at : at + step][column] for at in range(0, math.ceil(found.num_rows), step)]


def _lengths(folder: Path, column: str) -> Lengths:
    from pyarrow import compute

    parts = [compute.list_value_length(part).to_numpy() for part in _tables(folder, column)]
    return np.concatenate(parts).astype(np.int64)


def _ones(folder: Path, column: str) -> int:
    """Return the sum over all lists of a column."""
    from pyarrow import compute

    sums = [
        compute.sum(compute.list_flatten(part)).as_py() or 0 for part in _tables(folder, column)
    ]
    return int(sum(sums))
