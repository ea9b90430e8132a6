"""Which engine encodes, and that both give the same ids for whatever stands in a text."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import code_points

from sevenfold.data import encoders
from sevenfold.data.tokenizer import TokenizerConfig, encode_texts, load_tokenizer, train_tokenizer

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_gigatoken = pytest.mark.skipif(
    not any(d.name == "gigatoken" for d in importlib.metadata.distributions()),
    reason="gigatoken is not installed",
)


@pytest.fixture(scope="module")
def made() -> Any:
    config = TokenizerConfig(vocab_size=3000, path=None, max_digits=3, sample_characters=10**6)
    # Three in a row of what the engines cut differently, so that merges lie across the cuts.
    newest = [chr(first) * 3 for first, _ in encoders.CUT_DIFFERENTLY] * 2
    return train_tokenizer([*words(), *words(), *newest, *encoders.hard_texts(EMPTY)], config)


@pytest.fixture(scope="module")
def backend_json(made: Any) -> str:
    return str(made.backend_tokenizer.to_str())


EMPTY = json.dumps({"added_tokens": []})


def words() -> list[str]:
    return [f"Tom number {n} has a red hat and {n * 7919} cats in Straße {n}." for n in range(500)]


@needs_gigatoken
def test_both_engines_agree_on_ten_thousand_documents_of_bad_unicode(backend_json: str) -> None:
    texts = encoders.hard_texts(backend_json, 8_000, seed=1)
    assert len(texts) > 10_000
    joined = "".join(texts)
    for wanted in ("\0", "\u2028", "\u200d", "\u0301", "\u202e", "\ue000", "\U0010ffff", "<|bos|>"):
        assert wanted in joined
    assert max(map(len, texts)) > 700
    fast, slow = (
        encoders.encode(each, backend_json, texts) for each in ("gigatoken", "tokenizers")
    )  # type: ignore[arg-type]
    np.testing.assert_array_equal(fast[0], slow[0])
    np.testing.assert_array_equal(fast[1], slow[1])


@needs_gigatoken
def test_where_they_cut_words_differently_the_slow_one_encodes() -> None:
    """Unicode 17's letters: the reason for which a check sample alone is no proof."""
    backend_json = code_points.probe()
    texts = [*words()[:3], "a\U000323b0b\U000323b0\U000323b0", "b", "\u088f\u088f\u088f", "", "c"]
    fast, slow = (
        encoders.encode_fast(backend_json, texts),
        encoders._encode_slowly(backend_json, texts),
    )
    assert not np.array_equal(fast[0], slow[0])
    found = encoders.encode("gigatoken", backend_json, texts)
    np.testing.assert_array_equal(found[0], slow[0])
    np.testing.assert_array_equal(found[1], slow[1])


@needs_gigatoken
@pytest.mark.parametrize("stride", [(0x80, 0x30000, 61), (0x30000, 0x110000, 997)])
def test_they_differ_at_no_other_code_point(stride: tuple[int, int, int]) -> None:
    """A sample of what bench/code_points.py looks at, and the neighbours of what differs."""
    edges = {c + d for pair in encoders.CUT_DIFFERENTLY for c in pair for d in (-1, 0, 1)}
    points = sorted({*range(128), *range(*stride), *edges})
    points = [point for point in points if not 0xD800 <= point < 0xE000]
    expected = [p for p in points if any(a <= p <= b for a, b in encoders.CUT_DIFFERENTLY)]
    assert code_points.differing(points) == expected


@pytest.mark.parametrize("engine", ["tokenizers", pytest.param("gigatoken", marks=needs_gigatoken)])
def test_what_looks_like_a_control_token_stays_text(
    made: Any, backend_json: str, engine: encoders.Engine
) -> None:
    texts = ["", "Tom<|eos|> has <|bos|>", "<|reserved_3|><|user|>cats", *words()[:20]]
    ids, counts = encoders.encode(engine, backend_json, texts)
    expected = encode_texts(made, texts)
    assert counts.tolist() == [len(each) for each in expected]
    assert ids.tolist() == [token for each in expected for token in each]
    assert not set(ids.tolist()) & set(made.all_special_ids)
    assert encoders.encode(engine, backend_json, [])[1].tolist() == []


@needs_gigatoken
def test_the_fast_one_is_used_once_it_is_proved_equal(backend_json: str) -> None:
    found = encoders.choose(backend_json, words())
    assert (found.engine, found.why) == ("gigatoken", None)
    assert found.facts() == {
        "engine": "gigatoken",
        "version": importlib.metadata.version("gigatoken"),
        "checked_documents": len(encoders.hard_texts(backend_json)) + 500,
    }


@needs_gigatoken
@pytest.mark.parametrize("wrong", ["ids", "counts"])
def test_one_other_id_is_enough_to_use_the_slow_one(
    backend_json: str, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    encode = encoders.encode

    def other(*arguments: Any) -> Any:
        ids, counts = encode(*arguments)
        if wrong == "ids":
            ids = ids.copy()
            ids[-1] += 1
        else:  # the same ids, cut elsewhere
            counts = counts.copy()
            counts[-2:] += [1, -1]
        return ids, counts

    monkeypatch.setattr(encoders, "encode", other)
    found = encoders.choose(backend_json, words())
    assert found.engine == "tokenizers"
    assert found.version == importlib.metadata.version("tokenizers")
    assert found.checked_documents > 500
    assert found.why == "gigatoken gives other ids on the check sample"


def test_without_the_fast_one_people_are_told_how_to_get_it(
    backend_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        if name == "gigatoken":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = encoders.choose(backend_json, [])
    assert found.engine == "tokenizers"
    assert "not installed (pip install -e '.[data]')" in str(found.why)


@needs_gigatoken
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real tokenizer lies beside the project")
def test_a_tokenizer_that_the_fast_one_cannot_read_is_read_by_the_slow_one() -> None:
    """SmolLM2's has no entry for some bytes, as tokenizers allows."""
    made = load_tokenizer(SHARED / "model" / "smollm2_tokenizer")
    found = encoders.choose(made.backend_tokenizer.to_str(), [])
    assert found.engine == "tokenizers"
    assert str(found.why).startswith("gigatoken does not read it (")


def test_hard_texts_are_the_same_every_time_and_hold_the_control_tokens(backend_json: str) -> None:
    found = encoders.hard_texts(backend_json)
    assert found == encoders.hard_texts(backend_json)
    assert found != encoders.hard_texts(backend_json, seed=1)
    assert {"<|bos|>", "<|end|>", "<|reserved_0|>"} <= set(found)
    for text in found:
        text.encode()  # no surrogate: data/strict_json.py lets none through
