"""From raw documents to clean ones: repaired, normalised, cut, filtered, masked.

Filters see one document at a time and name the reason for which they drop it, so more of them join
by being listed in :func:`filters`. What needs all documents (duplicates, the split) is in
``duplicates``; ``cleaning`` does both, shard by shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sevenfold.base.config import configuration
from sevenfold.data import personal, quality
from sevenfold.data.clean_counts import CleaningCounts
from sevenfold.data.decontamination import ItemIndex
from sevenfold.data.quality import Filter
from sevenfold.data.row_files import open_compressed

Document = dict[str, Any]

# A shard is a task of cleaning, done anew when it was killed: a minute at 1 MB/s.
SHARD_BYTES = 64 * 2**20
COMPRESSION_LEVEL = 3
SPLITS = ("train", "validation")
_BOUNDARIES = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?]\s", r"\s")]


@configuration
class CleanConfig:
    """What is kept, and in which form.

    ``document_characters``: longer documents (books) are cut at paragraphs into pieces of at most
    so many; ``min_characters``: shorter ones are dropped. ``repair``: mend wrongly decoded text;
    ``languages``: the only ones kept (ISO 639-1), null: all; ``quality``: the filters of these
    corpora, by datatrove; ``mask_pii``: e-mail and IP addresses, telephone numbers and keys.
    ``deduplicate``: ``minhash`` also drops near-duplicates.
    """

    min_characters: int
    document_characters: int
    unicode_form: Literal["NFC", "NFKC", "none"]
    repair: bool
    languages: tuple[str, ...] | None
    quality: tuple[quality.QualityName, ...]
    mask_pii: bool
    deduplicate: Literal["none", "exact", "minhash"]

    def __post_init__(self) -> None:
        """Check that a cut can leave pieces long enough to be kept."""
        if not 0 < self.min_characters <= self.document_characters // 4:
            raise ValueError("'min_characters' is above 0 and at most document_characters / 4")
        if self.languages is not None and not self.languages:
            raise ValueError("'languages' names at least one language, or is null to keep all")
        if len(set(self.quality)) != len(self.quality):
            raise ValueError("'quality' names each filter once")


def clean_documents(
    documents: Iterable[Document],
    config: CleanConfig,
    counts: CleaningCounts,
    items: ItemIndex | None = None,
) -> Iterator[tuple[Document, dict[str, int]]]:
    """Yield the pieces that stay, each with what was masked in it, by kind.

    ``counts`` is told what was read and dropped; ``items`` are those of the evaluation, which no
    piece may hold.
    """
    steps = filters(config, items)
    repair = quality.repairer() if config.repair else None
    mask = personal.masker() if config.mask_pii else None
    for document in documents:
        counts.read(document)
        text = repair(document["text"]) if repair else document["text"]
        text = normalise(text, config.unicode_form)
        for piece in _pieces({**document, "text": text}, config.document_characters):
            reason = next((found for step in steps if (found := step(piece))), None)
            if reason is not None:
                counts.drop(piece, reason)
                continue
            masked: dict[str, int] = {}
            if mask is not None:
                piece["text"], masked = mask(piece["text"])
            yield piece, masked


def filters(config: CleanConfig, items: ItemIndex | None = None) -> list[Filter]:
    """Return the filters a configuration asks for, in the order in which they look."""
    too_short = _too_short(config.min_characters)
    wanted: list[Filter] = [too_short]
    if items is not None:
        wanted.append(lambda document: items.reason([document["text"]]))
    if config.languages is not None:
        wanted.append(quality.language_filter(config.languages))
    wanted += quality.quality_filters(config.quality)
    return [*wanted, too_short] if "c4" in config.quality else wanted  # c4 takes lines out


def _too_short(min_characters: int) -> Filter:
    return lambda document: "too_short" if len(document["text"]) < min_characters else None


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
    for path in shard_paths(folder, prefix):
        yield from read_documents(path)


def shard_paths(folder: Path, prefix: str) -> list[Path]:
    """Return the files that a :class:`DocumentWriter` wrote, in order."""
    return sorted(folder.glob(f"{prefix}-*.jsonl.zst"))


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of one of the files that a :class:`DocumentWriter` wrote, in order."""
    with open_compressed(path) as file:
        for line in file:
            yield json.loads(line)
