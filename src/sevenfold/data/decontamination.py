"""Evaluation items, found in training data by the words they share, so that they can be left out.

Words are compared, without case, punctuation and space. An item is found by any ``ngram`` of its
words in a row (Brown et al. 2020, arXiv:2005.14165, appendix C; 13 there). A shorter item is found
by all its words in a row; one of fewer than eight words only where a sentence or line begins and
ends with it, because so few words meet by chance; one of fewer than four is not looked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sevenfold.base.config import configuration, fingerprint

METHOD = 1  # goes into every index's fingerprint; raise it when the same items are found otherwise
MIN_PHRASE_WORDS = 8
MIN_SENTENCE_WORDS = 4
# Words that stand in more items of a task than this are its wording (an instruction, a refusal),
# not an item's own; they count only for items that have nothing else.
MAX_ITEMS_SHARING = 10
REASON = "contaminated_by_"

_HAN_AND_KANA = r"\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character is a word
_TOKENS = re.compile(rf'[\n.!?:;"“”]+|[{_HAN_AND_KANA}]|[^\W_{_HAN_AND_KANA}]+')
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MAX_KNOWN_WORDS = 2**20
_Hashes = NDArray[np.uint64]


@configuration
class DecontaminationConfig:
    """How evaluation items are looked for in training data: by so many words in a row."""

    ngram: Annotated[int, Field(ge=MIN_PHRASE_WORDS, le=50)]


@dataclass(frozen=True, kw_only=True)
class TaskTexts:
    """A task's items, each as the texts it may be met as; ``sha256`` identifies their files.

    ``read`` is called only when an index is built.
    """

    sha256: str
    read: Callable[[], Iterable[Sequence[str]]]


def index_fingerprint(config: DecontaminationConfig, tasks: Mapping[str, str]) -> str:
    """Return what identifies an index: how it looks, and the SHA-256 of each task's items."""
    return fingerprint([METHOD, config.ngram, dict(sorted(tasks.items()))])


class ItemIndex:
    """The words in a row by which the items of all tasks are found.

    ``facts`` is what a manifest says: ``{index, ngram, tasks: {name: {sha256, items,
    too_short}}}``.
    """

    def __init__(self, config: DecontaminationConfig, tasks: Mapping[str, TaskTexts]) -> None:
        """Read the items of every task."""
        self.ngram = config.ngram
        self.tasks = tuple(sorted(tasks))
        self._words = _WordHashes()
        tables: list[_Table] = []
        counts = {}
        for number, name in enumerate(self.tasks):
            items = list(tasks[name].read())
            table, found = self._table(items, number)
            tables.append(table)
            counts[name] = {
                "sha256": tasks[name].sha256,
                "items": len(items),
                "too_short": len(items) - found,
            }
        self._by_length = _by_length(tables)
        hashes = {name: tasks[name].sha256 for name in self.tasks}
        self.facts: dict[str, Any] = {
            "index": index_fingerprint(config, hashes),
            "ngram": config.ngram,
            "tasks": counts,
        }

    def find(self, texts: Iterable[str]) -> str | None:
        """Return the task of which an item stands in one of ``texts``, or None."""
        found = [task for text in texts if (task := self._find(text)) is not None]
        return self.tasks[min(found)] if found else None

    def reason(self, texts: Iterable[str]) -> str | None:
        """Return why a document or row of these texts is left out, or None."""
        task = self.find(texts)
        return None if task is None else f"{REASON}{task}"

    def _find(self, text: str) -> int | None:
        if not self._by_length:
            return None
        words, begins, ends = self._words.of(text)
        found = []
        for length, rolled in _rolling(words, max(self._by_length)):
            known = self._by_length.get(length)
            if known is None:
                continue
            if length < MIN_PHRASE_WORDS:
                rolled = rolled[begins[: len(rolled)] & ends[length - 1 :]]
            if (task := known.lowest_task(rolled)) is not None:
                found.append(task)
        return min(found, default=None)

    def _table(self, items: Sequence[Sequence[str]], task: int) -> tuple[_Table, int]:
        """Return what one task's items are found by, and how many of them can be found."""
        hashes, lengths, numbers = [], [], []
        for number, texts in enumerate(items):
            for text in texts:
                words = self._words.of(text)[0]
                length = min(self.ngram, len(words))
                if length < MIN_SENTENCE_WORDS:
                    continue
                *_, (_, rolled) = _rolling(words, length)
                own = np.unique(rolled)
                hashes.append(own)
                lengths.append(np.full(len(own), length))
                numbers.append(np.full(len(own), number))
        if not hashes:
            return _Table.empty(), 0
        table = _Table(np.concatenate(hashes), np.concatenate(lengths), np.concatenate(numbers))
        return table.without_shared(len(items), task), len(np.unique(table.numbers))


