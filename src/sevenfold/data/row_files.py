"""Files of rows: opened, unpacked, and read as what their names say they are."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.strict_json import (
    MAX_LINE_BYTES,
    Values,
    decode_lines,
    read_json_lines,
    read_json_list,
)

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".arrow", ".csv")
COMPRESSIONS = (".gz", ".zst")
MAX_WHOLE_BYTES = 2**30
_ARROW_FILE = b"ARROW1"
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def kind_of_file(path: Path) -> str:
    """Return the suffix that says how ``path`` is read, compression taken off.

    Errors:
        UsageError: files of this kind are not read.
    """
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if plain.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: files of this kind are not read; give {', '.join(SUFFIXES)}, "
            f"each also as {' or '.join(COMPRESSIONS)}, or a folder"
        )
    return plain.suffix


def read_file(path: Path) -> Iterator[tuple[Values, str]]:
    """Yield the rows of one file, each with the place where it stands.

    Errors:
        UsageError: files of this kind are not read.
        BadDataError: it cannot be read as what it claims to be; with ``file:line``.
    """
    kind = kind_of_file(path)
    with open_compressed(path) as file:
        if kind == ".txt":
            yield {"text": decode_lines(_without_mark(_whole(file, path)), str(path))}, str(path)
        elif kind == ".jsonl":
            yield from read_json_lines(file, str(path))
        elif kind == ".json":
            yield from read_json_list(_whole(file, path), str(path))
        elif kind == ".csv":
            yield from _read_csv(_without_mark(_whole(file, path)), str(path))
        else:
            inner = io.BytesIO(_whole(file, path)) if path.suffix in COMPRESSIONS else path
            read = _read_arrow if kind == ".arrow" else _read_parquet
            yield from read(inner, str(path))


def _whole(file: BinaryIO, path: Path) -> bytes:
    """Return all bytes of a file that cannot be read line by line, however well it is packed."""
    data = io.BytesIO()
    while piece := file.read(2**20):
        data.write(piece)
        if data.tell() > MAX_WHOLE_BYTES:
            raise BadDataError(
                f"{path}: holds more than {MAX_WHOLE_BYTES} bytes; cut it into several files, or "
                "give .jsonl, which is read line by line"
            )
    return data.getvalue()


def _without_mark(data: bytes) -> bytes:
    """Drop the byte order mark that some editors put before plain text and tables."""
    return data.removeprefix(b"\xef\xbb\xbf")


@contextlib.contextmanager
def open_compressed(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for reading bytes, decompressed.

    Errors:
        BadDataError: the compressed data are damaged or cut off.
    """
    import zstandard

    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield cast("BinaryIO", file)
        elif path.suffix == ".zst":
            with path.open("rb") as raw:
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield io.BufferedReader(reader, 2**20)
        else:
            with path.open("rb") as file:
                yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise BadDataError(
            f"{path}: damaged or cut off ({error}); fetch or compress the file again"
        ) from None


def _read_csv(data: bytes, name: str) -> Iterator[tuple[Values, str]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(io.StringIO(decode_lines(data, name), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or not header:
            raise BadDataError(
                f"{name}:1: the first line must name the columns, each once; found {header}"
            )
        line = reader.line_num + 1
        for fields in reader:
            where = f"{name}:{line}"
            if len(fields) != len(header):
                raise BadDataError(
                    f"{where}: {len(fields)} fields, but the header has {len(header)}; "
                    "mend the row or its quotes"
                )
            yield dict(zip(header, fields, strict=True)), where
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadDataError(f"{name}:{reader.line_num}: not CSV ({error}); mend the row") from None


def _read_parquet(file: Path | io.BytesIO, name: str) -> Iterator[tuple[Values, str]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for values in batch.to_pylist():
                row += 1
                yield values, f"{name}:{row}"
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise BadDataError(f"{name}: not readable as Parquet ({reason}); fetch it again") from None


def _read_arrow(file: Path | io.BytesIO, name: str) -> Iterator[tuple[Values, str]]:
    """Yield the rows of an Arrow file in either layout; that of ``datasets`` is the stream."""
    import pyarrow

    row = 0
    try:
        unpacked = file.getvalue() if isinstance(file, io.BytesIO) else None
        with pyarrow.BufferReader(unpacked) if unpacked else pyarrow.memory_map(name) as opened:
            for batch in _arrow_batches(opened, name):
                for values in batch.to_pylist():
                    row += 1
                    yield values, f"{name}:{row}"
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise BadDataError(f"{name}: not readable as Arrow ({reason}); fetch it again") from None


def _arrow_batches(opened: Any, name: str) -> Iterator[Any]:
    import pyarrow

    if opened.read(len(_ARROW_FILE)) == _ARROW_FILE:
        whole = pyarrow.ipc.open_file(opened)
        yield from (whole.get_batch(index) for index in range(whole.num_record_batches))
        return
    # A stream that was cut between two batches reads like one that is whole.
    opened.seek(max(0, opened.size() - len(_ARROW_STREAM_END)))
    if opened.read() != _ARROW_STREAM_END:
        raise BadDataError(f"{name}: not Arrow, or cut off; fetch it again")
    opened.seek(0)
    yield from pyarrow.ipc.open_stream(opened)
