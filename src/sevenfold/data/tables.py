"""Tokenised conversations and preference pairs, as Hugging Face data sets on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevenfold.base.errors import BadDataError
from sevenfold.data.chat import (
    ChatDataConfig,
    PreferenceDataConfig,
    render,
    render_answer,
    render_text,
)
from sevenfold.data.decontamination import ItemIndex
from sevenfold.data.pairs import Pair, read_pair
from sevenfold.data.row_rules import RowRules
from sevenfold.data.rows import Example, Message, read_examples
from sevenfold.data.saved_rows import RowCounts, TokenRow, write_rows
from sevenfold.data.sources import Row, SourceConfig, read_rows

log = logging.getLogger(__name__)

SFT_COLUMNS = {"input_ids": "int32", "loss_mask": "int8", "source": "string"}
DPO_COLUMNS = {
    "prompt_ids": "int32",
    "chosen_ids": "int32",
    "rejected_ids": "int32",
    "source": "string",
}


def write_conversations(
    folder: Path,
    tokenizer: Any,
    config: ChatDataConfig,
    *,
    items: ItemIndex | None = None,
    generated: Sequence[SourceConfig] = (),
) -> dict[str, Any]:
    """Write ``rows`` and ``validation`` with ``input_ids``, ``loss_mask``, ``source``.

    ``items`` are those of the evaluation, which no row may hold; ``generated`` sources, made
    together with the items, are not searched.

    Returns:
        The manifest's facts: counts and sources.
    Errors:
        BadDataError: a bad row too many, or no row left to train on.
    """
    counts = RowCounts(config.max_bad_rows)
    search = _Search(items, generated, RowRules(config.rules))
    rows = _conversations(tokenizer, config, counts, search)
    return write_rows(folder, rows, SFT_COLUMNS, config.validation_fraction, counts) | {
        "sources": _sources(config.sources, counts)
    }


def write_preferences(
    folder: Path,
    tokenizer: Any,
    config: PreferenceDataConfig,
    *,
    items: ItemIndex | None = None,
    generated: Sequence[SourceConfig] = (),
    single: bool = False,
    context: int | None = None,
) -> dict[str, Any]:
    """Write ``rows`` and ``validation`` with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.

    ``items`` and ``generated`` as for conversations. ``single``: the sources hold rows without
    ``rejected`` too, answers to be kept in mind. A prompt and an answer have at most ``context``
    tokens, as many as the model reads; a whole pair ``max_length``.

    Returns:
        The manifest's facts: counts and sources.
    Errors:
        BadDataError: a bad row too many, or no pair left to train on.
    """
    counts = RowCounts(config.max_bad_rows)
    search = _Search(items, generated, RowRules(config.rules))
    bounds = _Bounds(pair=config.max_length, context=context or config.max_length)
    rows = _preferences(tokenizer, config, bounds, counts, search, single=single)
    facts = write_rows(folder, rows, DPO_COLUMNS, config.validation_fraction, counts)
    return facts | {"sources": _sources((*config.sources, *config.replay), counts)}


def _sources(sources: Sequence[SourceConfig], counts: RowCounts) -> list[dict[str, Any]]:
    return [
        {
            "name": source.name,
            "location": source.location,
            "licence": source.licence,
            "rows": counts.rows_read[source.name],
        }
        for source in sources
    ]


@dataclass(frozen=True)
class _Search:
    """Says which rows are left out: for an item of the evaluation, or by the rules.

    The generated sources are not searched for items.
    """

    items: ItemIndex | None
    generated: Sequence[SourceConfig]
    rules: RowRules

    def example(self, source: SourceConfig, example: Example) -> str | None:
        """Return why an example is left out, or None."""
        asked = _question(example.messages) if example.messages else ""
        answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
        rule = self.rules.reason(asked or example.text, answers or [example.text])
        return self._item(source, _texts(example)) or rule

    def pair(self, source: SourceConfig, pair: Pair) -> str | None:
        """Return why a preference pair is left out, or None."""
        asked = [message["content"] for message in pair.prompt]
        answers = [pair.chosen, *([] if pair.rejected is None else [pair.rejected])]
        rule = self.rules.reason("\n".join(asked), answers)
        return self._item(source, [*asked, *answers]) or rule

    def _item(self, source: SourceConfig, texts: Iterable[str]) -> str | None:
        if self.items is None or source in self.generated:
            return None
        return self.items.reason(texts)


def _weighted(config: ChatDataConfig) -> Iterator[tuple[SourceConfig, float]]:
    yield from zip(config.sources, config.weights or [1.0] * len(config.sources), strict=True)


def _each_row(
    source: SourceConfig, counts: RowCounts, convert: Callable[[Row], list[TokenRow]]
) -> Iterator[TokenRow]:
    """Yield what each row converts to; a bad one is rejected as a whole."""
    for row in read_rows(source):
        counts.rows_read[source.name] += 1
        try:
            converted = convert(row)
        except BadDataError as error:
            message = str(error)
            located = message if message.startswith(row.where) else f"{row.where}: {message}"
            counts.reject(row.where, BadDataError(located))
            continue
        yield from converted
    if not counts.rows_read[source.name]:
        raise BadDataError(
            f"{source.location}: not one row; give files that hold rows, or leave the source out"
        )


# --- conversations ------------------------------------------------------------------------------


def _conversations(
    tokenizer: Any, config: ChatDataConfig, counts: RowCounts, search: _Search
) -> Iterator[TokenRow]:
    for source, weight in _weighted(config):

        def convert(
            row: Row, source: SourceConfig = source, weight: float = weight
        ) -> list[TokenRow]:
            made = []
            for example in read_examples(row.values, row.where, source.name):
                if reason := search.example(source, example):
                    counts.drop(source.name, reason)
                else:
                    made += _conversation(tokenizer, example, config.max_length, weight, counts)
            return made

        yield from _each_row(source, counts, convert)


def _conversation(
    tokenizer: Any, example: Example, max_length: int, weight: float, counts: RowCounts
) -> list[TokenRow]:
    """Return the row of one example, or none where nothing of it would be learnt."""
    if example.messages:
        ids, mask = render(tokenizer, example.messages)
        key = _question(example.messages)
    else:
        ids, mask = render_text(tokenizer, example.text)
        key = example.text
    for text in _texts(example):
        counts.note_placeholders(text, example.where)
    counts.truncated += len(ids) > max_length
    ids, mask = ids[:max_length], mask[:max_length]
    if not any(mask[1:]):
        counts.drop(example.source, "no_answer_within_max_length")
        return []
    columns = {"input_ids": ids, "loss_mask": mask, "source": example.source}
    return [TokenRow(columns, key, weight)]


def _texts(example: Example) -> tuple[str, ...]:
    return (example.text, *(message["content"] for message in example.messages))


def _question(messages: Sequence[Message]) -> str:
    """Return what the user first asks: rows that share it are held out together."""
    return next(m["content"] for m in messages if m["role"] == "user")


# --- preferences --------------------------------------------------------------------------------


def _preferences(
    tokenizer: Any,
    config: PreferenceDataConfig,
    bounds: _Bounds,
    counts: RowCounts,
    search: _Search,
    *,
    single: bool,
) -> Iterator[TokenRow]:
    for source, weight in _weighted(config):

        def convert(
            row: Row, source: SourceConfig = source, weight: float = weight
        ) -> list[TokenRow]:
            if reason := search.rules.pair_reason(row.values):
                counts.drop(source.name, reason)
                return []
            pair = read_pair(row.values, row.where, source.name, single=single)
            if reason := search.pair(source, pair):
                counts.drop(source.name, reason)
                return []
            return _pair(tokenizer, pair, bounds, weight, counts)

        yield from _each_row(source, counts, convert)
    for source in config.replay:

        def convert_replay(row: Row, source: SourceConfig = source) -> list[TokenRow]:
            made = []
            for example in read_examples(row.values, row.where, source.name):
                if reason := search.example(source, example):
                    counts.drop(source.name, reason)
                else:
                    made += _replayed(tokenizer, example, bounds, counts)
            return made

        yield from _each_row(source, counts, convert_replay)


def _pair(
    tokenizer: Any, pair: Pair, bounds: _Bounds, weight: float, counts: RowCounts
) -> list[TokenRow]:
    prompt, chosen = render_answer(tokenizer, pair.prompt, pair.chosen)
    rejected: list[int] = []
    if pair.rejected is not None:
        rejected = render_answer(tokenizer, pair.prompt, pair.rejected)[1]
    for text in (pair.chosen, pair.rejected or ""):
        counts.note_placeholders(text, pair.where)
    room = bounds.room(len(prompt), len(chosen), len(rejected))
    counts.truncated += max(len(chosen), len(rejected)) > room
    if room < 1:
        counts.drop(pair.source, "no_answer_within_max_length")
        return []
    if chosen[:room] == rejected[:room]:
        counts.drop(pair.source, "equal_within_max_length")
        return []
    columns = {
        "prompt_ids": prompt,
        "chosen_ids": chosen[:room],
        "rejected_ids": rejected[:room],
        "source": pair.source,
    }
    return [TokenRow(columns, "\n".join(m["content"] for m in pair.prompt), weight)]


@dataclass(frozen=True)
class _Bounds:
    """Tokens of a pair, its prompt twice, and of a prompt with one answer, at most."""

    pair: int
    context: int

    def room(self, prompt: int, chosen: int, rejected: int) -> int:
        """Return the tokens that each answer may have, so that all of the pair fits into one row.

        A pair stands there as two documents, with the prompt twice; without ``rejected`` as one.
        """
        alone = min(self.pair, self.context) - prompt
        left = self.pair - 2 * prompt
        return min(alone, max(left // 2, left - min(chosen, rejected))) if rejected else alone


def _replayed(
    tokenizer: Any, example: Example, bounds: _Bounds, counts: RowCounts
) -> list[TokenRow]:
    """Return the last answer of an instruction row as an answer without a rejected one."""
    if not example.messages or example.messages[-1]["role"] != "assistant":
        raise BadDataError(
            f"{example.where}: replay rows are conversations that end with the assistant; "
            "remove the row"
        )
    pair = Pair(
        where=example.where,
        source=example.source,
        prompt=example.messages[:-1],
        chosen=example.messages[-1]["content"],
        rejected=None,
    )
    return _pair(tokenizer, pair, bounds, 1.0, counts)
