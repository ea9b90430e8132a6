from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevenfold.base.errors import BadDataError
from sevenfold.data import duplicates
from sevenfold.data.clean import fraction_of

WORDS = [f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600)]


def text(seed: int, count: int = 120) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def changed(given: str, places: range) -> str:
    words = given.split()
    for place in places:
        words[place] = "another"
    return " ".join(words)


def fates(
    tmp_path: Path,
    texts: list[str],
    *,
    fraction: float = 0.0,
    deduplicate: Any = "minhash",
    splits: dict[int, str] | None = None,
    shards: int = 1,
) -> list[int]:
    folders = []
    for number, chunk in enumerate(np.array_split(np.arange(len(texts)), shards)):
        keys = duplicates.Keys(near=deduplicate == "minhash")
        for index in chunk:
            keys.add(texts[index], fraction_of(texts[index]), (splits or {}).get(int(index)))
        folder = tmp_path / f"{len(texts)}-{shards}-{number}"
        folder.mkdir(exist_ok=True)
        keys.write(folder)
        folders.append(folder)
    found = duplicates.decide(folders, validation_fraction=fraction, deduplicate=deduplicate)
    assert [len(part) for part in found] == [
        len(chunk) for chunk in np.array_split(np.arange(len(texts)), shards)
    ]
    return [int(fate) for part in found for fate in part]


T, V, D, N = (
    duplicates.TRAIN,
    duplicates.VALIDATION,
    duplicates.DUPLICATE,
    duplicates.NEAR_DUPLICATE,
)
ONE_HELD_OUT = {0: "validation"}


def test_the_first_stays_whatever_the_white_space(tmp_path: Path) -> None:
    given = ["held out", "one two", "one  \n two", "three", " one two "]
    splits = dict.fromkeys(range(1, 5), "train") | ONE_HELD_OUT
    assert fates(tmp_path, given, deduplicate="exact", splits=splits) == [V, T, D, T, D]
    assert fates(tmp_path, given, deduplicate="none", splits=splits) == [V, T, T, T, T]


def test_near_duplicates_are_dropped_and_told_from_exact_ones(tmp_path: Path) -> None:
    one, two = text(1), text(2)
    given = [
        text(0),
        one,
        two,
        one,
        changed(one, range(60, 62)).upper() + "!",
        changed(two, range(0, 120, 6)),
        text(3),
    ]
    splits = dict.fromkeys(range(1, 7), "train") | ONE_HELD_OUT
    assert fates(tmp_path, given, splits=splits) == [V, T, T, D, N, T, T]
    exact = fates(tmp_path, given, splits=splits, deduplicate="exact")
    assert exact == [V, T, T, D, T, T, T]


def test_what_repeats_a_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    one = text(1)
    given = [changed(one, range(3)), text(2), one, changed(one, range(117, 120)), one]
    splits = {0: "train", 1: "train", 2: "validation", 3: "train", 4: "validation"}
    assert fates(tmp_path, given, splits=splits) == [N, T, V, N, D]


def test_groups_are_closed(tmp_path: Path) -> None:
    """Each differs a little from the one before; the ends have little in common."""
    chain = [text(1)]
    for start in range(0, 80, 4):
        chain.append(changed(chain[-1], range(start, start + 4)))
    given = [text(0), *chain]
    splits = dict.fromkeys(range(1, len(given)), "train") | ONE_HELD_OUT
    assert fates(tmp_path, given, splits=splits) == [V, T, *[N] * (len(chain) - 1)]


def test_groups_that_touch_later_become_one() -> None:
    first = np.arange(4)
    for column in ([1, 2, 2, 3], [5, 6, 5, 7]):
        duplicates.join_alike(first, np.array(column, np.uint64))
    assert list(first) == [0, 0, 0, 3]


def test_the_outcome_is_the_same_in_any_number_of_shards(tmp_path: Path) -> None:
    texts = [text(n % 40) for n in range(90)]
    texts = [t if n % 3 else changed(t, range(n % 5)) for n, t in enumerate(texts)]
    whole = fates(tmp_path, texts, fraction=0.1)
    assert {T, V, D, N} == set(whole)
    assert fates(tmp_path, texts, fraction=0.1, shards=7) == whole
    assert fates(tmp_path, texts, fraction=0.1, shards=30) == whole


def test_texts_without_words_are_only_like_themselves(tmp_path: Path) -> None:
    given = [text(0), "...", "!!!", "a", "A.", "..."]
    splits = dict.fromkeys(range(1, 6), "train") | ONE_HELD_OUT
    assert fates(tmp_path, given, splits=splits) == [V, T, T, T, N, D]


def test_the_split_follows_the_text_and_nothing_is_in_both(tmp_path: Path) -> None:
    given = [text(n) for n in range(400)]
    found = fates(tmp_path, given, fraction=0.1)
    held_out = {index for index, fate in enumerate(found) if fate == V}
    assert held_out == {n for n in range(400) if fraction_of(given[n]) < 0.1}
    assert 20 < len(held_out) < 70


def test_even_two_documents_have_one_held_out(tmp_path: Path) -> None:
    lower = min((0, 1), key=lambda n: fraction_of(text(n)))
    found = fates(tmp_path, [text(0), text(1)])
    assert found[lower] == V
    assert sorted(found) == [T, V]


def test_copies_that_are_kept_are_held_out_together(tmp_path: Path) -> None:
    given = [text(1), text(2), text(1), text(2)]
    found = fates(tmp_path, given, deduplicate="none")
    assert found[:2] == found[2:]
    assert sorted(found) == [T, T, V, V]


def test_a_split_that_is_given_is_kept(tmp_path: Path) -> None:
    splits = {0: "train", 1: "validation", 2: "train"}
    assert fates(tmp_path, ["a", "b", "c"], fraction=0.9, splits=splits) == [T, V, T]


@pytest.mark.parametrize("given", [["one"], ["one", "one"], []])
def test_too_little_text_is_refused(tmp_path: Path, given: list[str]) -> None:
    with pytest.raises(
        BadDataError, match=r"documents are left after cleaning, 0 to train on"
    ) as e:
        fates(tmp_path, given, fraction=0.0)
    assert "give more text or loosen 'clean'" in str(e.value)
