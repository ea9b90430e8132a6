"""Repair and judgement of single documents: Unicode, language, and the filters of known corpora.

ftfy repairs, py3langid names the language, datatrove's own filters judge quality. All are imported
only where a setting asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    for code in languages:
        if code not in identifier.labels:
            raise UsageError(
                f"clean.languages: '{code}' is not a language that is told apart"
                f"{nearest(code, identifier.labels)}"
            )
    wanted = set(languages)

    def look(document: dict[str, Any]) -> str | None:
        found: str = identifier.classify(document["text"][:LANGUAGE_CHARACTERS])[0]
        return None if found in wanted else f"language_{found}"

    return look


def quality_filters(names: Sequence[QualityName]) -> list[Filter]:
    """Return datatrove's filters of that name; ``c4`` also takes lines out of what it keeps.

    They split text by our own rule: with spaCy, their default, they judge a tenth as fast.
    """
    if not names:
        return []
    from datatrove.pipeline import filters

    words = _word_splitter()
    kinds = {
        "gopher": (filters.GopherQualityFilter, filters.GopherRepetitionFilter),
        "c4": (filters.C4QualityFilter,),
        "fineweb": (filters.FineWebQualityFilter,),
    }
    return [_judged_by(kind(language=words), name) for name in names for kind in kinds[name]]


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
