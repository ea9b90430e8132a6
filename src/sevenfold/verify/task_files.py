"""Files that evaluation items stand in: JSONL, CSV, text, packed ones, folders and archives.

Archives are read member by member in memory and never unpacked.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.storage import sha256_file

MAX_MEMBER_BYTES = 1 << 30
_WIKITEXT_TITLE = re.compile(r"^ = [^=].*[^=] = *$", re.MULTILINE)

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]


def task_sha256(paths: Sequence[Path]) -> str:
    """Return what identifies the bytes of a task's files, folders included."""
    files = [file for path in paths for file in (_folder_files(path) if path.is_dir() else [path])]
    return fingerprint([[file.name, sha256_file(file)] for file in files])


def _folder_files(path: Path) -> list[Path]:
    files = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and ".jsonl" in file.suffixes and not file.name.startswith(".")
    )
    if not files:
        raise UsageError(f"{path}: no .jsonl file in this folder")
    return files


def read_files(path: Path, *, as_text: bool) -> Iterator[Rows]:
    """Yield the rows of each file behind ``path``, every row with where it stands.

    ``as_text`` reads a ``.txt`` file as documents.

    Errors:
        UsageError: a type of file that is not read.
        BadDataError: a file that cannot be unpacked or decoded, a line that is no JSON object.
    """
    if path.is_dir():
        for file in _folder_files(path):
            yield _rows(_content(file), file.name, str(file))
    elif path.name.endswith((".tar.gz", ".tar", ".tgz")):
        yield from _archive_rows(path)
    elif ".txt" in path.suffixes and as_text:
        yield _text_rows(_content(path).decode("utf-8"), path)
    else:
        yield _rows(_content(path), path.name, str(path))


def _archive_rows(path: Path) -> Iterator[Rows]:
    with tarfile.open(path, "r:*") as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".jsonl")]
        for member in sorted(members, key=lambda m: m.name):
            if member.size > MAX_MEMBER_BYTES:
                raise BadDataError(
                    f"{path}: {member.name} holds {member.size} bytes; at most 1 GiB"
                )
            file = archive.extractfile(member)
            if file is not None:
                yield _rows(file.read(), member.name, f"{path}:{member.name}")


def _content(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".zst":
            with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as text:
                return text.read()
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise BadDataError(f"{path}: cannot be unpacked ({error}); fetch the file again") from None
    return path.read_bytes()


def _rows(content: bytes, name: str, where: str) -> Rows:
    """Yield ``(file:line, row)`` of a JSONL or CSV file."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    stem = Path(name).name.split(".")[0]
    if name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text))
        for row in reader:
            yield f"{where}:{reader.line_num}", {"id": f"{stem}-{reader.line_num}", **row}
        return
    if ".jsonl" not in Path(name).suffixes:
        raise UsageError(
            f"{where}: not a file of items; expected .jsonl, .csv, .tar.gz or a folder"
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadDataError(f"{where}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadDataError(f"{where}:{number}: expected one JSON object a line")
        yield f"{where}:{number}", {**row, "id": row.get("id", f"{stem}-{number}")}


def _text_rows(text: str, path: Path) -> Rows:
    """Yield the articles of a file in WikiText's layout, or the whole file as one document."""
    starts = [match.start() for match in _WIKITEXT_TITLE.finditer(text)]
    starts = [0, *(s for s in starts if text[:s].strip())]
    for index, start in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else len(text)
        row = {"id": f"{path.stem}-{index}", "text": text[start:end].strip(), "source": path.stem}
        yield f"{path}:{text.count(chr(10), 0, start) + 1}", row
