from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import UsageError
from sevenfold.data.tokenizer import (
    CONTROL_TOKENS,
    TokenizerConfig,
    adopt_tokenizer,
    encode_texts,
    load_tokenizer,
    reserved_ids,
    stop_ids,
    tokenizer_fingerprint,
    train_tokenizer,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real tokenizers do not lie beside the project"
)


def config(**facts: Any) -> TokenizerConfig:
    values = {"vocab_size": 400, "path": None, "max_digits": 1, "sample_characters": 10_000}
    return TokenizerConfig(**values | facts)


def test_the_vocabulary_has_exactly_the_asked_size(tokenizer: Any, texts: list[str]) -> None:
    assert len(tokenizer) == 400
    assert tokenizer.convert_ids_to_tokens(list(range(7))) == list(CONTROL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    bigger = train_tokenizer(texts, config(vocab_size=1000))
    reserved = reserved_ids(bigger)
    assert len(bigger) == 1000
    assert len(reserved) > 400
    assert reserved == list(range(reserved[0], 1000))
    assert bigger.convert_ids_to_tokens(reserved[0]) == "<|reserved_0|>"
    assert stop_ids(bigger) == [6, 1]


def test_every_text_comes_back(tokenizer: Any) -> None:
    text = "Tom  has\t7 Hüte\u2028😀\x01\n\n  x"
    assert tokenizer.decode(encode_texts(tokenizer, [text])[0]) == text


def test_digits_are_grouped_as_asked(texts: list[str]) -> None:
    numbers = [f"{n} {n + 1}" for n in range(1000, 3000)]
    longest = {}
    for digits in (1, 3):
        made = train_tokenizer(numbers, config(vocab_size=600, max_digits=digits))
        tokens = [token for token in made.get_vocab() if token.isdigit()]
        longest[digits] = max(map(len, tokens))
    assert longest == {1: 1, 3: 3}


def test_control_tokens_in_a_text_stay_text(tokenizer: Any) -> None:
    text = "a <|end|> b <|bos|><|reserved_0|>"
    (ids,) = encode_texts(tokenizer, [text])
    assert min(ids) >= len(CONTROL_TOKENS)
    assert tokenizer.decode(ids) == text
    # Other users of the same object are not affected.
    assert tokenizer.convert_tokens_to_ids("<|end|>") in tokenizer("<|end|>")["input_ids"]


def test_plain_encoding_begins_with_bos(tokenizer: Any) -> None:
    assert tokenizer("Tom has")["input_ids"] == [0, *encode_texts(tokenizer, ["Tom has"])[0]]


def test_padding_asked_for_elsewhere_does_not_stick(tokenizer: Any) -> None:
    tokenizer(["Tom", "Tom has a red hat."], padding=True, truncation=True, max_length=4)
    assert [len(ids) for ids in encode_texts(tokenizer, ["Tom", "Tom has a red hat."])] != [4, 4]


def test_training_twice_gives_the_same_tokenizer(tokenizer: Any, texts: list[str]) -> None:
    again = train_tokenizer(texts, config())
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    other = train_tokenizer([text.upper() for text in texts], config())
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_saving_keeps_everything(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(tmp_path / "a"))
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save_pretrained(str(tmp_path / "b"))
    twice = load_tokenizer(tmp_path / "b")
    for one in (loaded, twice):
        assert tokenizer_fingerprint(one) == tokenizer_fingerprint(tokenizer)
        assert one.chat_template == tokenizer.chat_template
        assert reserved_ids(one) == reserved_ids(tokenizer)
        assert len(one) == 400


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json here; name a folder that holds"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"the tokenizer is not readable \("):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"vocab_size": 262}, "'vocab_size' is at least 263"),
        ({"max_digits": 0}, "'max_digits' and 'sample_characters' are at least 1"),
    ],
)
def test_impossible_settings_are_refused(facts: dict[str, int], advice: str) -> None:
    values = {"vocab_size": 400, "path": None, "max_digits": 1, "sample_characters": 1}
    with pytest.raises(UsageError) as caught:
        build(TokenizerConfig, values | facts)
    assert advice in str(caught.value)


def test_one_of_ours_is_taken_over_into_a_larger_vocabulary(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    made = adopt_tokenizer(config(vocab_size=450, path=str(tmp_path)))
    assert len(made) == 450
    assert len(reserved_ids(made)) == len(reserved_ids(tokenizer)) + 50
    assert made.get_vocab().items() > tokenizer.get_vocab().items()


@needs_shared
def test_a_tokenizer_without_chat_gets_ours(tmp_path: Path) -> None:
    folder = SHARED / "model" / "stories260K_hf"
    made = adopt_tokenizer(config(vocab_size=576, path=str(folder)))
    assert len(made) == 576
    assert (made.bos_token, made.eos_token) == ("<s>", "</s>")
    assert "<|assistant|>" in made.chat_template
    assert len(reserved_ids(made)) == 576 - 512 - 4
    assert stop_ids(made) == [made.convert_tokens_to_ids("<|end|>"), made.eos_token_id]
    with pytest.raises(UsageError, match=r"has 512 entries and needs 4 more .*vocab_size is 512"):
        adopt_tokenizer(config(vocab_size=512, path=str(folder)))


@needs_shared
def test_a_tokenizer_with_chat_keeps_its_own() -> None:
    folder = SHARED / "model" / "smollm2_tokenizer"
    made = adopt_tokenizer(config(vocab_size=49_216, path=str(folder)))
    assert len(made) == 49_216
    assert "<|im_start|>" in made.chat_template
    assert "<|assistant|>" not in made.get_vocab()
    assert stop_ids(made) == [made.eos_token_id]
    original = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(made.backend_tokenizer.to_str())["model"] == original["model"]
