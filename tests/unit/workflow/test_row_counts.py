"""Rows counted from lengths alone are the rows that the stages make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sevenfold.base import storage
from sevenfold.base.records import Run
from sevenfold.data.packing import PackedConversations, PackedPreferences, Piece, Preference
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import remaining, row_counts

RANDOM = np.random.default_rng(5)


def ids(longest: int, count: int, shortest: int = 1) -> list[list[int]]:
    return [[1] * int(n) for n in RANDOM.integers(shortest, longest + 1, count)]


def prepared(tmp_path: Path, stage: str, columns: dict[str, Any]) -> Run:
    run = Run(folder=tmp_path, facts={"preset": "demo", "recipe": {}})
    with storage.new_folder(run.data(stage), kind=stage) as folder:
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "rows"))
    return run


def recipe(*changes: str) -> recipes.Recipe:
    return recipes.resolve("demo", None, changes, Path("unused"))[1]


@pytest.mark.parametrize(("stage", "packing"), [("sft", "drawn"), ("lora", "tight")])
def test_conversations(tmp_path: Path, stage: str, packing: Any) -> None:
    found = recipe(f"{stage}.train.duration={{epochs: 2}}", f"{stage}.packing={packing}")
    length = remaining.train_config(found, stage).longest_context
    texts = ids(length, 300)
    masks = [[int(i > len(text) // 2) for i in range(len(text))] for text in texts]
    assert row_counts.count_rows(Run(folder=tmp_path, facts={}), found, stage) is None
    run = prepared(tmp_path, stage, {"input_ids": texts, "loss_mask": masks})
    pieces = [Piece(*each) for each in zip(texts, masks, strict=True)]
    packed = PackedConversations(pieces, length, pad_id=0, seed=found.seed, packing=packing)
    counted = row_counts.count_rows(run, found, stage)
    scored = sum(map(sum, masks)) / (packed.num_rows * length)
    assert counted == row_counts.RowCount(rows=packed.num_rows, scored_share=scored)
    # The number of steps is the stage's own.
    steps = remaining.train_config(found, stage).num_steps(packed.num_rows, length)
    assert remaining.num_steps(run, found, stage) == steps


@pytest.mark.parametrize(("share_prompts", "packing"), [(False, "drawn"), (True, "tight")])
def test_pairs(tmp_path: Path, share_prompts: bool, packing: Any) -> None:
    found = recipe(f"dpo.share_prompts={str(share_prompts).lower()}", f"dpo.packing={packing}")
    length = found.dpo.train.longest_context
    third = length // 4
    prompts, chosen, rejected = ids(third, 200), ids(third, 200), ids(third, 200, shortest=0)
    columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    run = prepared(tmp_path, "dpo", columns)
    preferences = [Preference(*each) for each in zip(prompts, chosen, rejected, strict=True)]
    packed = PackedPreferences(
        preferences,
        length,
        pad_id=0,
        seed=found.seed,
        packing=packing,
        share_prompts=share_prompts,
    )
    counted = row_counts.count_rows(run, found, "dpo")
    assert counted is not None
    assert counted.rows == packed.num_rows
    tokens = sum(map(len, chosen)) + sum(map(len, rejected))
    assert counted.scored_share == pytest.approx(tokens / (packed.num_rows * length))
