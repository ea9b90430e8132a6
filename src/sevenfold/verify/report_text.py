"""How the report writes numbers, times, devices and other people's text."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from sevenfold.base.records import GATED_STAGES

MINUS = "\N{MINUS SIGN}"
MAX_CHARACTERS_SHOWN = 900
TOLD = {
    "fail": ("failed", "failed"),
    "inconclusive": ("is inconclusive", "are inconclusive"),
    "not judged": ("is not judged", "are not judged"),
    "not run": ("has not run", "have not run"),
    "unfinished": ("is unfinished", "are unfinished"),
}
ONES = ("None", "One", "Two", "Three", "Four")


def number(value: object) -> str:
    """Return a number with about three significant digits and no exponent where it is readable."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if value == 0:
        return "0"
    if isinstance(value, int) or (abs(value) >= 1000 and value == value):
        return f"{value:,.0f}".replace("-", MINUS)
    if abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", MINUS)
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:.{decimals}f}".replace("-", MINUS)


def plain(value: float) -> str:
    """Return a number as it stands in a file of thresholds: 0.8, 2.66, 1e-4."""
    return f"{value:.4g}".replace("-", MINUS)


def money(value: float) -> str:
    """Return an amount of money with two decimals."""
    return f"{value:,.2f}"


def count(value: object) -> str:
    """Return a whole number with thousands separated."""
    return f"{value:,.0f}" if isinstance(value, int | float) else ""


def size(parameters: int) -> str:
    """Return a number of parameters as people say it: 430,752, 124.0 M, 7.39 B."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e7 else f"{parameters:,}"


def duration(seconds: object) -> str:
    """Return seconds as people say them: 42 s, 3 min 20 s, 5 h 02 min, 3 d 4 h."""
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def moment(seconds: object) -> str:
    """Return a time stamp as a date in UTC."""
    if not isinstance(seconds, int | float):
        return ""
    at = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def short(fingerprint: object) -> str:
    """Return the first twelve characters of a fingerprint."""
    return str(fingerprint)[:12]


def clip(text: object) -> str:
    """Return ``text``, shortened with a note where it is too long to read in a table."""
    text = str(text)
    left_out = len(text) - MAX_CHARACTERS_SHOWN
    if left_out <= 0:
        return text
    return f"{text[:MAX_CHARACTERS_SHOWN]} … ({left_out:,} characters more)"


def device(name: object, several: object) -> str:
    """Return a device's name, with its number where there are several."""
    number_first = isinstance(several, int) and several > 1
    return f"{several} \N{MULTIPLICATION SIGN} {name}" if number_first else str(name or "")


def prompt(value: Any) -> str:
    """Return a prompt as text; a conversation becomes one line a message."""
    if isinstance(value, list):
        messages = [m for m in value if isinstance(m, Mapping)]
        if len(messages) == 1:
            return str(messages[0].get("content", ""))
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)
    return str(value or "")


def headline(standings: Sequence[tuple[str, str]]) -> str:
    """Say in one sentence how many gates let their model pass; takes (stage, word)."""
    groups: dict[str, list[str]] = {}
    for stage, word in standings:
        groups.setdefault(word, []).append(stage)
    num_passed = len(groups.pop("pass", ()))
    if num_passed == len(GATED_STAGES):
        return "All four stages passed their gates."
    if set(groups) == {"not run"} and not num_passed:
        return "No stage has been trained yet."
    whose = "its gate" if num_passed == 1 else "their gates"
    told = [_told(stages, word) for word, stages in groups.items()]
    return f"{ONES[num_passed]} of four stages passed {whose}; {', '.join(told)}."


def _told(stages: Sequence[str], word: str) -> str:
    one, several = TOLD.get(word, (word, word))
    if len(stages) == 1:
        return f"{stages[0]} {one}"
    return f"{', '.join(stages[:-1])} and {stages[-1]} {several}"
