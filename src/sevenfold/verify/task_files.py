"""Files that evaluation items stand in: those that training rows do, folders and archives of them.

Archives are read member by member in memory and never unpacked.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.storage import sha256_file
from sevenfold.data.row_files import read_file
from sevenfold.data.strict_json import read_json_lines

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
    for file in files:
        if not file.resolve().is_relative_to(path.resolve()):
            raise BadDataError(f"{file}: a link out of {path}; copy the file into the folder")
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
            yield _with_ids(read_file(file), file.name)
    elif path.name.endswith((".tar.gz", ".tar", ".tgz")):
        yield from _archive_rows(path)
    elif ".txt" in path.suffixes and as_text:
        yield _text_rows(path)
    else:
        yield _with_ids(read_file(path), path.name)


def _archive_rows(path: Path) -> Iterator[Rows]:
    with _unpacking(path), tarfile.open(path, "r:*") as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".jsonl")]
        for member in sorted(members, key=lambda m: m.name):
            if member.size > MAX_MEMBER_BYTES:
                raise BadDataError(
                    f"{path}: {member.name} holds {member.size} bytes; at most 1 GiB"
                )
            yield _with_ids(_member_rows(path, archive, member), member.name)


def _member_rows(
    path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo
) -> Iterator[tuple[Row, str]]:
    file = cast("BinaryIO", archive.extractfile(member))  # None only for what is no file
    with _unpacking(path):
        yield from read_json_lines(file, f"{path}:{member.name}")


@contextlib.contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(f"{path}: cannot be unpacked ({reason}); fetch the file again") from None


def _with_ids(rows: Iterator[tuple[Row, str]], name: str) -> Rows:
    """Yield ``(where, row)``; a row without an id is named after its file and line."""
    stem = Path(name).name.split(".")[0]
    for row, where in rows:
        yield where, {"id": f"{stem}-{where.rpartition(':')[2]}", **row}


def _text_rows(path: Path) -> Rows:
    """Yield the articles of a file in WikiText's layout, or the whole file as one document."""
    text = next(read_file(path))[0]["text"]
    starts = [match.start() for match in _WIKITEXT_TITLE.finditer(text)]
    starts = [0, *(s for s in starts if text[:s].strip())]
    for index, start in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else len(text)
        row = {"id": f"{path.stem}-{index}", "text": text[start:end].strip(), "source": path.stem}
        yield f"{path}:{text.count(chr(10), 0, start) + 1}", row
