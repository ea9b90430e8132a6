"""`sevenfold bench dedup`: how fast near-duplicates are found, and how many of planted ones.

Into texts of one's own, near-duplicates of some are planted by a seeded generator; our MinHash,
datatrove's and datasketch's then look for them, one after the other, in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sevenfold.base import console, records, storage
from sevenfold.base.errors import UsageError
from sevenfold.data import cleaning, duplicates, sources
from sevenfold.data.clean import CleanConfig, DocumentWriter, cut
from sevenfold.workflow.workers import require_package

SEED = 7
# What is planted: the share of words that were changed, and how often among what is planted.
EDITS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
PLANTED_SHARE = 0.1
PIECE_CHARACTERS = 5000
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Planted:
    """Texts, and for each planted one its original's place, its own, and the edit it had."""

    texts: list[str]
    pairs: list[tuple[int, int, float]]

    @property
    def megabytes(self) -> float:
        """The size of all texts in 10^6 bytes of UTF-8."""
        return sum(len(text.encode()) for text in self.texts) / 1e6


def bench(options: argparse.Namespace) -> None:
    """Measure, and print one JSON line a case.

    Errors:
        UsageError: as in :func:`dedup`.
    """
    for found in dedup(options.source, SEED):
        console.print_raw(json.dumps(found) + "\n")


def plant(texts: Sequence[str], seed: int) -> Planted:
    """Return ``texts`` with edited copies among them, in an order drawn anew."""
    draw = random.Random(seed)
    vocabulary = [word for text in texts[:200] for word in text.split()]
    made: list[tuple[str, int, float]] = [(text, -1, 0.0) for text in texts]
    for original in draw.sample(range(len(texts)), int(len(texts) * PLANTED_SHARE)):
        edit = draw.choice(EDITS)
        made.append((_edited(texts[original], edit, draw, vocabulary), original, edit))
    order = draw.sample(range(len(made)), len(made))
    places = {index: place for place, index in enumerate(order)}
    pairs = [(places[o], places[i], e) for i, (_, o, e) in enumerate(made) if o >= 0]
    return Planted(texts=[made[index][0] for index in order], pairs=pairs)


def _edited(text: str, edit: float, draw: random.Random, vocabulary: Sequence[str]) -> str:
    """Return ``text`` with a share of its words replaced, lost or doubled, and its look changed."""
    words = text.split()
    for place in draw.sample(range(len(words)), round(edit * len(words))):
        words[place] = draw.choice((draw.choice(vocabulary), "", f"{words[place]} {words[place]}"))
    if edit:
        words = words[: len(words) - draw.randrange(1 + int(edit * len(words)))]
    changed = " ".join(words)
    return draw.choice((changed, changed.upper(), changed.replace(". ", ".\n\n"), f"{changed} !"))


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Return the texts of local files, cut into pieces as cleaning does.

    Errors:
        UsageError: nothing was named, or nothing is there.
    """
    if not paths:
        raise UsageError("bench dedup: in which texts? give --source PATH, repeatable")
    texts: list[str] = []
    for path in paths:
        for document in sources.read_documents(sources.source_from_path(path)):
            texts += cut(document["text"], PIECE_CHARACTERS)
    return sorted(set(texts))


def dedup(paths: Sequence[Path], seed: int) -> Iterator[dict[str, Any]]:
    """Yield the measurements, ours first: MB/s of one process, recall by edit, precision.

    Errors:
        UsageError: no texts, or a package to compare with is not installed.
    """
    for package in ("rensa", "datatrove", "datasketch", "spacy", "xxhash"):
        require_package(package, "bench dedup")
    planted = plant(read_texts(paths), seed)
    finders: dict[str, Callable[[list[str]], list[int]]] = {
        "sevenfold (rensa)": _ours,
        "datatrove": _datatrove,
        "datasketch": _datasketch,
    }
    speeds: dict[str, float] = {}
    for name, find in finders.items():
        find(planted.texts[:20])  # imports, and tables that are built once
        started, cpu = time.perf_counter(), time.process_time()
        groups = find(planted.texts)
        elapsed, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        speeds[name] = planted.megabytes / cpu_s
        yield {
            "case": "dedup",
            "method": name,
            "documents": len(planted.texts),
            "megabytes": planted.megabytes,
            "mb_s_per_core": speeds[name],
            "mb_s": planted.megabytes / elapsed,
            "ours_is_faster_by": speeds["sevenfold (rensa)"] / speeds[name],
            **quality_of(planted, groups),
            "seed": seed,
            "versions": records.package_versions(),
        }
    yield _end_to_end(planted)


def quality_of(planted: Planted, groups: Sequence[int]) -> dict[str, Any]:
    """Return recall by edit, and the share of joined texts that are like what they joined.

    A pair that was joined counts as right where the exact Jaccard similarity of its runs of five
    words is at least a half, whether it was planted or stood in the texts.
    """
    recall: dict[str, list[bool]] = {f"{edit:g}": [] for edit in EDITS}
    for original, copy, edit in planted.pairs:
        recall[f"{edit:g}"].append(groups[original] == groups[copy])
    right = wrong = 0
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        alike = [jaccard(planted.texts[place], planted.texts[m]) for m in members.get(group, [])]
        right += bool(alike) and max(alike) >= 0.5
        wrong += bool(alike) and max(alike) < 0.5
        members.setdefault(group, []).append(place)
    return {
        "recall": {edit: sum(f) / len(f) for edit, f in recall.items() if f},
        "planted": {edit: len(found) for edit, found in recall.items()},
        "precision": right / max(1, right + wrong),
        "joined": right + wrong,
    }


def jaccard(one: str, other: str) -> float:
    """Return the exact similarity of two texts' sets of runs of five words."""
    a, b = (_runs(text) for text in (one, other))
    return len(a & b) / max(1, len(a | b))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    count = min(duplicates.SHINGLE_WORDS, len(words))
    return {tuple(words[start : start + count]) for start in range(len(words) - count + 1)}


