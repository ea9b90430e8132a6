"""Text of any size that nobody wrote: for measuring what is done to text before there is some.

Words follow Zipf's law over a large vocabulary, and one in thirty is new, so that caches of words
help about as much as they do on prose. Tokens of real text are longer and rarer: measure speed on
real text where there is some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.data.clean import Document

NUM_WORDS, ZIPF, NEW_SHARE = 200_000, 1.0, 1 / 30
# Of the logarithm of a document's words: a median of 330 words, and a long tail, as on the web.
MEAN_LOG_WORDS, SPREAD_LOG_WORDS = 5.8, 1.1
# Of the logarithm of MMLU's characters, mean and spread over its 14,042 test items: a question;
# one of its four answers, which are about as long as each other.
QUESTION, ANSWER = (5.01, 1.04), (3.25, 1.05)
_SYLLABLES = [
    *(first + second for first in "bcdfghklmnprstvw" for second in "aeio"),
    *("ing", "er", "ed", "ly", "st", "th"),
]
_DOCUMENTS_AT_ONCE = 200


def random_documents(num_bytes: int, *, seed: int) -> Iterator[Document]:
    """Yield documents of at least ``num_bytes`` bytes in all, the same for the same ``seed``."""
    generator = np.random.default_rng(seed)
    draw = _prose(generator)
    done = number = 0
    while done < num_bytes:
        sizes = generator.lognormal(MEAN_LOG_WORDS, SPREAD_LOG_WORDS, _DOCUMENTS_AT_ONCE)
        ends = np.cumsum(sizes.astype(np.int64) + 1)
        drawn = draw(int(ends[-1]))
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            text = " ".join(drawn[start:end])
            yield {"id": f"random-{number}", "text": text, "source": f"random-{number % 3}"}
            number += 1
            done += len(text)
            if done >= num_bytes:
                return


def random_questions(count: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` rows in MMLU's layout, as long as MMLU's are: median, mean and long tail."""
    generator = np.random.default_rng(seed)
    draw = _prose(generator)
    for number in range(count):
        asked, answer = (
            max(1, round(float(generator.lognormal(*logs)))) for logs in (QUESTION, ANSWER)
        )
        words = " ".join(draw(asked // 2 + 4 * (answer // 2) + 5))
        cuts = [words[asked + place * answer :][:answer].strip() for place in range(4)]
        yield {
            "id": f"random-{number}",
            "subject": f"subject_{number % 57}",
            "question": words[:asked],
            "choices": [cut or "none" for cut in cuts],
            "answer": int(generator.integers(4)),
        }


def _prose(generator: np.random.Generator) -> Callable[[int], NDArray[np.object_]]:
    """Return what draws that many words."""
    words = np.array(_new_words(generator, NUM_WORDS), dtype=object)
    shares = 1 / np.arange(1, NUM_WORDS + 1) ** ZIPF
    bounds = np.cumsum(shares / shares.sum())

    def draw(count: int) -> NDArray[np.object_]:
        drawn = words[np.searchsorted(bounds, generator.random(count), side="right")]
        new = np.flatnonzero(generator.random(count) < NEW_SHARE)
        drawn[new] = _new_words(generator, len(new))
        return drawn

    return draw


def _new_words(generator: np.random.Generator, count: int) -> list[str]:
    sizes = generator.integers(1, 5, count).tolist()
    drawn = iter(generator.integers(0, len(_SYLLABLES), sum(sizes)).tolist())
    return ["".join(_SYLLABLES[next(drawn)] for _ in range(size)) for size in sizes]
