"""Rows of token ids, counted, split and saved as Hugging Face data sets."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError
from sevenfold.data.clean import fraction_of
from sevenfold.data.rows import placeholders

log = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
_BATCH_ROWS = 1000


@dataclass
class RowCounts:
    """What was read, kept, dropped (by source, and why) and rejected."""

    max_bad_rows: int
    rows_read: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    dropped_of: dict[str, Counter[str]] = field(default_factory=dict)
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

    @property
    def dropped(self) -> Counter[str]:
        """Rows dropped of all sources, by reason."""
        return sum(self.dropped_of.values(), Counter[str]())

    def drop(self, source: str, reason: str) -> None:
        """Count a row that is left out."""
        self.dropped_of.setdefault(source, Counter())[reason] += 1

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Return the counts of each source for a manifest."""
        return {
            name: {
                "rows_read": read,
                "rows": self.rows[name],
                "tokens": self.tokens[name],
                "dropped": dict(self.dropped_of.get(name, {})),
            }
            for name, read in self.rows_read.items()
        }

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


def write_rows(
    folder: Path,
    rows: Iterator[TokenRow],
    columns: dict[str, str],
    validation_fraction: float,
    counts: RowCounts,
) -> dict[str, Any]:
    """Write all rows once, then the two parts from there; memory does not grow with the data.

    Returns:
        How many rows and tokens were kept, and the counts of everything else.
    Errors:
        BadDataError: no row is left to train on, or none to hold out.
    """
    fractions: list[float] = []
    weights: list[float] = []

    def spooled() -> Iterator[dict[str, Any]]:
        for row in rows:
            fractions.append(fraction_of(row.key))
            weights.append(row.weight)
            length = sum(len(v) for name, v in row.columns.items() if name.endswith("_ids"))
            counts.rows[row.columns["source"]] += 1
            counts.tokens[row.columns["source"]] += length
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
    kept = {"rows": len(train), "validation_rows": len(held_out), "tokens": counts.tokens.total()}
    return kept | {"counts": counts.facts(), "by_source": counts.by_source()}


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
