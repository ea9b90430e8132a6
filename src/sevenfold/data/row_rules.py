"""Which instruction rows and preference pairs are left out, each with the reason that is counted.

Languages are told by py3langid. Prompts are near-duplicates where MinHash (rensa) puts the Jaccard
similarity of their runs of five letters at 0.8 or more; of such prompts the first one stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sevenfold.base.config import configuration
from sevenfold.base.errors import UsageError, install_command
from sevenfold.data.quality import language_identifier
from sevenfold.data.strict_json import Values

SIMILAR = 0.8
NUM_BANDS, BAND_ROWS = 16, 8
RUN_LETTERS = 5
# The language of less than this is told wrongly too often; of more than that, no better.
LANGUAGE_CHARACTERS = (100, 2000)
INSTALL = install_command("data")


@configuration
class RowRulesConfig:
    """What is left out of the rows.

    ``min_answer_characters`` of the shortest answer, ``max_characters`` of the whole row;
    ``languages`` (ISO 639-1) are the only ones kept, null: all; ``unique_prompts`` keeps one of
    prompts that are nearly the same. Of preference pairs also those go that are a tie by their
    scores, or rank the chosen answer lower, or whose answers differ in white space only.
    """

    min_answer_characters: Annotated[int, Field(ge=1)]
    max_characters: Annotated[int, Field(ge=1)] | None
    languages: tuple[str, ...] | None
    unique_prompts: bool

    def __post_init__(self) -> None:
        """Check that some language is kept."""
        if self.languages is not None and not self.languages:
            raise ValueError("'languages' names at least one language, or is null to keep all")


class RowRules:
    """The rules at work; it remembers the prompts it has seen."""

    def __init__(self, config: RowRulesConfig | None) -> None:
        """Load what the rules need.

        Errors:
            UsageError: a package is missing, or a language is not told apart.
        """
        self._config = config
        self._identifier = None
        if config is not None and config.languages is not None:
            self._identifier = _language_identifier(config.languages)
        self._prompts = _Prompts() if config is not None and config.unique_prompts else None

    def reason(self, prompt: str, answers: Sequence[str]) -> str | None:
        """Return why a row is left out, or None."""
        config = self._config
        if config is None:
            return None
        if min(len(answer.strip()) for answer in answers) < config.min_answer_characters:
            return "short_answer"
        text = "\n".join((prompt, *answers))
        if config.max_characters is not None and len(text) > config.max_characters:
            return "too_long"
        least, most = LANGUAGE_CHARACTERS
        if self._identifier is not None and len(text) >= least:
            found = str(self._identifier.classify(text[:most])[0])
            if found not in (config.languages or ()):
                return f"language_{found}"
        if self._prompts is not None and not self._prompts.is_new(prompt):
            return "near_duplicate_prompt"
        return None

    def pair_reason(self, values: Values) -> str | None:
        """Return why a preference row is left out before its form is checked, or None."""
        if self._config is None:
            return None
        chosen, rejected = (_last_text(values.get(field)) for field in ("chosen", "rejected"))
        if chosen is not None and rejected is not None and chosen.split() == rejected.split():
            return "same_answers"
        scores = [values.get(f"score_{field}") for field in ("chosen", "rejected")]
        if not all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores):
            return None
        if scores[0] == scores[1]:
            return "tie"
        return "ranked_lower" if scores[0] < scores[1] else None  # type: ignore[operator]


def _last_text(answer: Any) -> str | None:
    """Return an answer's text: a string, a message, or the last of several."""
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    return answer if isinstance(answer, str) else None


def _language_identifier(languages: Sequence[str]) -> Any:
    try:
        return language_identifier(languages, "rules.languages")
    except ImportError:
        raise UsageError(f"rules.languages needs py3langid, not installed; {INSTALL}") from None


class _Prompts:
    """Prompts seen so far, by bands of their MinHash."""

    def __init__(self) -> None:
        try:
            from rensa import RMinHash
        except ImportError:
            raise UsageError(
                f"rules.unique_prompts needs rensa, not installed; {INSTALL}"
            ) from None
        self._minhash = RMinHash
        self._signatures: list[NDArray[np.uint32]] = []
        self._first: dict[tuple[int, bytes], int] = {}

    def is_new(self, prompt: str) -> bool:
        """True unless a prompt that was new before is nearly the same; notes it if it is."""
        signature = self._sign(prompt)
        bands = signature.reshape(NUM_BANDS, BAND_ROWS)
        keys = [(number, band.tobytes()) for number, band in enumerate(bands)]
        likely = {self._first[key] for key in keys if key in self._first}
        if any((self._signatures[at] == signature).mean() >= SIMILAR for at in likely):
            return False
        for key in keys:
            self._first.setdefault(key, len(self._signatures))
        self._signatures.append(signature)
        return True

    def _sign(self, prompt: str) -> NDArray[np.uint32]:
        text = " ".join(re.findall(r"\w+", prompt.casefold())) or prompt
        last = max(1, len(text) - RUN_LETTERS + 1)
        made = self._minhash(num_perm=NUM_BANDS * BAND_ROWS, seed=1)
        made.update(sorted({text[at : at + RUN_LETTERS] for at in range(last)}))
        return np.array(made.digest(), np.uint32)
