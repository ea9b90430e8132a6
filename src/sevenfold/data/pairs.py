"""The shapes of preference rows that are understood, and their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sevenfold.base.errors import BadDataError
from sevenfold.data.rows import (
    Message,
    column_names,
    opening_turns,
    optional_string,
    read_message,
    read_messages,
    require_conversation,
    strip_alpaca,
)
from sevenfold.data.strict_json import Values, kind_of


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt; ``rejected`` is None where there is only one to learn."""

    where: str
    source: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None


_DIALOGUE_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def read_pair(values: Values, where: str, source: str, *, single: bool = False) -> Pair:
    """Return the pair in a preference row of any known shape.

    ``single`` lets rows without ``rejected`` through: answers that are repeated so that preference
    training forgets nothing.

    Errors:
        BadDataError: no known shape, two different prompts, two equal answers, an empty one.
    """
    if single and "rejected" not in values and "chosen" in values:
        values = values | {"rejected": None}
    for field in ("chosen", "rejected"):
        if field not in values:
            found = column_names(values)
            raise BadDataError(
                f"{where}:{field}: missing; the columns are {found}; expected prompt, chosen, "
                "rejected; rename with columns: {ours: theirs}"
            )
    prompt, chosen = _side(values, "chosen", where)
    if single and values["rejected"] is None:
        return Pair(where=where, source=source, prompt=prompt, chosen=chosen, rejected=None)
    other, rejected = _side(values, "rejected", where)
    if prompt != other:
        raise BadDataError(
            f"{where}:rejected: its prompt is not that of 'chosen'; both must answer the same; "
            "remove the row"
        )
    if chosen.strip() == rejected.strip():
        raise BadDataError(
            f"{where}:rejected: equal to 'chosen', so there is nothing to prefer; remove the row"
        )
    return Pair(where=where, source=source, prompt=prompt, chosen=chosen, rejected=rejected)


def _side(values: Values, field: str, where: str) -> tuple[tuple[Message, ...], str]:
    """Return prompt and answer of one side."""
    turns = _turns(values, field, where)
    if not turns or turns[-1]["role"] != "assistant":
        raise BadDataError(
            f"{where}:{field}: does not end with the assistant's answer; add it or remove the row"
        )
    if not turns[-1]["content"].strip():
        raise BadDataError(f"{where}:{field}: empty, expected an answer; remove the row")
    prompt = tuple(Message(role=m["role"], content=m["content"]) for m in turns[:-1])
    require_conversation(prompt, where, _prompt_field(values, field), answered=False)
    return prompt, turns[-1]["content"]


def _prompt_field(values: Values, field: str) -> str:
    return next((name for name in ("conversations", "prompt") if values.get(name)), field)


def _turns(values: Values, field: str, where: str) -> tuple[Message, ...]:
    answer = values[field]
    if "conversations" in values:
        opening = read_messages(values["conversations"], where, "conversations")
        system = optional_string(values, "system", where)
        if system.strip():
            opening = (Message(role="system", content=system), *opening)
        return (*opening, _answer(answer, where, field))
    if isinstance(answer, list):
        turns = read_messages(answer, where, field)
        if len(turns) == 1 and values.get("prompt"):
            return (*opening_turns(values, "prompt", where), *turns)
        return turns
    if "prompt" not in values and isinstance(answer, str) and _DIALOGUE_TURN.match(answer):
        return _dialogue(answer)
    if "prompt" not in values:
        found = column_names(values)
        raise BadDataError(
            f"{where}:prompt: missing; the columns are {found}; add it, or give dialogues that "
            "begin with 'Human:'"
        )
    opening = opening_turns(values, "prompt", where)
    if len(opening) == 1 and _DIALOGUE_TURN.match(opening[0]["content"]):
        opening = _dialogue(opening[0]["content"])
        opening = opening[:-1] if opening[-1] == _SILENT_ANSWER else opening
    elif len(opening) == 1 and opening[0]["role"] == "user":
        opening = (Message(role="user", content=strip_alpaca(opening[0]["content"])),)
    return (*opening, _answer(answer, where, field))


_SILENT_ANSWER = Message(role="assistant", content="")


def _answer(answer: Any, where: str, field: str) -> Message:
    if isinstance(answer, dict):
        return read_message(answer, where, field)
    if not isinstance(answer, str):
        raise BadDataError(
            f"{where}:{field}: found {kind_of(answer)}, expected a string; mend the row"
        )
    return Message(role="assistant", content=answer)


def _dialogue(text: str) -> tuple[Message, ...]:
    """Return the turns of one string with ``Human:`` and ``Assistant:`` before them."""
    parts = _DIALOGUE_TURN.split(text.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[name], content=content.strip())
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    )
