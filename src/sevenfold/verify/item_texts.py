"""Evaluation items as the texts they may be met as in training data, for decontamination."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sevenfold.verify.config import TaskConfig
from sevenfold.verify.tasks import (
    ChatItem,
    ChoiceItem,
    ContinuationItem,
    Document,
    Item,
    Message,
    PairItem,
    PreferenceItem,
    SafetyItem,
    read_task,
)

# What a benchmark writes around an item: it would keep a short question from being found.
_FRAME = re.compile(r"^The following are multiple choice questions .*$", re.MULTILINE)
_LABEL = re.compile(r"^(?:Question|Passage|Context|Goal|Answer|[QA])\s*:[ \t]*", re.MULTILINE)
_LETTERED = re.compile(r"^[A-J]\. (.*)$", re.MULTILINE)


def item_texts(task: TaskConfig, paths: Sequence[Path]) -> Iterator[Sequence[str]]:
    """Yield every item's texts, also of those that ``max_items`` leaves out.

    Errors:
        UsageError: no such file, or the harness is not installed.
        BadDataError: an item that its kind cannot use.
    """
    if task.kind == "harness":
        from sevenfold.verify import harness  # needs torch

        yield from harness.item_texts(task, paths[0] if paths else None)
        return
    for item in read_task(dataclasses.replace(task, max_items=None), paths, seed=0).items:
        yield _texts(item)


def _texts(item: Item) -> Sequence[str]:
    match item:
        case Document():
            return (item.text,)
        case ChoiceItem():
            return _choice_texts(item)
        case ContinuationItem():
            return (item.prompt, item.prompt + item.answer)
        case PairItem():
            return (item.good, item.bad)
        case ChatItem():
            asked = _asked(item.messages)
            return (asked, f"{asked}\n{item.answer}")
        case SafetyItem():
            return (_asked(item.messages),)
        case PreferenceItem():
            asked = _asked(item.messages)
            return (asked, f"{asked}\n{item.chosen}", f"{asked}\n{item.rejected}")
    raise AssertionError(f"{type(item).__name__} has no texts")


def _choice_texts(item: ChoiceItem) -> Sequence[str]:
    """Return the question, the question with its right answer, and with all answers."""
    lettered = _LETTERED.findall(item.prompt)
    question = _LABEL.sub("", _LETTERED.sub("", _FRAME.sub("", item.prompt))).strip()
    answers = lettered or item.choices
    return (question, f"{question}\n{answers[item.gold]}", "\n".join((question, *answers)))


def _asked(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)
