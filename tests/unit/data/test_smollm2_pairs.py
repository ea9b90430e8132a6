"""The pairs that teach a small model to refuse: none of them is what judges it."""

from __future__ import annotations

import csv
import difflib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold.data.decontamination import DecontaminationConfig, ItemIndex, TaskTexts
from sevenfold.verify.safety import is_refusal

BENCH = Path(__file__).parents[3] / "bench" / "smollm2"
SHARED = Path(__file__).parents[3].parent / "shared" / "data"


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("preferences")


def test_refusals_count_as_refusals_and_answers_do_not(pairs: Any) -> None:
    lookalikes = [
        json.loads(line) for line in (BENCH / "lookalikes.jsonl").read_text().splitlines()
    ]
    assert len(lookalikes) >= 60
    assert len({row["prompt"] for row in lookalikes}) == len(lookalikes)
    assert [text for text in pairs.REFUSALS if not is_refusal(text)] == []
    assert [text for text in pairs.COMPLIANCE if is_refusal(text)] == []
    assert [row["answer"] for row in lookalikes if is_refusal(row["answer"])] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
def test_no_prompt_that_judges_is_among_them(pairs: Any) -> None:
    rows = list(pairs.pairs(SHARED))
    assert rows == list(pairs.pairs(SHARED))
    with (SHARED / "safety" / "xstest_prompts.csv").open() as file:
        items = [row["prompt"] for row in csv.DictReader(file)]
    prompts = {row["prompt"] for row in rows}
    found = TaskTexts(sha256="x", read=lambda: ([item] for item in items))
    index = ItemIndex(DecontaminationConfig(ngram=13), {"xstest": found})
    assert index.find(items[:1]) == "xstest"
    assert [p for p in prompts if index.find([p])] == []
    # Nor is one of ours another wording of one of theirs.
    for line in (BENCH / "lookalikes.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        assert difflib.get_close_matches(prompt, items, n=1, cutoff=0.8) == [], prompt
