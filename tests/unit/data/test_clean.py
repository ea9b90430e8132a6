from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import UsageError
from sevenfold.data import clean
from sevenfold.data.clean import (
    CleanConfig,
    Document,
    DocumentWriter,
    clean_documents,
    cut,
    normalise,
    read_shards,
)
from sevenfold.data.clean_counts import CleaningCounts

SETTINGS: dict[str, Any] = {
    "min_characters": 3,
    "document_characters": 100,
    "unicode_form": "NFC",
    "repair": False,
    "languages": None,
    "quality": (),
    "mask_pii": False,
    "deduplicate": "exact",
}


def config(**facts: Any) -> CleanConfig:
    return CleanConfig(**SETTINGS | facts)


def cleaned(given: list[Document], settings: CleanConfig) -> list[Document]:
    return [piece for piece, _ in clean_documents(given, settings, CleaningCounts())]


def documents(*texts: str) -> list[Document]:
    return [{"id": f"d{n}", "text": text, "source": "s"} for n, text in enumerate(texts)]


def test_what_c4_has_shortened_too_far_is_dropped() -> None:
    kept = "The old man sat down near the sea. " * 6
    (given,) = documents(f"{kept}\nWithout a stop at its end a line is none for C4 and goes away")
    wide = {"document_characters": 4000, "quality": ("c4",)}
    (piece,) = cleaned([given], config(**wide))
    assert len(piece["text"]) < 220 < len(given["text"])
    assert cleaned([given], config(**wide, min_characters=220)) == []


def test_short_documents_are_dropped_and_counted() -> None:
    counts = CleaningCounts()
    given = documents("one two", "ab", "three", " x ")
    kept = [piece["text"] for piece, _ in clean_documents(given, config(), counts)]
    assert kept == ["one two", "three"]
    assert counts.total().documents_read == 4
    assert counts.total().dropped == {"too_short": 2}
    assert counts.facts()["dropped_examples"]["too_short"] == [
        {"id": "d1", "begins": "ab"},
        {"id": "d3", "begins": "x"},
    ]


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
    kept = cleaned(documents("\n\n".join(paragraphs)), config())
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


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({"min_characters": 30}, r"at most document_characters / 4"),
        ({"languages": []}, r"'languages' names at least one language, or is null to keep all"),
        ({"quality": ["c4", "c4"]}, r"'quality' names each filter once"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, Any], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        build(CleanConfig, SETTINGS | changed)


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


def test_plain_settings_import_nothing_slow() -> None:
    program = f"""
import sys
from sevenfold.data import cleaning, clean_counts
from sevenfold.data.clean import CleanConfig, clean_documents
from sevenfold.workflow import clean, workers
given = [{{"id": "a", "text": "Tom has a hat.", "source": "s"}}]
list(clean_documents(given, CleanConfig(**{SETTINGS!r}), clean_counts.CleaningCounts()))
workers.do_tasks(str, name="", folders=[], workers=workers.Workers(), logs=None)
print(sorted({{"datatrove", "ftfy", "py3langid", "ray", "rensa", "spacy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
