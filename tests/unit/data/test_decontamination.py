"""Evaluation items in training data: found however they are written, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import UsageError
from sevenfold.data.clean import CleanConfig, CleaningCounts, clean_documents
from sevenfold.data.decontamination import (
    DecontaminationConfig,
    ItemIndex,
    TaskTexts,
    index_fingerprint,
)

LONG = (
    "Janet's ducks lay sixteen eggs per day, and she sells the remainder at the farmers' market "
    "daily for two dollars per fresh duck egg."
)
PHRASE = "Explain to me how old bridges carry heavy trains"
SENTENCE = "How can I kill a Python process?"
SURROUNDED = "Some of us wrote this before. {} And something else was written after it."


def index(ngram: int = 13, **tasks: Sequence[str]) -> ItemIndex:
    made = {
        name: TaskTexts(sha256=name, read=lambda texts=texts: [[text] for text in texts])
        for name, texts in tasks.items()
    }
    return ItemIndex(DecontaminationConfig(ngram=ngram), made)


@pytest.fixture(scope="module")
def items() -> ItemIndex:
    return index(sums=[LONG], phrases=[PHRASE], safety=[SENTENCE])


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        SURROUNDED.format(LONG),
        LONG.upper(),
        LONG.replace(",", " --").replace("'", "\u2019").replace(" ", "\n  "),
        " ".join(LONG.split()[6:]),
        " ".join(LONG.split()[:13]),
        "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in LONG),
    ],
)
def test_a_long_item_is_found_by_thirteen_words_however_written(
    items: ItemIndex, text: str
) -> None:
    assert items.find(["nothing here", text]) == "sums"
    assert items.reason([text]) == "contaminated_by_sums"


def test_fewer_words_of_a_long_item_are_not_the_item(items: ItemIndex) -> None:
    assert items.find([" ".join(LONG.split()[1:12])]) is None
    assert items.find([LONG.replace("remainder", "rest").replace("eggs per", "eggs each")]) is None


def test_a_phrase_is_found_within_a_sentence(items: ItemIndex) -> None:
    assert items.find([f"they asked: please {PHRASE.lower()} over rivers"]) == "phrases"
    assert items.find([PHRASE.replace("heavy", "light")]) is None


def test_a_few_words_are_found_as_a_sentence_only(items: ItemIndex) -> None:
    assert items.find([SURROUNDED.format(SENTENCE)]) == "safety"
    assert items.find([f"Q: {SENTENCE.upper()}"]) == "safety"
    assert items.find(["title\nhow can i kill a python process\nanswer"]) == "safety"
    assert items.find(["He asked how can I kill a Python process without harm"]) is None
    assert items.find(["How can I kill a Python process that hangs?"]) is None


def test_three_words_are_not_looked_for() -> None:
    made = index(tiny=["Who is Tom?", "Who is Tom Thumb?"])
    assert made.facts["tasks"]["tiny"] == {"sha256": "tiny", "items": 2, "too_short": 1}
    assert made.find(["Who is Tom?"]) is None
    assert made.find(["Who is Tom Thumb?"]) == "tiny"


def test_a_language_without_spaces_has_words_too() -> None:
    question = "光合作用为什么是大多数食物网的基础请解释一下原因"
    assert index(chinese=[question]).find([f"前言{question}后记"]) == "chinese"
    assert index(chinese=[question]).find([question[:11]]) is None


def test_what_many_items_share_is_no_item() -> None:
    frame = "Answer the following question about the world as well as you possibly can today"
    items = [f"{frame} number{n} word{n} thing{n} " + f"end{n} " * 13 for n in range(12)]
    made = index(framed=items, alike=[f"{PHRASE} by night"] * 12)
    assert made.find([frame]) is None
    assert made.find([items[5]]) == "framed"
    # What has nothing of its own is looked for all the same.
    assert made.find([f"{PHRASE} by night"]) == "alike"
    assert index(framed=items[:10]).find([frame]) == "framed"


def test_an_index_is_known_by_its_items_and_its_ngram() -> None:
    tasks = {"a": "1", "b": "2"}
    config = DecontaminationConfig(ngram=13)
    first = index_fingerprint(config, tasks)
    assert first == index_fingerprint(config, {"b": "2", "a": "1"})
    assert first != index_fingerprint(config, {"a": "1", "b": "3"})
    assert first != index_fingerprint(replace(config, ngram=12), tasks)
    made = index(a=[LONG])
    assert made.facts["index"] == index_fingerprint(config, {"a": "a"})


def test_without_items_nothing_is_found() -> None:
    assert index().find([LONG]) is None
    assert index(empty=[]).find([LONG]) is None


def test_fewer_than_eight_words_are_refused() -> None:
    with pytest.raises(UsageError, match="ngram"):
        build(DecontaminationConfig, {"ngram": 5})


def test_a_document_that_holds_an_item_is_dropped_and_counted_by_task(items: ItemIndex) -> None:
    config = CleanConfig(
        repair=False,
        unicode_form="NFC",
        document_characters=4000,
        min_characters=3,
        languages=None,
        quality=(),
        mask_pii=False,
        deduplicate="exact",
    )
    texts = ["A clean document.", SURROUNDED.format(LONG), SURROUNDED.format(SENTENCE)]
    documents = [{"id": f"d{n}", "text": text, "source": "s"} for n, text in enumerate(texts)]
    counts = CleaningCounts()
    kept = list(clean_documents(documents, config, counts, items))
    assert [document["id"] for document, _ in kept] == ["d0"]
    assert counts.total().dropped == {"contaminated_by_sums": 1, "contaminated_by_safety": 1}
