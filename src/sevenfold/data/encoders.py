"""Text to ids at corpus scale: gigatoken where it is proved equal, else tokenizers.

gigatoken encodes some fifty times as fast. It is used only after it has given the very ids of
tokenizers, which trained the vocabulary and which every model of ours is read with, on a sample of
the run's own documents and on text made to trip a tokenizer up. That alone would not do: it knows
the letters of Unicode 17, tokenizers those of Unicode 16, and a sample rarely holds them. Texts
with one of those code points go through tokenizers.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sevenfold.base.errors import install_command

Engine = Literal["gigatoken", "tokenizers"]

INSTALL_GIGATOKEN = install_command("data")
NUM_HARD_TEXTS = 400
# Where gigatoken 0.10 and tokenizers 0.23 cut words differently: bench/code_points.py looks at all
# 1,112,064 code points in eight surroundings.
CUT_DIFFERENTLY = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2)),
    *((0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7)),
    *((0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3)),
    *((0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2)),
    *((0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED)),
    *((0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD)),
    (0x323B0, 0x33479),
)
# Pieces that break tokenizers: white space of all kinds, digits, marks that join or combine,
# private use, right to left, what NFC would change, quotes and cases of the English contractions.
_PIECES = (
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u1680",
    "\u2003", "\u2028", "\u2029", "\u200b", "\u202e", "\u2060", "\u3000", "\ufeff", "\x00",
    "\x01", "\x7f", "\u200d", "\ufe0f", "e\u0301", "e\u0301\u0323", "\u0301", "\u212b", "ﬁ",
    "ß", "ẞ", "\u0130", "\u0131", "\u017f", "\u212a", "'s", "'S", "'\u017f", "'re", "'LL",
    "\u2019s", "don't", "0", "12", "123", "1234567", "٣٤٥", "Ⅷ", "½", "²", "१२३",
    "\U0001d7d9\U0001d7da", "word", "Word", "WORD", "naïve", "straße", "слово", "κόσμος", "漢字",
    "かな", "한글", "ไทย", "עברית", "العربية", "हिन्दी", "👍", "👍🏽", "👨\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈", "🇩🇪", "\ue000", "\uf8ff", "\U000f0000", "\U0010ffff", "\ufffd", "\uffff",
    "...", "!?", "--", "—", "_", "__init__", "#", "@a", "://", "<|", "|>", "<s>", "</s>", "{",
    "}", "$x^2$", "\\n", "a" * 300, "ab" * 700, "9" * 200, " " * 100, "=" * 80, "é" * 90,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tokeniser:
    """Which engine encodes, its version, and on how many documents it was compared.

    ``why`` says for people why it is not the fast one; None where it is.
    """

    engine: Engine
    version: str
    checked_documents: int
    why: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return what a manifest keeps."""
        return {
            "engine": self.engine,
            "version": self.version,
            "checked_documents": self.checked_documents,
        }


def choose(backend_json: str, sample: Iterable[str]) -> Tokeniser:
    """Return the fastest engine that gives exactly the ids of tokenizers.

    ``backend_json`` is the tokenizer as :mod:`tokenizers` writes it; ``sample`` documents of the
    text that is to be encoded.
    """
    try:
        version = importlib.metadata.version("gigatoken")
        _gigatoken(backend_json)
    except ImportError:
        why = f"gigatoken, which is much faster, is not installed ({INSTALL_GIGATOKEN})"
        return _slow(0, why)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        return _slow(0, f"gigatoken does not read it ({' '.join(str(error).split())[:120]})")
    texts = [*hard_texts(backend_json), *sample]
    ids, counts = encode("gigatoken", backend_json, texts)
    expected_ids, expected_counts = _encode_slowly(backend_json, texts)
    if not (np.array_equal(ids, expected_ids) and np.array_equal(counts, expected_counts)):
        return _slow(len(texts), "gigatoken gives other ids on the check sample")
    return Tokeniser(engine="gigatoken", version=version, checked_documents=len(texts))


