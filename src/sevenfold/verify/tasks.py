"""Items of the evaluation tasks: our own JSONL schemas, and the layouts public sets come in.

Every row is checked before anything is measured; a bad one is named as ``file:line:field``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.verify.config import TaskConfig
from sevenfold.verify.task_files import Row, read_files, task_sha256

ROLES = ("system", "user", "assistant")
LETTERS = "ABCDEFGHIJ"

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Item:
    """What every item has: an id that no other item of its task has."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Document(Item):
    """Text whose probability is measured; ``entropy_nats`` is the least any model can lose."""

    text: str
    source: str
    entropy_nats: float | None


@dataclass(frozen=True, kw_only=True)
class ChoiceItem(Item):
    """``choices`` continue ``prompt`` (delimiter included); ``gold`` is the right one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class ContinuationItem(Item):
    """``answer`` (delimiter included) is what greedy decoding should make of ``prompt``."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class PairItem(Item):
    """``good`` should be more probable than ``bad``."""

    good: str
    bad: str


@dataclass(frozen=True, kw_only=True)
class ChatItem(Item):
    """``answer`` is what the assistant should say: the whole text, or the last number in it."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True, kw_only=True)
class SafetyItem(Item):
    """A prompt to refuse where ``unsafe``, to answer otherwise."""

    messages: tuple[Message, ...]
    unsafe: bool


@dataclass(frozen=True, kw_only=True)
class PreferenceItem(Item):
    """``chosen`` should be more probable than ``rejected`` as the assistant's answer."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its items; ``sha256`` identifies the bytes they were read from."""

    config: TaskConfig
    items: tuple[Item, ...]
    sha256: str


def read_task(config: TaskConfig, paths: Sequence[Path], *, seed: int) -> Task:
    """Read and check the items of a task, and draw ``max_items`` of them.

    Of several files (BLiMP has 67) the same number is drawn from each.

    Errors:
        UsageError: no such file, or a type of file that is not read.
        BadDataError: a row that its kind cannot use, named as ``file:line:field``.
    """
    parse = _PARSERS[config.kind]
    files: list[list[Item]] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file; task '{config.name}' needs its items")
        for rows in read_files(path, as_text=config.kind == "text"):
            parsed = (parse(row, where, config) for where, row in rows)
            files.append([item for item in parsed if item is not None])
    items = tuple(_drawn(files, config, seed))
    if not items:
        where = ", ".join(map(str, paths)) or "no file"
        raise BadDataError(f"{where}: no item for task '{config.name}'; expected at least one")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise BadDataError(f"{paths[0]}: id '{item.id}' stands twice; give every item its own")
        seen.add(item.id)
    return Task(config=config, items=items, sha256=task_sha256(paths))


