"""The shapes of instruction rows that are understood, and their checks.

Whatever a data set calls its columns, a row becomes :class:`Example`. What is wrong with it is said
as ``file:line:field``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

from sevenfold.base.errors import BadDataError
from sevenfold.data.strict_json import Values, kind_of


class Message(TypedDict):
    """One turn; ``weight`` 0 keeps an assistant's turn from carrying loss."""

    role: str
    content: str
    weight: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation, or one text of which every token trains."""

    where: str
    source: str
    messages: tuple[Message, ...] = ()
    text: str = ""


ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
_ALPACA = re.compile(
    r"\ABelow is an instruction that describes a task.*?\n\n### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*\Z",
    re.DOTALL,
)


# --- instructions -------------------------------------------------------------------------------


def read_examples(values: Values, where: str, source: str) -> list[Example]:
    """Return the examples in an instruction row of any known shape.

    Errors:
        BadDataError: no known shape, or something in it is wrong.
    """
    for required, read in _SHAPES:
        if all(column in values for column in required):
            return [replace(e, where=where, source=source) for e in read(values, where)]
    partial = max(_SHAPES, key=lambda shape: sum(column in values for column in shape[0]))[0]
    missing = [column for column in partial if column not in values]
    found = column_names(values)
    shapes = "; ".join("+".join(required) for required, _ in _SHAPES)
    raise BadDataError(
        f"{where}:{missing[0]}: missing; the columns are {found}; expected one of: {shapes}; "
        "rename with columns: {ours: theirs}"
    )


def _chat(prompt: str, answer: str, system: str = "") -> Example:
    opening = [Message(role="system", content=system)] if system.strip() else []
    turns = [Message(role="user", content=prompt), Message(role="assistant", content=answer)]
    return Example(where="", source="", messages=(*opening, *turns))


def _from_messages(values: Values, where: str) -> list[Example]:
    messages = read_messages(values["messages"], where, "messages")
    require_conversation(messages, where, "messages", answered=True)
    return [Example(where="", source="", messages=messages)]


def _from_conversations(values: Values, where: str) -> list[Example]:
    messages = read_messages(values["conversations"], where, "conversations")
    system = optional_string(values, "system", where)
    if system.strip() and messages and messages[0]["role"] != "system":
        messages = (Message(role="system", content=system), *messages)
    require_conversation(messages, where, "conversations", answered=True)
    return [Example(where="", source="", messages=messages)]


def _from_instances(values: Values, where: str) -> list[Example]:
    instruction = required_string(values, "instruction", where)
    instances = values["instances"]
    if not isinstance(instances, list) or not instances:
        raise BadDataError(
            f"{where}:instances: found {kind_of(instances)}, expected a list of at least one "
            "{input, output}; mend the row"
        )
    examples = []
    for index, instance in enumerate(instances):
        field = f"{where}:instances[{index}]"
        if not isinstance(instance, dict):
            raise BadDataError(
                f"{field}: found {kind_of(instance)}, expected {{input, output}}; mend the row"
            )
        prompt = _joined(instruction, optional_string(instance, "input", field))
        examples.append(_chat(prompt, required_string(instance, "output", field)))
    return examples


def _from_instruction(context: str, answer: str) -> Callable[[Values, str], list[Example]]:
    def read(values: Values, where: str) -> list[Example]:
        prompt = _joined(
            required_string(values, "instruction", where), optional_string(values, context, where)
        )
        system = optional_string(values, "system", where)
        return [_chat(prompt, required_string(values, answer, where), system)]

    return read


def _from_prompt(prompt: str, answer: str) -> Callable[[Values, str], list[Example]]:
    def read(values: Values, where: str) -> list[Example]:
        if isinstance(values[prompt], list) or isinstance(values[answer], list):
            messages = (
                *opening_turns(values, prompt, where),
                *read_messages(values[answer], where, answer),
            )
            require_conversation(messages, where, answer, answered=True)
            return [Example(where="", source="", messages=messages)]
        question = strip_alpaca(required_string(values, prompt, where))
        return [_chat(question, required_string(values, answer, where))]

    return read


def opening_turns(values: Values, prompt: str, where: str) -> tuple[Message, ...]:
    """Return the prompt as turns: a list of them, or a string that is the user's."""
    if isinstance(values[prompt], list):
        return read_messages(values[prompt], where, prompt)
    return (Message(role="user", content=required_string(values, prompt, where)),)


def _from_text(values: Values, where: str) -> list[Example]:
    return [Example(where="", source="", text=required_string(values, "text", where))]


_SHAPES: tuple[tuple[tuple[str, ...], Callable[[Values, str], list[Example]]], ...] = (
    (("messages",), _from_messages),
    (("conversations",), _from_conversations),
    (("instruction", "instances"), _from_instances),
    (("instruction", "output"), _from_instruction("input", "output")),
    (("instruction", "response"), _from_instruction("context", "response")),
    (("prompt", "response"), _from_prompt("prompt", "response")),
    (("prompt", "completion"), _from_prompt("prompt", "completion")),
    (("question", "answer"), _from_prompt("question", "answer")),
    (("text",), _from_text),
)


def strip_alpaca(prompt: str) -> str:
    """Return the instruction inside Alpaca's frame, or ``prompt`` where there is none."""
    match = _ALPACA.match(prompt)
    return _joined(match["instruction"], match["input"] or "") if match else prompt