@dataclass(frozen=True)
class _Table:
    """Hashes of words in a row, how many words, and of which item (later: of which task)."""

    hashes: _Hashes
    lengths: NDArray[np.int64]
    numbers: NDArray[np.int64]

    @classmethod
    def empty(cls) -> _Table:
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))

    def without_shared(self, num_items: int, task: int) -> _Table:
        """Leave out what many items share, and put the task in place of the items."""
        pairs = np.unique(np.rec.fromarrays([self.hashes, self.numbers]))
        distinct, sharing = np.unique(pairs["f0"], return_counts=True)
        own = sharing[np.searchsorted(distinct, self.hashes)] <= MAX_ITEMS_SHARING
        has_own = np.bincount(self.numbers[own], minlength=num_items) > 0
        kept = own | ~has_own[self.numbers]
        return _Table(self.hashes[kept], self.lengths[kept], np.full(kept.sum(), task))


class _Known:
    """The hashes of one length, sorted, each with its first task; a bit map says no quickly."""

    def __init__(self, hashes: _Hashes, tasks: NDArray[np.int64]) -> None:
        order = np.lexsort((tasks, hashes))
        self.hashes, first = np.unique(hashes[order], return_index=True)
        self.tasks = tasks[order][first]
        self.shift = np.uint64(64 - max(10, (8 * len(self.hashes)).bit_length()))
        self.bits = np.zeros(2 ** int(64 - self.shift), np.bool_)
        self.bits[self.hashes >> self.shift] = True

    def lowest_task(self, rolled: _Hashes) -> int | None:
        likely = rolled[self.bits[rolled >> self.shift]]
        if not len(likely):
            return None
        at = np.minimum(np.searchsorted(self.hashes, likely), len(self.hashes) - 1)
        found = self.tasks[at[self.hashes[at] == likely]]
        return int(found.min()) if len(found) else None


def _by_length(tables: Sequence[_Table]) -> dict[int, _Known]:
    if not tables:
        return {}
    hashes = np.concatenate([table.hashes for table in tables])
    lengths = np.concatenate([table.lengths for table in tables])
    tasks = np.concatenate([table.numbers for table in tables])
    chosen = {int(length): lengths == length for length in np.unique(lengths)}
    return {length: _Known(hashes[rows], tasks[rows]) for length, rows in chosen.items()}


class _WordHashes(dict[str, int]):
    """Words to 64-bit numbers, the same in every process; a boundary between sentences is 0."""

    def __missing__(self, token: str) -> int:
        if len(self) > _MAX_KNOWN_WORDS:
            self.clear()
        word = token[0].isalnum()
        found = int.from_bytes(blake2b(token.encode(), digest_size=8).digest()) | 1 if word else 0
        self[token] = found
        return found

    def of(self, text: str) -> tuple[_Hashes, NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the words' numbers, and which words a sentence or line begins and ends with."""
        plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
        tokens = _TOKENS.findall(plain.casefold())
        numbers = np.fromiter(map(self.__getitem__, tokens), np.uint64, len(tokens))
        is_word = numbers != 0
        edge = np.concatenate(([False], is_word, [False]))
        return numbers[is_word], ~edge[:-2][is_word], ~edge[2:][is_word]


def _rolling(words: _Hashes, longest: int) -> Iterable[tuple[int, _Hashes]]:
    """Yield 1, 2, ... ``longest`` and the hashes of so many words in a row, from every place."""
    rolled = np.zeros(len(words) + 1, np.uint64)
    for length in range(1, min(longest, len(words)) + 1):
        rolled = rolled[:-1] * _FACTOR + words[length - 1 :]
        yield length, rolled