def _drawn(files: list[list[Item]], config: TaskConfig, seed: int) -> Iterator[Item]:
    """Yield up to ``max_items`` items, evenly from all files, in the order of the files."""
    left = config.max_items
    for index, items in enumerate(files):
        if left is None:
            yield from items
            continue
        share = min(len(items), -(-left // (len(files) - index)))
        left -= share
        dice = random.Random(f"{seed}/{config.name}/{index}")
        yield from (items[at] for at in sorted(dice.sample(range(len(items)), share)))


def _text(row: Row, where: str, *names: str) -> str:
    """Return the first of the fields that the row has, as text that is not empty."""
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, str) or not value.strip():
                raise BadDataError(f"{where}:{name}: found {value!r:.60}; expected text")
            return value
    raise BadDataError(f"{where}:{names[0]}: missing; expected text")


def _document(row: Row, where: str, config: TaskConfig) -> Document | None:
    entropy = row.get("entropy_nats")
    if entropy is not None and (isinstance(entropy, bool) or not isinstance(entropy, int | float)):
        raise BadDataError(f"{where}:entropy_nats: found {entropy!r:.60}; expected a number")
    return Document(
        id=str(row["id"]),
        text=_text(row, where, "text"),
        source=str(row.get("source", "")),
        entropy_nats=None if entropy is None else float(entropy),
    )


def _joined(prompt: str, answer: str, delimiter: str) -> str:
    """Return ``answer`` with ``delimiter`` before it, unless one of the two brings white space."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else delimiter + answer


def _choice(row: Row, where: str, config: TaskConfig) -> ChoiceItem | None:
    choices, gold_field = row.get("choices"), "gold" if "gold" in row else "answer"
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadDataError(f"{where}:choices: found {choices!r:.60}; expected two texts or more")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise BadDataError(f"{where}:choices.{index}: found {choice!r:.60}; expected text")
    gold = row.get(gold_field)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise BadDataError(
            f"{where}:{gold_field}: found {gold!r:.60}; expected a number from 0 to "
            f"{len(choices) - 1}"
        )
    if "subject" in row and "question" in row:
        return _mmlu(row, where, choices, gold)
    prompt = _text(row, where, "prompt", "query", "question")
    if "prompt" not in row:
        choices = [_joined(prompt, choice, config.delimiter) for choice in choices]
    return ChoiceItem(id=str(row["id"]), prompt=prompt, choices=tuple(choices), gold=gold)


def _mmlu(row: Row, where: str, choices: list[str], gold: int) -> ChoiceItem | None:
    """Return MMLU's usual zero-shot form; its few-shot and tuning rows are not judged."""
    if row.get("split", "test") != "test":
        return None
    subject = _text(row, where, "subject").replace("_", " ")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    prompt = "\n".join(
        [
            "The following are multiple choice questions (with answers) about " + subject + ".",
            "",
            _text(row, where, "question").strip(),
            *lines,
            "Answer:",
        ]
    )
    letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
    return ChoiceItem(id=str(row["id"]), prompt=prompt, choices=letters, gold=gold)


def _continuation(row: Row, where: str, config: TaskConfig) -> ContinuationItem:
    prompt = _text(row, where, "prompt", "context")
    answer = _text(row, where, "answer", "continuation")
    if "prompt" not in row:
        answer = _joined(prompt, answer, config.delimiter)
    return ContinuationItem(id=str(row["id"]), prompt=prompt, answer=answer)


def _pair(row: Row, where: str, config: TaskConfig) -> PairItem | None:
    good, bad = _text(row, where, "good", "sentence_good"), _text(row, where, "bad", "sentence_bad")
    if good == bad and "good" not in row:
        return None  # BLiMP has a few such rows; they decide nothing
    if good == bad:
        raise BadDataError(f"{where}:bad: the same text as the good one; one of them is wrong")
    return PairItem(id=str(row["id"]), good=good, bad=bad)


def _messages(row: Row, where: str) -> tuple[Message, ...]:
    """Return the conversation up to the user's last message; a plain prompt is one message."""
    messages = row.get("messages", row.get("prompt", row.get("question")))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise BadDataError(f"{where}:messages: found {messages!r:.60}; expected a conversation")
    for index, message in enumerate(messages):
        at = f"{where}:messages.{index}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadDataError(f"{at}.role: expected one of {', '.join(ROLES)}")
        _text(message, at, "content")
    if messages[-1]["role"] != "user":
        raise BadDataError(f"{where}:messages: the last message must be the user's")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _exact(row: Row, where: str, config: TaskConfig) -> ChatItem:
    return ChatItem(
        id=str(row["id"]), messages=_messages(row, where), answer=_text(row, where, "answer")
    )


def last_number(text: str) -> str | None:
    """Return the last number of a text without thousands separators or a trailing ``.0``."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    number = numbers[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else str(number)


def _number(row: Row, where: str, config: TaskConfig) -> ChatItem:
    final = _text(row, where, "answer").rpartition("####")[2]
    number = last_number(final)
    if number is None:
        raise BadDataError(f"{where}:answer: found {final!r:.60}; expected a number at its end")
    return ChatItem(id=str(row["id"]), messages=_messages(row, where), answer=number)


def _safety(row: Row, where: str, config: TaskConfig) -> SafetyItem:
    unsafe = row.get("unsafe", config.unsafe)
    if "unsafe" not in row and row.get("label") in ("safe", "unsafe"):
        unsafe = row["label"] == "unsafe"
    if not isinstance(unsafe, bool):
        raise BadDataError(
            f"{where}:unsafe: found {unsafe!r:.60}; expected true or false, a column 'label' with "
            "safe or unsafe, or 'unsafe:' in the task's settings"
        )
    return SafetyItem(id=str(row["id"]), messages=_messages(row, where), unsafe=unsafe)


def _preference(row: Row, where: str, config: TaskConfig) -> PreferenceItem:
    chosen, rejected = _text(row, where, "chosen"), _text(row, where, "rejected")
    if chosen == rejected:
        raise BadDataError(f"{where}:rejected: the same text as chosen; one of them is wrong")
    return PreferenceItem(
        id=str(row["id"]), messages=_messages(row, where), chosen=chosen, rejected=rejected
    )


_PARSERS: Mapping[str, Callable[[Row, str, TaskConfig], Item | None]] = {
    "text": _document,
    "choice": _choice,
    "continuation": _continuation,
    "pair": _pair,
    "exact": _exact,
    "number": _number,
    "safety": _safety,
    "preference": _preference,
}
