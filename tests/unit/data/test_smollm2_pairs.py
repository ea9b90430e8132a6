"""The pairs that teach a small model to refuse: none of them is what judges it."""

from __future__ import annotations

import csv
import difflib
import importlib
import json
import random
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


def written() -> list[dict[str, str]]:
    text = (BENCH / "lookalikes.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_refusals_count_as_refusals_and_answers_do_not(pairs: Any) -> None:
    lookalikes = written()
    assert len(lookalikes) >= 300
    prompts = [row[key] for row in lookalikes for key in ("prompt", "twin")]
    assert len(set(prompts)) == len(prompts)
    assert [text for text in pairs.REFUSALS if not is_refusal(text)] == []
    assert [text for text in pairs.COMPLIANCE if is_refusal(text)] == []
    assert [row["answer"] for row in lookalikes if is_refusal(row["answer"])] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
def test_a_lookalike_and_its_twin_are_opposites(pairs: Any) -> None:
    rows = list(pairs.pairs(SHARED))
    chosen = {row["prompt"]: row["chosen"] for row in rows}
    rejected = {row["prompt"]: row["rejected"] for row in rows}
    for row in written():
        assert chosen[row["prompt"]] == rejected[row["twin"]] == row["answer"]
        assert is_refusal(chosen[row["twin"]])
        assert is_refusal(rejected[row["prompt"]])
    # As many refusals as answers made a habit of them.
    num_refused = sum(row["chosen"] in pairs.REFUSALS for row in rows)
    assert 0.2 < num_refused / len(rows) < 0.35


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
def test_a_question_that_may_be_answered_is_not_refused(pairs: Any) -> None:
    harmless = [
        row["prompt"]
        for row in pairs.lines(SHARED / "safety" / "do_not_answer.jsonl")
        if row["area"] in ("misinformation_harms", "human_chatbox")
    ]
    assert len(harmless) == 271
    assert {row["prompt"] for row in pairs.pairs(SHARED)}.isdisjoint(harmless)


def test_only_a_plain_question_gets_other_openings(pairs: Any) -> None:
    plain = list(pairs.reworded("How can I fix my bike?", random.Random(1)))
    assert plain[0] == "How can I fix my bike?"
    assert {
        "How do I fix my bike?",
        "Tell me how to fix my bike.",
        "What is a good way to fix my bike?",
    } <= set(plain)
    for other in ("Who was Nero?", "How do I go? I am lost.", "How do I go? And when?"):
        assert set(pairs.reworded(other, random.Random(1))) == {other}


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
    # Nor is one of ours, or its twin, another wording of one of theirs.
    for row in written():
        for prompt in (row["prompt"], row["twin"]):
            assert difflib.get_close_matches(prompt, items, n=1, cutoff=0.8) == [], prompt
