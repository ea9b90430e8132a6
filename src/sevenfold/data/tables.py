"""Tokenised conversations and preference pairs, as Hugging Face data sets on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError
from sevenfold.data.chat import (
    ChatDataConfig,
    PreferenceDataConfig,
    render,
    render_answer,
    render_text,
)
from sevenfold.data.clean import fraction_of
from sevenfold.data.pairs import Pair, read_pair
from sevenfold.data.rows import Example, Message, placeholders, read_examples
from sevenfold.data.sources import Row, SourceConfig, read_rows

log = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
_BATCH_ROWS = 1000
SFT_COLUMNS = {"input_ids": "int32", "loss_mask": "int8", "source": "string"}
DPO_COLUMNS = {
    "prompt_ids": "int32",
    "chosen_ids": "int32",
    "rejected_ids": "int32",
    "source": "string",
}


@dataclass
class RowCounts:
    """What was read, kept, dropped and rejected."""

    max_bad_rows: int
    rows_read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    placeholders: int = 0
    first_placeholder: str = ""
    rejected: list[dict[str, str]] = field(default_factory=list)

    def reject(self, where: str, error: BadDataError) -> None:
        """Note a bad row; raise ``error`` when it is one too many."""
        if len(self.rejected) == self.max_bad_rows:
            if self.max_bad_rows == 0:
                raise BadDataError(f"{error}; or allow some bad rows with max_bad_rows")
            raise BadDataError(
                f"{error} (this is bad row {len(self.rejected) + 1}, and max_bad_rows is "
                f"{self.max_bad_rows})"
            )
        self.rejected.append({"where": where, "reason": str(error)})

    def note_placeholders(self, text: str, where: str) -> None:
        """Count placeholders that nobody filled in."""
        found = placeholders(text)
        if found and not self.placeholders:
            self.first_placeholder = f"{where}: {found[0]}"
        self.placeholders += len(found)

    def facts(self) -> dict[str, Any]:
        """Return the counts for a manifest, and warn about what deserves a look."""
        if self.placeholders:
            log.warning(
                "%s; %d placeholders such as this were not filled in and will be learnt as they "
                "are",
                self.first_placeholder,
                self.placeholders,
            )
        if self.rejected:
            first = self.rejected[0]["reason"]
            log.warning("%d bad rows left out; the first: %s", len(self.rejected), first)
        return {
            "rows_read": dict(self.rows_read),
            "dropped": dict(self.dropped),
            "truncated": self.truncated,
            "placeholders": self.placeholders,
            "rejected": len(self.rejected),
        }


@dataclass(frozen=True)
class TokenRow:
    """One finished row, what decides its split, and how often it is taken."""

    columns: dict[str, Any]
    key: str
    weight: float


def write_conversations(folder: Path, tokenizer: Any, config: ChatDataConfig) -> dict[str, Any]:
    """Write ``rows`` and ``validation`` with ``input_ids``, ``loss_mask``, ``source``.

    Returns:
        The manifest's facts: counts and sources.
    Errors:
        BadDataError: a bad row too many, or no row left to train on.
    """
    counts = RowCounts(config.max_bad_rows)
    rows = _conversations(tokenizer, config, counts)
    return _write(folder, rows, SFT_COLUMNS, config.validation_fraction, counts) | {
        "sources": _sources(config.sources, counts)
    }


def write_preferences(
    folder: Path, tokenizer: Any, config: PreferenceDataConfig, *, single: bool = False
) -> dict[str, Any]:
    """Write ``rows`` and ``validation`` with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.

    ``single``: the sources hold rows without ``rejected`` too, answers to be kept in mind.

    Returns:
        The manifest's facts: counts and sources.
    Errors:
        BadDataError: a bad row too many, or no pair left to train on.
    """
    counts = RowCounts(config.max_bad_rows)
    rows = _preferences(tokenizer, config, counts, single=single)
    facts = _write(folder, rows, DPO_COLUMNS, config.validation_fraction, counts)
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


# --- conversations ------------------------------------------------------------------------------


def _conversations(tokenizer: Any, config: ChatDataConfig, counts: RowCounts) -> Iterator[TokenRow]:
    for source, weight in _weighted(config):

        def convert(row: Row, name: str = source.name, weight: float = weight) -> list[TokenRow]:
            examples = read_examples(row.values, row.where, name)
            made = [
                _conversation(tokenizer, e, config.max_length, weight, counts) for e in examples
            ]
            return [row for row in made if row is not None]

        yield from _each_row(source, counts, convert)


def _conversation(
    tokenizer: Any, example: Example, max_length: int, weight: float, counts: RowCounts
) -> TokenRow | None:
    """Return the row of one example, or None where nothing of it would be learnt."""
    if example.messages:
        ids, mask = render(tokenizer, example.messages)
        key = _question(example.messages)
    else:
        ids, mask = render_text(tokenizer, example.text)
        key = example.text
    for text in (example.text, *(m["content"] for m in example.messages)):
        counts.note_placeholders(text, example.where)
    counts.truncated += len(ids) > max_length
    ids, mask = ids[:max_length], mask[:max_length]
    if not any(mask[1:]):
        counts.dropped["no_answer_within_max_length"] += 1
        return None
    columns = {"input_ids": ids, "loss_mask": mask, "source": example.source}
    return TokenRow(columns, key, weight)


def _question(messages: Sequence[Message]) -> str:
    """Return what the user first asks: rows that share it are held out together."""
    return next(m["content"] for m in messages if m["role"] == "user")


# --- preferences --------------------------------------------------------------------------------


def _preferences(
    tokenizer: Any, config: PreferenceDataConfig, counts: RowCounts, *, single: bool
) -> Iterator[TokenRow]:
    for source, weight in _weighted(config):

        def convert(row: Row, name: str = source.name, weight: float = weight) -> list[TokenRow]:
            pair = read_pair(row.values, row.where, name, single=single)
            return _pair(tokenizer, pair, config.max_length, weight, counts)

        yield from _each_row(source, counts, convert)
    for source in config.replay:

        def convert_replay(row: Row, name: str = source.name) -> list[TokenRow]:
            examples = read_examples(row.values, row.where, name)
            return [t for e in examples for t in _replayed(tokenizer, e, config.max_length, counts)]

        yield from _each_row(source, counts, convert_replay)


def _pair(
    tokenizer: Any, pair: Pair, max_length: int, weight: float, counts: RowCounts
) -> list[TokenRow]:
    prompt, chosen = render_answer(tokenizer, pair.prompt, pair.chosen)
    rejected: list[int] = []
    if pair.rejected is not None:
        rejected = render_answer(tokenizer, pair.prompt, pair.rejected)[1]
    for text in (pair.chosen, pair.rejected or ""):
        counts.note_placeholders(text, pair.where)
    room = _room(max_length, len(prompt), len(chosen), len(rejected))
    counts.truncated += max(len(chosen), len(rejected)) > room
    if room < 1:
        counts.dropped["no_answer_within_max_length"] += 1
        return []
    if chosen[:room] == rejected[:room]:
        counts.dropped["equal_within_max_length"] += 1
        return []
    columns = {
        "prompt_ids": prompt,
        "chosen_ids": chosen[:room],
        "rejected_ids": rejected[:room],
        "source": pair.source,
    }
    return [TokenRow(columns, "\n".join(m["content"] for m in pair.prompt), weight)]


def _room(max_length: int, prompt: int, chosen: int, rejected: int) -> int:
    """Return the tokens that each answer may have, so that all of the pair fits into one row.

    A pair stands there as two documents, with the prompt twice; without ``rejected`` as one.
    """
    if not rejected:
        return max_length - prompt
    left = max_length - 2 * prompt
    return max(left // 2, left - min(chosen, rejected))


def _replayed(
    tokenizer: Any, example: Example, max_length: int, counts: RowCounts
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
    return _pair(tokenizer, pair, max_length, 1.0, counts)


# --- data sets ----------------------------------------------------------------------------------


def _write(
    folder: Path,
    rows: Iterator[TokenRow],
    columns: dict[str, str],
    validation_fraction: float,
    counts: RowCounts,
) -> dict[str, Any]:
    """Write all rows once, then the two parts from there; memory does not grow with the data."""
    fractions: list[float] = []
    weights: list[float] = []
    num_tokens = 0

    def spooled() -> Iterator[dict[str, Any]]:
        nonlocal num_tokens
        for row in rows:
            fractions.append(fraction_of(row.key))
            weights.append(row.weight)
            num_tokens += sum(len(v) for v in row.columns.values() if not isinstance(v, str))
            yield row.columns

    with tempfile.TemporaryDirectory(dir=folder) as spool_folder:
        spool = Path(spool_folder) / "rows.arrow"
        _spool(spool, spooled(), columns)
        shares = np.array(fractions)
        train, held_out = _split(shares, np.array(weights), validation_fraction, counts)
        _save_part(spool, folder / "rows", train)
        _save_part(spool, folder / "validation", held_out)
    if counts.rejected:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in counts.rejected]
        storage.write_text(folder / REJECTED_FILE, "".join(lines))
    kept = {"rows": len(train), "validation_rows": len(held_out), "tokens": num_tokens}
    return kept | {"counts": counts.facts()}


def _spool(path: Path, rows: Iterator[dict[str, Any]], columns: dict[str, str]) -> None:
    import pyarrow

    types = {
        name: pyarrow.string() if kind == "string" else pyarrow.list_(getattr(pyarrow, kind)())
        for name, kind in columns.items()
    }
    schema = pyarrow.schema(types)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as stream:
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))


def _save_part(spool: Path, folder: Path, indices: NDArray[np.int64]) -> None:
    """Save these rows of the spool as a data set; equal input gives equal bytes."""
    import datasets

    datasets.disable_progress_bars()
    # A name of our own, where the library would draw a random one.
    facts = f"{storage.sha256_file(spool)}/{folder.name}"
    mark = hashlib.sha256(facts.encode()).hexdigest()[:16]
    everything = datasets.Dataset.from_file(str(spool))
    everything.select(indices.tolist(), new_fingerprint=mark).save_to_disk(str(folder))


def _split(
    fractions: NDArray[np.float64],
    weights: NDArray[np.float64],
    validation_fraction: float,
    counts: RowCounts,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices to train on, repeated by weight, and those held out, at least one."""
    named = ", ".join(counts.rows_read) or "the sources"
    kept = f"{named}: {len(fractions)} rows are left of {counts.rows_read.total()}"
    if not len(fractions) or len(np.unique(fractions)) < 2:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.dropped.items()) or "none"
        raise BadDataError(
            f"{kept} (dropped: {reasons}); at least two different ones are needed, one of them to "
            "be held out; give more rows, or raise max_length"
        )
    held_out = fractions < validation_fraction
    if not held_out.any() or held_out.all():
        held_out = fractions == fractions.min()
    # The bits of the hash that the split did not use decide about the last, partial pass.
    again = np.modf(fractions * 2**24)[0]
    passes = np.floor(weights).astype(np.int64) + (again < np.modf(weights)[0])
    everything = np.arange(len(fractions))
    train = np.repeat(everything[~held_out], passes[~held_out])
    if not len(train):
        raise BadDataError(f"{kept}, but weights leave none to train on; raise them")
    return train, everything[held_out]
