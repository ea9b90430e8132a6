"""Rows and pairs are left out for the reason that is counted, and others stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.chat import ChatDataConfig, PreferenceDataConfig
from sevenfold.data.row_rules import RowRules, RowRulesConfig
from sevenfold.data.sources import SourceConfig
from sevenfold.data.tables import write_conversations, write_preferences

GERMAN = (
    "Warum ist der Himmel am Tag blau und am Abend rot? Bitte erkläre es mir in einfachen Worten."
)
ENGLISH = "Why is the sky blue in the daytime and red in the evening? Explain it in easy words."
STORY = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle, and who then "
    "sails north to answer it before the winter storms begin."
)


def rules(**changes: Any) -> RowRules:
    values = {
        "min_answer_characters": 1,
        "max_characters": None,
        "languages": None,
        "unique_prompts": False,
    }
    return RowRules(RowRulesConfig(**values | changes))


def test_short_answers_and_long_rows_are_left_out() -> None:
    given = rules(min_answer_characters=3, max_characters=20)
    assert given.reason("Why?", ["So. "]) is None
    assert given.reason("Why?", ["So.", " no "]) == "short_answer"
    assert given.reason("Why?" * 4, ["Because."]) == "too_long"


def test_other_languages_are_left_out_and_short_texts_are_not_judged() -> None:
    given = rules(languages=("en",))
    assert given.reason(ENGLISH, ["Light is scattered by the air, and blue light most."]) is None
    assert given.reason(GERMAN, ["Licht wird von der Luft gestreut."]) == "language_de"
    assert given.reason("Warum?", ["Darum."]) is None
    assert rules(languages=("en", "de")).reason(GERMAN, ["Licht wird gestreut."]) is None


def test_no_language_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one language, or is null to keep all"):
        rules(languages=())


@pytest.mark.parametrize(
    "again",
    [STORY, STORY.upper(), STORY.replace(",", "").replace(" ", "\n"), STORY.replace("short ", "")],
)
def test_of_prompts_that_are_nearly_the_same_the_first_stays(again: str) -> None:
    given = rules(unique_prompts=True)
    assert given.reason(STORY, ["Once."]) is None
    assert given.reason(STORY.replace("lighthouse keeper", "blind clockmaker's son"), ["a"]) is None
    assert given.reason("Write a poem about a river in spring.", ["Twice."]) is None
    assert given.reason(again, ["Thrice."]) == "near_duplicate_prompt"


def test_short_prompts_that_differ_stay() -> None:
    given = rules(unique_prompts=True)
    asked = [f"What is {n} and {n + 1}?" for n in range(3, 9)] + ["Hi", "Ho", "?", "!"]
    assert [given.reason(prompt, ["It is."]) for prompt in asked] == [None] * len(asked)
    assert given.reason("hi!", ["Hello."]) == "near_duplicate_prompt"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "Yes, it is.", "rejected": " Yes,\n it  is. "}, "same_answers"),
        ({"chosen": [{"role": "assistant", "content": "A"}], "rejected": "A"}, "same_answers"),
        ({"chosen": "A", "rejected": "B", "score_chosen": 7, "score_rejected": 7.0}, "tie"),
        ({"chosen": "A", "rejected": "B", "score_chosen": 6, "score_rejected": 7}, "ranked_lower"),
        ({"chosen": "A", "rejected": "B", "score_chosen": 8, "score_rejected": 7}, None),
        ({"chosen": "A", "rejected": "B", "score_chosen": None, "score_rejected": None}, None),
        ({"chosen": "A", "rejected": "a"}, None),
        ({"chosen": 7}, None),
    ],
)
def test_pairs_that_prefer_nothing_are_left_out(row: dict[str, Any], reason: str | None) -> None:
    assert rules().pair_reason(row) == reason
    assert RowRules(None).pair_reason(row) is None


def source(path: Path, rows: list[Any]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(name="s", path=str(path), licence="cc0")


RULES = RowRulesConfig(
    min_answer_characters=2, max_characters=None, languages=("en",), unique_prompts=True
)


def test_what_is_left_out_is_counted_in_the_manifest(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": f"Number {n * n * 37}?", "answer": f"It is {n}."} for n in range(20)]
    rows += [{"question": "NUMBER 37!", "answer": "It is 1."}, {"question": "So?", "answer": "x"}]
    rows += [{"question": GERMAN, "answer": "Licht wird von der Luft gestreut."}]
    config = ChatDataConfig(
        sources=(source(tmp_path / "a.jsonl", rows),),
        max_length=256,
        validation_fraction=0.1,
        rules=RULES,
    )
    facts = write_conversations(tmp_path, tokenizer, config)
    assert facts["counts"]["dropped"] == {
        "near_duplicate_prompt": 1, "short_answer": 1, "language_de": 1
    }  # fmt: skip
    assert facts["by_source"]["s"]["rows"] == 20


def test_pairs_are_cleaned_instead_of_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Number {n * n * 37}?", "chosen": f"{n} it is.", "rejected": "No."}
        for n in range(12)
    ]
    rows[3]["rejected"] = " 3 it\tis."
    rows[5] |= {"score_chosen": 4.0, "score_rejected": 4.0}
    given = source(tmp_path / "a.jsonl", rows)
    values: dict[str, Any] = {"sources": (given,), "max_length": 128, "validation_fraction": 0.1}
    cleaned = PreferenceDataConfig(**values, rules=RULES)
    facts = write_preferences(tmp_path, tokenizer, cleaned)
    assert facts["counts"]["dropped"] == {"same_answers": 1, "tie": 1}
    assert facts["rows"] + facts["validation_rows"] == 10
    rows[3]["rejected"] = " 3 it is. "
    strict = PreferenceDataConfig(**values | {"sources": (source(tmp_path / "b.jsonl", rows),)})
    with pytest.raises(BadDataError, match="equal to 'chosen'"):
        write_preferences(tmp_path, tokenizer, strict)


def test_what_is_missing_or_unknown_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"rules\.languages: 'eng' is not a language .* 'en'"):
        rules(languages=("eng",))
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UsageError, match=r"needs rensa, .* pip install -e '\.\[data\]'"):
        rules(unique_prompts=True)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UsageError, match=r"needs py3langid, .*'\.\[data\]'"):
        rules(languages=("en",))
