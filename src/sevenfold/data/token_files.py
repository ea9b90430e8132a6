"""Clean shards as files of ids, one a shard: made by any number of processes, kept when stopped.

With a file stands a ``.json`` that says what it was made from and its SHA-256; it is written last.
What is there and right is not made again, so a step that was stopped goes on with the next shard.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.base import storage, workers
from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError
from sevenfold.data import encoders
from sevenfold.data.best_fit import fill_rows
from sevenfold.data.clean import Document, read_documents
from sevenfold.data.encoders import Engine

SUFFIX = ".jsonl.zst"
# What is encoded at once: tokenizers keeps some hundred bytes a token meanwhile.
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become ids: the same for every shard.

    ``row_length`` is None where documents are left one after the other; else they are packed into
    rows shard by shard, what stays empty filled with ``pad_id``.
    """

    backend_json: str = dataclasses.field(repr=False)
    engine: Engine
    version: str
    bos_id: int
    eos_id: int
    vocab_size: int
    row_length: int | None = None
    pad_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFile:
    """The ids of one clean shard, flat; and what was counted while they were made.

    ``tokens`` are those of the documents, whatever packing has added; ``cut`` how many documents
    were longer than a row, 0 where packing was not asked for.
    """

    path: Path
    documents: int
    tokens: int
    tokens_by_source: dict[str, int]
    cut: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    shard: Path
    target: Path
    encoding: Encoding
    made_from: str


def encode_shards(
    folder: Path, shards: dict[Path, str], encoding: Encoding, *, num_workers: int
) -> Iterator[TokenFile]:
    """Yield the ids of every shard, in order; ``shards`` are files of documents and their SHA-256.

    Errors:
        SevenfoldError: a process was ended; what the others made stays in ``folder``.
    """
    storage.sweep(folder)
    how = fingerprint(dataclasses.asdict(encoding))
    tasks = [
        _Task(
            shard=shard,
            target=folder / f"{shard.name.removesuffix(SUFFIX)}.npy",
            encoding=encoding,
            made_from=fingerprint([shard.name, sha256, how]),
        )
        for shard, sha256 in shards.items()
    ]
    yield from workers.share(_encode_shard, tasks, workers=num_workers)


def _encode_shard(task: _Task) -> TokenFile:
    known = _known(task)
    if known is not None:
        return known
    parts: list[NDArray[Any]] = []
    lengths: list[NDArray[np.int64]] = []
    by_source: Counter[str] = Counter()
    narrow = np.uint16 if task.encoding.vocab_size <= 2**16 else np.uint32
    for batch in _batches(read_documents(task.shard)):
        ids, counts = _between_bos_and_eos([str(d["text"]) for d in batch], task.encoding)
        parts.append(ids.astype(narrow))
        lengths.append(counts)
        for document, count in zip(batch, counts.tolist(), strict=True):
            by_source[str(document.get("source", "unknown"))] += count
    ids = np.concatenate(parts) if parts else np.empty(0, narrow)
    sizes = np.concatenate(lengths) if lengths else np.empty(0, np.int64)
    del parts
    facts = {
        "documents": len(sizes),
        "tokens": len(ids),
        "tokens_by_source": dict(by_source),
        "cut": 0,
    }
    encoding = task.encoding
    if encoding.row_length is not None:
        assert encoding.pad_id is not None
        facts["cut"] = int((sizes > encoding.row_length).sum())
        bos_id, pad_id = encoding.bos_id, encoding.pad_id
        ids = fill_rows(ids, sizes, encoding.row_length, bos_id=bos_id, pad_id=pad_id).reshape(-1)
    storage.write_array(task.target, ids)
    about = {"made_from": task.made_from, "sha256": storage.sha256_file(task.target), **facts}
    storage.write_json(_about(task.target), about)
    return TokenFile(path=task.target, **facts)  # type: ignore[arg-type]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield the documents in lists that are bounded in number and in size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document["text"])
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _about(path: Path) -> Path:
    return path.with_suffix(".json")


def _known(task: _Task) -> TokenFile | None:
    """Return what an earlier run made of the same shard in the same way, if its bytes are right."""
    path = _about(task.target)
    if not (path.is_file() and task.target.is_file()):
        return None
    try:
        facts = storage.read_json(path)
        right = facts.pop("made_from") == task.made_from
        if not right or facts.pop("sha256") != storage.sha256_file(task.target):
            return None
        return TokenFile(path=task.target, **facts)
    except (BadDataError, AttributeError, KeyError, TypeError):
        return None


def _between_bos_and_eos(
    texts: Sequence[str], encoding: Encoding
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the ids of ``texts`` as pretraining sees them, and how many each text has."""
    found, counts = encoders.encode(encoding.engine, encoding.backend_json, texts)
    counts = counts + 2
    ends = np.cumsum(counts)
    ids = np.empty(int(ends[-1]), np.uint32)
    inside = np.ones(len(ids), dtype=bool)
    inside[ends - counts] = inside[ends - 1] = False
    ids[ends - counts], ids[ends - 1], ids[inside] = encoding.bos_id, encoding.eos_id, found
    return ids, counts
