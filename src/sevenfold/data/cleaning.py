"""Cleaning as tasks, one a raw shard: examine each piece, decide about all, write what stays.

What each task makes is a folder of its own in ``work``, complete or not there: who was stopped
goes on where they were, and the result is the same whoever did which task, in whatever order.
Every task may be done in another process or on another machine with the same disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sevenfold.base import storage
from sevenfold.data import duplicates
from sevenfold.data.clean import (
    SPLITS,
    CleanConfig,
    DocumentWriter,
    clean_documents,
    fraction_of,
    read_documents,
    read_shards,
    shard_paths,
)
from sevenfold.data.clean_counts import CleaningCounts
from sevenfold.data.decontamination import ItemIndex

REASONS = {duplicates.DUPLICATE: "duplicate", duplicates.NEAR_DUPLICATE: "near_duplicate"}
_MASKED = "masked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is cleaned, how, and where the parts of it are made.

    ``items`` are those of the evaluation, which no piece may hold.
    """

    raw: Path
    work: Path
    config: CleanConfig
    validation_fraction: float
    items: ItemIndex | None = None

    @property
    def num_tasks(self) -> int:
        """How many tasks there are: one a raw shard."""
        return len(shard_paths(self.raw, "documents"))

    def part(self, task: int, name: str) -> Path:
        """Return the folder of one task; a folder above it is its alone, as storage sweeps it."""
        return self.work / f"{task:05d}" / name

    def is_done(self, task: int, name: str) -> bool:
        """True where that part of the task is complete."""
        return (self.part(task, name) / storage.MANIFEST).is_file()


def examine(job: Cleaning, task: int) -> None:
    """Do to one raw shard what needs no other: all but duplicates and the split."""
    if job.is_done(task, "examined"):
        return
    counts = CleaningCounts()
    keys = duplicates.Keys(near=job.config.deduplicate == "minhash")
    raw = read_documents(shard_paths(job.raw, "documents")[task])
    with storage.new_folder(job.part(task, "examined"), kind="examined") as folder:
        with DocumentWriter(folder, "pieces") as writer:
            for piece, masked in clean_documents(raw, job.config, counts, job.items):
                text = piece["text"]
                keys.add(text, fraction_of(text), piece.get("split"))
                writer.write({_MASKED: masked, **piece} if masked else piece)
        keys.write(folder)
        storage.manifest_facts(folder, **counts.facts())


def decide(job: Cleaning) -> None:
    """Settle which examined pieces are duplicates and which are held out.

    Errors:
        BadDataError: too little is left.
    """
    target = job.work / "decided" / "fates"
    if (target / storage.MANIFEST).is_file():
        return
    fates = duplicates.decide(
        [job.part(task, "examined") for task in range(job.num_tasks)],
        validation_fraction=job.validation_fraction,
        deduplicate=job.config.deduplicate,
    )
    with storage.new_folder(target, kind="decided") as folder:
        for task, found in enumerate(fates):
            storage.write_array(folder / f"{task:05d}.npy", found)


def write(job: Cleaning, task: int) -> None:
    """Write what stays of one examined shard, by split."""
    if job.is_done(task, "written"):
        return
    counts = CleaningCounts()
    examined = job.part(task, "examined")
    fates = storage.read_array(job.work / "decided" / "fates" / f"{task:05d}.npy")
    with storage.new_folder(job.part(task, "written"), kind="written") as folder:
        with (
            DocumentWriter(folder, "train") as train,
            DocumentWriter(folder, "validation") as validation,
        ):
            writers = (train, validation)
            for fate, piece in zip(fates, read_shards(examined, "pieces"), strict=True):
                masked = piece.pop(_MASKED, None)
                if reason := REASONS.get(int(fate)):
                    counts.drop(piece, reason)
                else:
                    writers[fate].write(piece)
                    counts.keep(piece, SPLITS[fate], masked)
        storage.manifest_facts(folder, **counts.facts())


def total(job: Cleaning) -> CleaningCounts:
    """Return the counts of all tasks together, when all are done."""
    counts = CleaningCounts()
    for name in ("examined", "written"):
        for task in range(job.num_tasks):
            counts.add(storage.read_manifest(job.part(task, name)))
    return counts


def written_files(job: Cleaning) -> Iterator[tuple[Path, str]]:
    """Yield every file that the tasks wrote, in order, and the name it has among all of them."""
    for split in SPLITS:
        parts = [job.part(task, "written") for task in range(job.num_tasks)]
        paths = [path for part in parts for path in shard_paths(part, split)]
        for number, path in enumerate(paths):
            yield path, f"{split}-{number:05d}.jsonl.zst"
