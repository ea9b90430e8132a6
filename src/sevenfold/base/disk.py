"""The file operations that ``base/storage.py`` writes with, one by one.

Before each of them stands a point at which a fault may come (``base/faults.py``), so that tests
can end the process, or let the disk refuse, between any two.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sevenfold.base import faults
from sevenfold.base.errors import BadDataError, SevenfoldError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HIDDEN = re.compile(r"/\.[^/]+\.(partial-|replaced$|unfinished(/|$))")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put ``path`` into errors of the system that do not say which file they are about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write(path: Path, data: bytes, *, append: bool = False) -> None:
    """Write ``data`` to ``path``, or append it: in two halves, as a fault may come between."""
    faults.at_storage_operation(path)
    half = len(data) // 2
    with _naming(path), path.open("ab" if append else "wb") as file:
        file.write(memoryview(data)[:half])
        file.flush()
        faults.at_storage_operation(path)
        file.write(memoryview(data)[half:])


def sync_tree(folder: Path) -> None:
    """Make everything in ``folder``, which libraries may have written, durable."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            faults.at_storage_operation(path, halve=functools.partial(_halve, path))
            sync_file(path)
    for path in [*paths, folder]:
        if path.is_dir():
            sync_directory(path)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def sync_file(path: Path) -> None:
    """Make the bytes of ``path`` durable."""
    faults.at_storage_operation(path)
    with _naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    faults.at_storage_operation(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with _naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path, *, frees_room: bool = False) -> None:
    """Give ``path`` another name, in place of the file that may have it."""
    faults.at_storage_operation(path, frees_room=frees_room)
    path.replace(target)


def link(path: Path, target: Path) -> None:
    """Give the bytes of ``path`` a second name; where the disk knows no links, copy them."""
    faults.at_storage_operation(target)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def unlink(path: Path) -> None:
    """Remove one file, if it is there."""
    faults.at_storage_operation(path, frees_room=True)
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder file by file, if it is there; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        unlink(path)
        return
    for inside in sorted(path.iterdir()):
        remove_tree(inside)
    faults.at_storage_operation(path, frees_room=True)
    path.rmdir()


def refusal(
    target: Path,
    error: OSError,
    *,
    temporary: Path | None = None,
    needed_bytes: int | None = None,
    done: str = "written",
) -> SevenfoldError:
    """Return what to tell people when the system refused something while ``target`` was made.

    ``temporary`` is where the bytes went so far; ``needed_bytes`` None where nobody knows.
    """
    reason = error.strerror or str(error)
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    ours = named is None or named in (target, *target.parents) or _HIDDEN.search(str(named))
    where = target if ours or named is None else named
    if error.errno in _FULL:
        free = shutil.disk_usage(next(p for p in where.absolute().parents if p.exists())).free
        written = 0 if temporary is None else _size(temporary)
        needs = f"more than {written:,}" if needed_bytes is None else f"{needed_bytes:,}"
        return SevenfoldError(
            f"{where}: could not be {done} ({reason}): it needs {needs} bytes, {free + written:,} "
            "are free; make room or choose another --run folder, then run the same command again"
        )
    if not ours:
        return BadDataError(
            f"{where}: could not be read ({reason}) while {target} was made; see that it is there "
            "and may be read, then run the same command again"
        )
    # Without a name it may also have been a file that was read.
    what = done if named is not None else f"read or {done}"
    return SevenfoldError(
        f"{target}: could not be {what} ({reason}); look at the disk and at the folder's "
        "permissions, then run the same command again"
    )


def _size(path: Path) -> int:
    inside = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in inside if file.is_file())
