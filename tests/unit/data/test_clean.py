from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data import clean
from sevenfold.data.clean import (
    CleanConfig,
    Document,
    DocumentWriter,
    assign_splits,
    clean_documents,
    cut,
    fraction_of,
    normalise,
    read_shards,
)
from sevenfold.data.clean_counts import CleaningCounts


def config(**facts: Any) -> CleanConfig:
    values = {"min_characters": 3, "document_characters": 100, "unicode_form": "NFC"}
    return CleanConfig(**values | {"deduplicate": "exact"} | facts)


def documents(*texts: str) -> list[Document]:
    return [{"id": f"d{n}", "text": text, "source": "s"} for n, text in enumerate(texts)]


def test_short_and_repeated_documents_are_dropped_and_counted() -> None:
    counts = CleaningCounts()
    given = documents("one two", "ab", "one  \n two", "three", " one two ")
    kept = list(clean_documents(given, config(), counts))
    assert [document["text"] for document in kept] == ["one two", "three"]
    assert counts.total().documents_read == 5
    assert counts.total().dropped == {"too_short": 1, "duplicate": 2}
    assert counts.facts()["dropped_examples"]["duplicate"] == [
        {"id": "d2", "begins": "one  \n two"},
        {"id": "d4", "begins": "one two"},
    ]
    everything = list(clean_documents(given, config(deduplicate="none"), CleaningCounts()))
    assert len(everything) == 4


def test_text_is_brought_into_one_form() -> None:
    assert normalise(" cafe\u0301\r\nﬁn\r", "NFC") == "café\nﬁn"
    assert normalise("ﬁn", "NFKC") == "fin"
    assert normalise("e\u0301", "none") == "e\u0301"


def test_long_documents_are_cut_at_paragraphs() -> None:
    paragraphs = [f"Paragraph {n}. It has two sentences." for n in range(40)]
    pieces = list(cut("\n\n".join(paragraphs), 200))
    assert max(map(len, pieces)) <= 200
    assert min(map(len, pieces)) >= 50
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    kept = list(clean_documents(documents("\n\n".join(paragraphs)), config(), CleaningCounts()))
    assert [document["id"] for document in kept[:2]] == ["d0#0", "d0#1"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaa aaa\naaa aaaa", "aaaa aaa"),
        ("Aaa aa. Bb bbb bbb", "Aaa aa."),
        ("aaaa aaaaaaa aaa", "aaaa"),
        ("a" * 18, "a" * 9),
    ],
)
def test_a_paragraph_is_cut_where_it_hurts_least(text: str, first: str) -> None:
    pieces = list(cut(text, 12))
    assert pieces[0] == first
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_the_split_follows_the_text_and_nothing_is_in_both() -> None:
    given = documents(*(f"text number {n}" for n in range(400)))
    splits = list(assign_splits(given, 0.1))
    held_out = {document["text"] for split, document in splits if split == "validation"}
    assert len(splits) == 400
    assert held_out == {d["text"] for d in given if fraction_of(d["text"]) < 0.1}
    assert 20 < len(held_out) < 70
    more = list(assign_splits([*given, *documents("another")], 0.1))
    assert held_out <= {document["text"] for split, document in more if split == "validation"}


def test_even_two_documents_have_one_held_out() -> None:
    splits = [split for split, _ in assign_splits(documents("one", "two"), 0.0)]
    assert sorted(splits) == ["train", "validation"]


def test_a_split_that_is_given_is_kept() -> None:
    given = [
        {"id": "a", "text": "a", "split": "train"},
        {"id": "b", "text": "b", "split": "validation"},
        {"id": "c", "text": "c", "split": "train"},
    ]
    assert [split for split, _ in assign_splits(given, 0.9)] == ["train", "validation", "train"]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(BadDataError, match=r"1 documents are left after cleaning, 0 to train"):
        list(assign_splits(documents("one"), 0.5))
    with pytest.raises(BadDataError, match=r"give more text or loosen 'clean'"):
        list(assign_splits([], 0.5))


def test_a_minimum_near_the_cut_is_refused() -> None:
    values = {"min_characters": 30, "document_characters": 100, "unicode_form": "NFC"}
    with pytest.raises(UsageError, match=r"at most document_characters / 4"):
        build(CleanConfig, values | {"deduplicate": "exact"})


def test_documents_come_back_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "SHARD_BYTES", 150)
    given = documents(*(f"grüß\u2028{n} 😀" for n in range(10)))
    with DocumentWriter(tmp_path, "train") as writer:
        for document in given:
            writer.write(document)
    assert len(list(tmp_path.glob("train-*.jsonl.zst"))) > 2
    assert list(read_shards(tmp_path, "train")) == given
    assert list(read_shards(tmp_path, "validation")) == []


def test_counts_are_kept_by_source_and_add_up() -> None:
    whole, first, second = CleaningCounts(), CleaningCounts(), CleaningCounts()
    given = [{"id": f"d{n}", "text": "é" * n, "source": "ab"[n % 2]} for n in range(12)]
    for number, document in enumerate(given):
        for counts in (whole, first if number < 5 else second):
            counts.read(document)
            if number % 3:
                counts.keep(document, "train", {"email": 2})
            else:
                counts.drop(document, "too_short")
    facts = whole.facts()
    assert facts["by_source"]["a"] == {
        "documents_read": 6,
        "documents": {"train": 4},
        "characters": {"train": 24},
        "bytes": {"train": 48},
        "dropped": {"too_short": 2},
        "pii": {"email": 8},
    }
    assert facts["documents_read"] == 12
    assert facts["dropped"] == {"too_short": 4}
    assert [example["id"] for example in facts["dropped_examples"]["too_short"]] == [
        "d0", "d3", "d6",
    ]  # fmt: skip
    first.add(second.facts())
    assert first.facts() == facts
