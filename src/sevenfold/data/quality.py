"""Repair and judgement of single documents: Unicode, language, and the filters of known corpora.

ftfy repairs, py3langid names the language, datatrove's own filters judge quality. All are imported
only where a setting asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sevenfold.base.errors import UsageError, nearest

Filter = Callable[[dict[str, Any]], str | None]
QualityName = Literal["gopher", "c4", "fineweb"]

# As much of a text as its language is told by: the share of errors stays, the time does not grow.
LANGUAGE_CHARACTERS = 1000
# Control characters, HTML entities, and what ftfy mends besides wrongly decoded text.
_SUSPECT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff]"
    "|&(?:[A-Za-z]|#)|\u00ef\u00bf\u00bd"
)
# No rule by which ftfy calls text badly decoded holds for ASCII and these alone.
_UNUSUAL = re.compile("[^\x00-\x7f“”‘’—–…]")  # noqa: RUF001
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")  # noqa: RUF001
_FACTOR = np.int64(0x5851F42D4C957F2D)
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+[\"'”’)]*|\n|$)")  # noqa: RUF001


def repairer() -> Callable[[str], str]:
    """Return what mends wrongly decoded text, HTML entities and control characters.

    Quotation marks, ligatures and full-width letters stay as they were written.
    """
    import ftfy
    from ftfy.badness import is_bad

    config = ftfy.TextFixerConfig(
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization=None,
        explain=False,
    )

    def repair(text: str) -> str:
        # ftfy alone reads 3 MB/s; most texts have nothing that it would change.
        suspect = _SUSPECT.search(text) or (
            not text.isascii()
            and any(is_bad(line) for line in text.splitlines() if _UNUSUAL.search(line))
        )
        return ftfy.fix_text(text, config) if suspect else text

    return repair


def language_filter(languages: Sequence[str]) -> Filter:
    """Return a filter that drops documents in other languages than these (ISO 639-1 codes).

    Errors:
        UsageError: a code that is not told apart.
    """
    identifier = language_identifier(languages, "clean.languages")
    wanted = set(languages)

    def look(document: dict[str, Any]) -> str | None:
        found: str = identifier.classify(document["text"][:LANGUAGE_CHARACTERS])[0]
        return None if found in wanted else f"language_{found}"

    return look


def language_identifier(languages: Sequence[str], setting: str) -> Any:
    """Return what tells languages apart, these among them; ``setting`` is where they stand.

    Errors:
        UsageError: a code that is not told apart.
        ImportError: py3langid is not installed.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    for code in languages:
        if code not in identifier.labels:
            raise UsageError(
                f"{setting}: '{code}' is not a language that is told apart"
                f"{nearest(code, identifier.labels)}"
            )
    return identifier


def quality_filters(names: Sequence[QualityName]) -> list[Filter]:
    """Return datatrove's filters of that name; ``c4`` also takes lines out of what it keeps.

    They split text by our own rule: with spaCy, their default, they judge a tenth as fast.
    """
    if not names:
        return []
    from datatrove.pipeline import filters

    words = _word_splitter()
    judges: dict[str, tuple[Any, ...]] = {
        "gopher": (filters.GopherQualityFilter(language=words), _RepetitionJudge(words)),
        "c4": (filters.C4QualityFilter(language=words),),
        "fineweb": (filters.FineWebQualityFilter(language=words),),
    }
    return [_judged_by(judge, name) for name in names for judge in judges[name]]


def _judged_by(judge: Any, name: str) -> Filter:
    from datatrove.data import Document

    def look(document: dict[str, Any]) -> str | None:
        given = Document(text=document["text"], id=document["id"])
        verdict = judge.filter(given)
        if verdict is True:
            document["text"] = given.text
            return None
        return f"{name}_{verdict[1].removeprefix(f'{name}_')}"

    return look


class _RepetitionJudge:
    """Gopher's repetition filter, asked only where bounds do not settle that it would pass.

    It counts nine kinds of runs of words one by one, 1 MB/s; most texts repeat hardly any.
    """

    def __init__(self, words: Any) -> None:
        from datatrove.pipeline.filters import GopherRepetitionFilter

        self.words = words
        self.whole = GopherRepetitionFilter(language=words)
        self.lines = GopherRepetitionFilter(language=words, top_n_grams=(), dup_n_grams=())

    def filter(self, document: Any) -> bool | tuple[bool, str]:
        """Return datatrove's verdict."""
        if self.lines.filter(document) is True and self._repeats_little(document.text):
            return True
        verdict: bool | tuple[bool, str] = self.whole.filter(document)
        return verdict

    def _repeats_little(self, text: str) -> bool:
        """True where no run of words can be repeated more than the filter allows.

        The most frequent run takes no more characters than the greatest product of frequency and
        length. Every word of a repeated run of five to ten stands in a repeated run of five.
        Equal hashes of different words can only make runs look more alike than they are.
        """
        words = self.words.word_tokenize(text)
        hashes = np.fromiter(map(hash, words), np.int64, len(words))
        ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))])
        for count, share in self.whole.top_n_grams:
            runs = _hash_runs(hashes, count)
            _, inverse, times = np.unique(runs, return_inverse=True, return_counts=True)
            lengths = ends[count:] - ends[: len(runs)] + count - 1
            if len(runs) and (times[inverse] * lengths).max() / len(text) > share:
                return False
        shortest = min(count for count, _ in self.whole.dup_n_grams)
        runs = _hash_runs(hashes, shortest)
        repeated = np.ones(len(runs), bool)
        repeated[np.unique(runs, return_index=True)[1]] = False
        in_one = np.zeros(len(words), bool)
        for place in range(shortest):
            in_one[place : place + len(runs)] |= repeated
        most = np.diff(ends)[in_one].sum() / len(text)
        return bool(most <= min(share for _, share in self.whole.dup_n_grams))


def _hash_runs(hashes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return a number for each run of ``count`` words."""
    num_runs = max(0, len(hashes) - count + 1)
    runs = np.zeros(num_runs, np.int64)
    for place in range(count):
        runs = runs * _FACTOR + hashes[place : place + num_runs]
    return runs


def _word_splitter() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Splitter(WordTokenizer):  # type: ignore[misc]
        """Words with their apostrophes, runs of other signs; the last text's are kept."""

        text = ""
        words: Sequence[str] = ()

        def word_tokenize(self, text: str) -> Sequence[str]:
            if self.text is not text:
                self.text, self.words = text, _WORD.findall(text)
            return self.words

        def sent_tokenize(self, text: str) -> list[str]:
            return [found for match in _SENTENCE.findall(text) if (found := match.strip())]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [found.span() for found in _SENTENCE.finditer(text) if found[0].strip()]

    return Splitter()