def slow() -> Tokeniser:
    """Return tokenizers, for texts so small that a comparison would take longer than it saves."""
    return _slow(0, None)


def _slow(checked_documents: int, why: str | None) -> Tokeniser:
    version = importlib.metadata.version("tokenizers")
    return Tokeniser(
        engine="tokenizers", version=version, checked_documents=checked_documents, why=why
    )


def encode(
    engine: Engine, backend_json: str, texts: Sequence[str]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the ids of all texts, one after the other, and how many each text has.

    No control token is added, and what looks like one is encoded as the text that it is.
    """
    if engine == "tokenizers":
        return _encode_slowly(backend_json, texts)
    unsafe = _cut_differently(texts)
    if not unsafe:
        return encode_fast(backend_json, texts)
    parts = []
    for slowly, group in itertools.groupby(enumerate(texts), lambda text: text[0] in unsafe):
        encode_some = _encode_slowly if slowly else encode_fast
        parts.append(encode_some(backend_json, [text for _, text in group]))
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([n for _, n in parts])


def encode_fast(
    backend_json: str, texts: Sequence[str]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return what gigatoken makes of ``texts``, in one thread: processes share the cores."""
    import awkward

    found = _gigatoken(backend_json).encode_batch(list(texts), parallel=False)
    ids = awkward.to_numpy(awkward.flatten(found))
    return np.asarray(ids, np.uint32), np.asarray(awkward.to_numpy(awkward.num(found)), np.int64)


def _cut_differently(texts: Sequence[str]) -> set[int]:
    """Return which texts hold a code point at which the engines differ."""
    joined = "".join(texts)
    if joined.isascii():
        return set()
    found = _table()[np.frombuffer(joined.encode("utf-32-le"), np.uint32)]
    if not found.any():
        return set()
    ends = np.cumsum([len(text) for text in texts])
    return set(np.searchsorted(ends, np.flatnonzero(found), side="right").tolist())


@functools.cache
def _table() -> NDArray[np.bool_]:
    table = np.zeros(sys.maxunicode + 1, dtype=bool)
    for first, last in CUT_DIFFERENTLY:
        table[first : last + 1] = True
    return table


def _encode_slowly(
    backend_json: str, texts: Sequence[str]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    encoded = _tokenizers(backend_json).encode_batch_fast(list(texts), add_special_tokens=False)
    ids = [np.array(encoding.ids, np.uint32) for encoding in encoded]
    counts = np.array([len(each) for each in ids], np.int64)
    return np.concatenate(ids) if ids else np.empty(0, np.uint32), counts


@functools.lru_cache(maxsize=1)
def _tokenizers(backend_json: str) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(backend_json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


@functools.lru_cache(maxsize=1)
def _gigatoken(backend_json: str) -> Any:
    """Return gigatoken's form of the tokenizer, which knows no control token: all text is text."""
    import gigatoken

    facts = json.loads(backend_json)
    facts["added_tokens"] = [token for token in facts["added_tokens"] if not token["special"]]
    facts |= dict.fromkeys(("post_processor", "truncation", "padding"))
    return gigatoken.Tokenizer.from_json(json.dumps(facts))


def hard_texts(backend_json: str, count: int = NUM_HARD_TEXTS, seed: int = 0) -> list[str]:
    """Return texts made to trip a tokenizer up, among them its own control tokens, spelt out."""
    chosen = random.Random(seed)
    special = [token["content"] for token in json.loads(backend_json)["added_tokens"]]
    pieces = [*_PIECES, *special[:40]]
    mixed = ["".join(chosen.choices(pieces, k=chosen.randint(1, 24))) for _ in range(count)]
    scalars = [*range(0xD800), *range(0xE000, 0x110000)]  # every code point that text may hold
    anything = ["".join(map(chr, chosen.sample(scalars, 12))) for _ in range(count // 4)]
    return ["", *pieces, *mixed, *anything]