def _ours(texts: list[str]) -> list[int]:
    sign = duplicates.signer()
    columns = duplicates.bands([sign(text) for text in texts])
    first = np.arange(len(texts))
    for column in columns:
        duplicates.join_alike(first, column)
    return [int(group) for group in first]


def _datatrove(texts: list[str]) -> list[int]:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    with tempfile.TemporaryDirectory() as folder:
        made = MinhashDedupSignature(folder, MinhashConfig())
        signatures = []
        for number, text in enumerate(texts):
            shingles = made.get_shingles(text)
            found = made.get_signature(shingles) if shingles.size else [[number]]
            signatures.append([tuple(band) for band in found])
    return _joined(signatures)


def _datasketch(texts: list[str]) -> list[int]:
    from datasketch import MinHash

    num_rows = duplicates.BAND_ROWS
    signatures = []
    for text in texts:
        made = MinHash(num_perm=duplicates.NUM_BANDS * num_rows)
        made.update_batch([" ".join(run).encode() for run in _runs(text)])
        bands = made.hashvalues.reshape(-1, num_rows)
        signatures.append([tuple(band.tolist()) for band in bands])
    return _joined(signatures)


def _joined(signatures: Sequence[Sequence[tuple[int, ...]]]) -> list[int]:
    """Join what agrees in a whole band, as ours are joined."""
    first = np.arange(len(signatures))
    for band in range(max(map(len, signatures))):
        seen: dict[tuple[int, ...], int] = {}
        column = [
            seen.setdefault(s[band] if band < len(s) else (-1, n), n)
            for n, s in enumerate(signatures)
        ]
        duplicates.join_alike(first, np.array(column, np.uint64))
    return [int(group) for group in first]


def _end_to_end(planted: Planted) -> dict[str, Any]:
    """Clean the texts as step 02 does, with nothing on but MinHash: files to files."""
    config = CleanConfig(
        min_characters=1,
        document_characters=PIECE_CHARACTERS * 10,
        unicode_form="NFC",
        repair=False,
        languages=None,
        quality=(),
        mask_pii=False,
        deduplicate="minhash",
    )
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        with (
            storage.new_folder(raw, kind="raw") as folder,
            DocumentWriter(folder, "documents") as w,
        ):
            for number, text in enumerate(planted.texts):
                w.write({"id": str(number), "text": text, "source": "bench"})
        job = cleaning.Cleaning(
            raw=raw, work=Path(name) / "work", config=config, validation_fraction=0.01
        )
        started, cpu = time.perf_counter(), time.process_time()
        for task in range(job.num_tasks):
            cleaning.examine(job, task)
        cleaning.decide(job)
        for task in range(job.num_tasks):
            cleaning.write(job, task)
        elapsed, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        dropped = dict(cleaning.total(job).total().dropped)
    return {
        "case": "dedup",
        "method": "step 02 with MinHash, from file to file",
        "megabytes": planted.megabytes,
        "mb_s_per_core": planted.megabytes / cpu_s,
        "mb_s": planted.megabytes / elapsed,
        "dropped": dropped,
    }