def _joined(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def required_string(values: Values, field: str, where: str) -> str:
    """Return a string that must be there and say something."""
    if field not in values:
        found = column_names(values)
        raise BadDataError(f"{where}:{field}: missing; the columns are {found}; add it")
    value = values[field]
    if not isinstance(value, str):
        raise BadDataError(
            f"{where}:{field}: found {kind_of(value)}, expected a string; mend the row"
        )
    if not value.strip():
        raise BadDataError(f"{where}:{field}: empty, expected some text; fill or remove the row")
    return value


def optional_string(values: Values, field: str, where: str) -> str:
    """Return a string, empty where the field is absent or null."""
    value = values.get(field)
    if value is not None and not isinstance(value, str):
        raise BadDataError(
            f"{where}:{field}: found {kind_of(value)}, expected a string; mend the row"
        )
    return value or ""


# --- messages -----------------------------------------------------------------------------------


def read_messages(value: Any, where: str, field: str) -> tuple[Message, ...]:
    """Return the turns in ``value``: ``role`` and ``content``, or ``from`` and ``value``.

    Errors:
        BadDataError: not a list of such objects, an unknown role, or content that is not text.
    """
    if not isinstance(value, list):
        raise BadDataError(
            f"{where}:{field}: found {kind_of(value)}, expected a list of "
            '{"role": ..., "content": ...}; mend the row'
        )
    return tuple(read_message(item, where, f"{field}[{i}]") for i, item in enumerate(value))


def read_message(item: Any, where: str, field: str) -> Message:
    """Return one turn."""
    if not isinstance(item, dict):
        raise BadDataError(
            f"{where}:{field}: found {kind_of(item)}, expected "
            '{"role": ..., "content": ...}; mend the row'
        )
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, content_key):
        if key not in item:
            found = column_names(item)
            raise BadDataError(f"{where}:{field}.{key}: missing; the keys are {found}; add '{key}'")
    role = item[role_key]
    known = SPEAKERS if role_key == "from" else {role: role for role in ROLES}
    if not isinstance(role, str) or role not in known:
        raise BadDataError(
            f"{where}:{field}.{role_key}: unknown role {str(role)[:40]!r}; expected "
            f"{', '.join(known)}; rename the role or remove the row"
        )
    content = _content(item[content_key], where, f"{field}.{content_key}")
    message = Message(role=known[role], content=content)
    weight = item.get("weight", item.get("loss_weight"))
    if weight is None or known[role] != "assistant":
        return message
    if weight not in (0, 1):
        raise BadDataError(
            f"{where}:{field}.weight: found {weight!r}, expected 0 or 1; other weights "
            "are not trained with"
        )
    return message if weight == 1 else Message(**message, weight=0)


def _content(content: Any, where: str, field: str) -> str:
    """Return text, also where it is given as a list of text parts."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise BadDataError(
                f"{where}:{field}: found {kind_of(content)}, expected a string; mend the row"
            )
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise BadDataError(
                f"{where}:{field}[{index}]: found another kind of part than text; this model "
                "reads text only; remove the row"
            )
        texts.append(text)
    return "".join(texts)


def require_conversation(
    messages: Sequence[Message], where: str, field: str, *, answered: bool
) -> None:
    """Check the order of roles, and that every turn says something.

    ``answered``: at least one turn must be the assistant's; else the last must be the user's.

    Errors:
        BadDataError: each mistake has its own message.
    """
    if not messages:
        raise BadDataError(f"{where}:{field}: empty, expected at least one turn; remove the row")
    for index, message in enumerate(messages):
        at = f"{where}:{field}[{index}]"
        if not message["content"].strip():
            raise BadDataError(f"{at}.content: empty, expected some text; remove the row")
        if message["role"] == "system" and index > 0:
            raise BadDataError(f"{at}.role: a system turn after the first; move it to the front")
    spoken = [(i, m["role"]) for i, m in enumerate(messages) if m["role"] != "system"]
    _require_turns(spoken, where, field)
    if answered and not any(role == "assistant" for _, role in spoken):
        raise BadDataError(
            f"{where}:{field}: no assistant turn, so there is nothing to learn; add an answer"
        )
    if not answered and spoken[-1][1] != "user":
        raise BadDataError(
            f"{where}:{field}[{spoken[-1][0]}].role: the prompt ends with the assistant, expected "
            "a user turn last; remove that turn"
        )


def _require_turns(spoken: Sequence[tuple[int, str]], where: str, field: str) -> None:
    """Check that user and assistant take turns, the user first."""
    if not spoken:
        raise BadDataError(f"{where}:{field}: no user turn; the system turn alone says nothing")
    if spoken[0][1] == "assistant":
        raise BadDataError(
            f"{where}:{field}[{spoken[0][0]}].role: starts with the assistant, expected a user "
            "turn first; add one or remove the row"
        )
    for (_, before), (index, role) in itertools.pairwise(spoken):
        if before == role:
            raise BadDataError(
                f"{where}:{field}[{index}].role: two {role} turns in a row; join them"
            )


def column_names(values: Values) -> str:
    """Return the columns of a row, for messages that say what was found."""
    return ", ".join(f"'{name}'" for name in values) or "none"


def placeholders(text: str) -> list[str]:
    """Return template placeholders such as ``{{name}}`` that someone forgot to fill in."""
    return PLACEHOLDER.findall(text)
