"""From raw documents to clean ones: normalised, filtered, unique, split for validation.

Filters see one document at a time and name the reason for which they drop it, so more of them
(near duplicates, quality, decontamination) join by being listed in :func:`filters`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sevenfold.base.config import configuration
from sevenfold.base.errors import BadDataError
from sevenfold.data.clean_counts import CleaningCounts
from sevenfold.data.decontamination import ItemIndex
from sevenfold.data.row_files import open_compressed

Document = dict[str, Any]
Filter = Callable[[Document], str | None]

SHARD_BYTES = 256 * 2**20
COMPRESSION_LEVEL = 3
SPLITS = ("train", "validation")
_BOUNDARIES = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?]\s", r"\s")]


@configuration
class CleanConfig:
    """What is kept, and in which form.

    ``document_characters``: longer documents (books) are cut at paragraphs into pieces of at most
    so many; ``min_characters``: shorter ones are dropped.
    """

    min_characters: int
    document_characters: int
    unicode_form: Literal["NFC", "NFKC", "none"]
    deduplicate: Literal["exact", "none"]

    def __post_init__(self) -> None:
        """Check that a cut can leave pieces long enough to be kept."""
        if not 0 < self.min_characters <= self.document_characters // 4:
            raise ValueError("'min_characters' is above 0 and at most document_characters / 4")


def clean_documents(
    documents: Iterable[Document],
    config: CleanConfig,
    counts: CleaningCounts,
    items: ItemIndex | None = None,
) -> Iterator[Document]:
    """Yield the documents that stay, normalised and cut to size; ``counts`` is filled meanwhile.

    ``items`` are those of the evaluation, which no document may hold.
    """
    steps = filters(config, items)
    for document in documents:
        counts.read(document)
        text = normalise(document["text"], config.unicode_form)
        for piece in _pieces({**document, "text": text}, config.document_characters):
            reason = next((found for step in steps if (found := step(piece))), None)
            if reason is None:
                yield piece
            else:
                counts.drop(piece, reason)


def filters(config: CleanConfig, items: ItemIndex | None = None) -> list[Filter]:
    """Return the filters a configuration asks for, in the order in which they look."""
    wanted: list[Filter] = [_too_short(config.min_characters)]
    if config.deduplicate == "exact":
        wanted.append(_seen_before())
    if items is not None:
        wanted.append(lambda document: items.reason([document["text"]]))
    return wanted


def _too_short(min_characters: int) -> Filter:
    return lambda document: "too_short" if len(document["text"]) < min_characters else None


def _seen_before() -> Filter:
    """Drop what differs from an earlier document in white space at most.

    Sixteen bytes a document are kept in memory: some 100 MB for a million documents.
    """
    seen: set[bytes] = set()

    def look(document: Document) -> str | None:
        key = hashlib.sha256(" ".join(document["text"].split()).encode()).digest()[:16]
        if key in seen:
            return "duplicate"
        seen.add(key)
        return None

    return look


def normalise(text: str, unicode_form: Literal["NFC", "NFKC", "none"]) -> str:
    """Return ``text`` in one Unicode form, with line feeds only, without space around it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if unicode_form != "none":
        text = unicodedata.normalize(unicode_form, text)
    return text.strip()


def _pieces(document: Document, limit: int) -> Iterator[Document]:
    pieces = list(cut(document["text"], limit))
    if len(pieces) <= 1:
        yield document
        return
    for number, piece in enumerate(pieces):
        yield {**document, "id": f"{document['id']}#{number}", "text": piece}


def cut(text: str, limit: int) -> Iterator[str]:
    """Yield ``text`` in pieces of at most ``limit`` characters, none shorter than a quarter of it.

    A cut falls on the last blank line in the second half of a piece, else on the last line end,
    sentence end or space there, else where the limit is.
    """
    start = 0
    while (left := len(text) - start) > limit:
        # Two halves rather than a whole piece and a scrap.
        most = limit if left >= 2 * limit else (left + 1) // 2
        end = start + most
        for boundary in _BOUNDARIES:
            matches = list(boundary.finditer(text, start + most // 2, end))
            if matches:
                end = matches[-1].end()
                break
        yield text[start:end].strip()
        start = end
    if rest := text[start:].strip():
        yield rest


def assign_splits(
    documents: Iterable[Document], validation_fraction: float
) -> Iterator[tuple[str, Document]]:
    """Yield each document with its split: its own ``split``, else one drawn by its text's hash.

    The document with the lowest hash is always held out, so that even a tiny corpus has one.

    Errors:
        BadDataError: there is nothing for one of the two.
    """
    held_back: tuple[float, Document] | None = None
    splits: Counter[str] = Counter()
    for document in documents:
        if document.get("split") in SPLITS:
            splits[document["split"]] += 1
            yield document["split"], document
            continue
        candidate = (fraction_of(document["text"]), document)
        if held_back is None:
            held_back = candidate
            continue
        if candidate[0] < held_back[0]:
            candidate, held_back = held_back, candidate
        split = "validation" if candidate[0] < validation_fraction else "train"
        splits[split] += 1
        yield split, candidate[1]
    if held_back is not None:
        drawn = held_back[0] < validation_fraction or not splits["validation"]
        splits["validation" if drawn else "train"] += 1
        yield ("validation" if drawn else "train"), held_back[1]
    if not splits["train"] or not splits["validation"]:
        raise BadDataError(
            f"{splits.total()} documents are left after cleaning, {splits['train']} to train on; "
            "at least one must train and one be held out; give more text or loosen 'clean'"
        )


def fraction_of(text: str) -> float:
    """Return a number in [0, 1) drawn from the bytes of ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


class DocumentWriter:
    """Writes ``<prefix>-00000.jsonl.zst``, ... of bounded size into a folder being made.

    A shard ends with the document that fills it. ``when_full`` is told the name of each shard that
    has ended so; the last one ends when the writer does.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        *,
        first_shard: int = 0,
        when_full: Callable[[str], None] | None = None,
    ) -> None:
        """Write into ``folder``; no file appears before the first document."""
        self.folder = folder
        self.prefix = prefix
        self._num_shards = first_shard
        self._when_full = when_full
        self._room = 0
        self._file: io.BufferedWriter | None = None

    def write(self, document: Document) -> None:
        """Append one document as a line of JSON."""
        import zstandard

        line = json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._file is None:
            path = self.folder / self._name(self._num_shards)
            compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True)
            self._file = zstandard.open(path, "wb", cctx=compressor)
            self._num_shards += 1
            self._room = SHARD_BYTES
        assert self._file is not None
        self._file.write(line)
        self._room -= len(line)
        if self._room <= 0:
            self._close()
            if self._when_full is not None:
                self._when_full(self._name(self._num_shards - 1))

    def _name(self, number: int) -> str:
        return f"{self.prefix}-{number:05d}.jsonl.zst"

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the last file."""
        self._close()


def read_shards(folder: Path, prefix: str) -> Iterator[Document]:
    """Yield the documents that a :class:`DocumentWriter` wrote, in order."""
    for path in sorted(folder.glob(f"{prefix}-*.jsonl.zst")):
        yield from read_documents(path)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of one of the files that a :class:`DocumentWriter` wrote, in order."""
    with open_compressed(path) as file:
        for line in file:
            yield json.loads(line)
