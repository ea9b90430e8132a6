"""Every write of the package: atomic, durable, checksummed.

A file is written beside its target, flushed to the disk, renamed into place, and the directory
flushed; a folder likewise, with a ``manifest.json`` of its files' SHA-256. The single operations
(``base/disk.py``) are numbered points at which a fault may be injected, so that tests can stop the
process between any two of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from sevenfold.base import disk, permissions, seals
from sevenfold.base.errors import BadDataError, RunInUseError, SevenfoldError, UsageError
from sevenfold.base.seals import read_json as read_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# A core takes in 1.4 GB a second. More of them would hold up the training that goes on beside.
MOST_READERS = 8
CARD = "README.md"  # of a model: beside the files that fingerprint it, and loaded by nobody
# How safetensors says what the system refused: an error of its own, which is no OSError.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Hidden names that some thread of this process is working with; everybody else's are leftovers.
_in_progress: set[Path] = set()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 (hex) of the bytes of ``path``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their paths in ``folder``; several are read at a time."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    with _readers() as pool:
        return dict(zip(names, pool.map(sha256_file, paths), strict=True))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically.

    Errors:
        SevenfoldError: the disk is full or refuses; what was there before is untouched.
    """
    temporary = path.parent / f".{path.name}.partial-{os.getpid()}"
    with _making(path, temporary, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(temporary, data)
        disk.sync_file(temporary)
        disk.rename(temporary, path)
        disk.sync_directory(path.parent)


@contextlib.contextmanager
def _making(target: Path, temporary: Path, needed_bytes: int | None) -> Iterator[None]:
    """Where making ``target`` out of ``temporary`` fails, clear up and say what was refused."""
    names = {temporary, _replaced(target)}
    _in_progress.update(names)
    try:
        yield
    except BaseException as error:
        told = _tell(target, temporary, error, needed_bytes)
        with contextlib.suppress(OSError):
            _put_back(target)
            disk.remove_tree(temporary)
        if told is not None:
            raise told from error
        raise
    finally:
        _in_progress.difference_update(names)


def _tell(
    target: Path, temporary: Path, error: BaseException, needed_bytes: int | None
) -> SevenfoldError | None:
    """Return what to say instead of ``error``, or None."""
    if isinstance(error, SevenfoldError) and str(temporary) in str(error):
        # A hidden name that nobody knows, and that is gone by now.
        return type(error)(str(error).replace(str(temporary), str(target)))
    if isinstance(error, SafetensorError) and (code := _OS_ERROR.search(str(error))):
        error = OSError(int(code[1]), os.strerror(int(code[1])))
    if not isinstance(error, OSError):
        return None
    return disk.refusal(target, error, temporary=temporary, needed_bytes=needed_bytes)


@contextlib.contextmanager
def _changing(path: Path, done: str, needed_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk.refusal(path, error, needed_bytes=needed_bytes, done=done) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as JSON without NaN or infinity, sealed."""
    write_bytes(path, seals.json_bytes(value))


def write_sealed_text(path: Path, text: str) -> None:
    """Write ``text``, HTML or Markdown, to ``path`` atomically, with a comment that seals it."""
    write_bytes(path, seals.text_bytes(text))


@contextlib.contextmanager
def new_folder(
    target: Path, *, kind: str, needed_bytes: int | None = None, **facts: Any
) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target``, with a manifest, if the block succeeds.

    ``facts`` go into the manifest; the block may add more with ``manifest_facts(folder, ...)``.
    An existing ``target`` is replaced; a failing block leaves it as it was. ``needed_bytes``, if
    known, are named where the disk turns out to be full.

    Errors:
        SevenfoldError: the disk is full or refuses.
        BadDataError: a file outside that the block reads cannot be read.
    """
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    sweep(target.parent)
    with _making(target, temporary, needed_bytes):
        temporary.mkdir(parents=True)
        yield temporary
        if (extra := temporary / ".facts.json").exists():
            facts |= read_json(extra)
            disk.unlink(extra)
        disk.sync_tree(temporary)
        write_manifest(temporary, kind=kind, **facts)
        if target.exists():
            disk.rename(target, _replaced(target))
        disk.rename(temporary, target)
        disk.sync_directory(target.parent)
        disk.remove_tree(_replaced(target))


def manifest_facts(folder: Path, **facts: Any) -> None:
    """Add ``facts`` to the manifest of a folder that is being made by :func:`new_folder`."""
    disk.write(folder / ".facts.json", json.dumps(facts, allow_nan=False).encode())


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` if it exists, after renaming it so that no half of it is ever seen."""
    if not folder.exists():
        return
    doomed = folder.parent / f".{folder.name}.partial-removed"
    _in_progress.add(doomed)
    try:
        with _changing(folder, "removed"):
            disk.remove_tree(doomed)
            disk.rename(folder, doomed, frees_room=True)
            disk.remove_tree(doomed)
    finally:
        _in_progress.discard(doomed)


def remove_file(path: Path) -> None:
    """Remove one file if it exists, durably."""
    if path.exists():
        with _changing(path, "removed"):
            disk.unlink(path)
            disk.sync_directory(path.parent)


def move_folder(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``, durably."""
    with _changing(folder, "moved"):
        disk.rename(folder, target)
        disk.sync_directory(target.parent)


def sweep(parent: Path) -> None:
    """Clear what a killed process left in ``parent``; put back a folder caught mid-replacement."""
    if not parent.is_dir():
        return
    with _changing(parent, "cleared of what was left in it"):
        for path in sorted(set(parent.glob(".*.replaced")) - _in_progress):
            _put_back(parent / path.name[1 : -len(".replaced")])
            disk.remove_tree(path)
        for path in sorted(set(parent.glob(".*.partial-*")) - _in_progress):
            log.info("removing %s, left by a process that was stopped", path)
            disk.remove_tree(path)


def _replaced(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _put_back(target: Path) -> None:
    replaced = _replaced(target)
    if replaced.exists() and not target.exists():
        disk.rename(replaced, target)


def write_manifest(folder: Path, *, kind: str, **facts: Any) -> dict[str, Any]:
    """Write ``manifest.json``: path, bytes and SHA-256 of every file, a fingerprint, ``facts``."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    files = [
        {"path": name, "bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in sha256_files(folder, paths).items()
    ]
    manifest = {"kind": kind, "fingerprint": _files_fingerprint(files), **facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def _readers() -> ThreadPoolExecutor:
    """Return threads for SHA-256: hashlib lets go of the interpreter, so files go side by side."""
    return ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1))


def _files_fingerprint(files: list[dict[str, Any]]) -> str:
    lines = "".join(f"{file['sha256']}  {file['path']}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(
    folder: Path, error: type[SevenfoldError] = BadDataError, *, made_by: str = ""
) -> dict[str, Any]:
    """Return the manifest of ``folder``.

    Errors:
        UsageError: the folder or its manifest is missing; ``made_by`` names the script to run.
        error: it is not readable, or its fingerprint does not belong to its list of files.
    """
    path = folder / MANIFEST
    if not path.is_file():
        advice = f"; run {made_by} first" if made_by else ""
        raise UsageError(f"{folder}: not there yet, or not complete{advice}")
    manifest: dict[str, Any] = read_json(path, error)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not _is_file_list(files) or manifest.get("fingerprint") != _files_fingerprint(files):
        raise error(f"{path}: the fingerprint does not belong to the listed files; make it again")
    return manifest


def _is_file_list(files: Any) -> TypeGuard[list[dict[str, Any]]]:
    types = {"path": str, "bytes": int, "sha256": str}
    return isinstance(files, list) and all(
        isinstance(file, dict) and all(isinstance(file.get(k), t) for k, t in types.items())
        for file in files
    )


def verify_folder(
    folder: Path, error: type[SevenfoldError] = BadDataError, *, exact: bool = False
) -> dict[str, Any]:
    """Recompute every SHA-256 of ``folder`` and return its manifest.

    ``exact``: other files beside them (hidden ones and a model's card may lie there) are an error.

    Errors:
        error: a file is missing, has another size or other bytes, or points outside the folder;
            or, where ``exact``, is not listed.
    """
    manifest = read_manifest(folder, error)
    listed = {MANIFEST, *(file["path"] for file in manifest["files"])}
    listed |= {CARD} if manifest.get("kind") == "model" else set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_file = path.is_file() or path.is_symlink()
        if is_file and name not in listed and not path.name.startswith("."):
            if exact:  # libraries also read what we did not write
                raise error(f"{path}: not one of the files that {MANIFEST} lists; remove it")
            log.warning("%s: not one of the files that %s lists", path, MANIFEST)
    for file in manifest["files"]:
        path = folder / file["path"]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise error(f"{folder / MANIFEST}: {file['path']} lies outside the folder")
        if not path.is_file():
            raise error(f"{path}: missing; the manifest lists it with {file['bytes']} bytes")
        if path.stat().st_size != file["bytes"]:
            raise error(f"{path}: {path.stat().st_size} bytes, the manifest says {file['bytes']}")
    with _readers() as pool:
        for _ in pool.map(lambda file: _require_bytes(folder, file, error), manifest["files"]):
            pass
    return manifest


def _require_bytes(folder: Path, file: Mapping[str, Any], error: type[SevenfoldError]) -> None:
    path = folder / file["path"]
    try:
        found = sha256_file(path)
    except OSError as problem:
        raise error(f"{path}: could not be read ({problem.strerror}); look at the disk") from None
    if found != file["sha256"]:
        raise error(f"{path}: its SHA-256 is not the manifest's; the file has changed")


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write ``array`` to ``path`` atomically, as ``.npy`` without objects."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: Path) -> NDArray[Any]:
    """Read what :func:`write_array` wrote: no objects, and no archive of arrays."""
    with path.open("rb") as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


class JsonLines:
    """A file of one JSON object a line that can go back to an earlier step."""

    def __init__(self, path: Path):
        """Open ``path`` for appending; a half-written last line is dropped."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        return [row for row, _ in self._lines()]

    def _lines(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield every complete line as an object without its checksum, and as it stands."""
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                row.pop("crc", None)
                yield row, line

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null."""
        finite = {k: not isinstance(v, float) or math.isfinite(v) for k, v in row.items()}
        clean = {k: v if finite[k] else None for k, v in row.items()}
        line = seals.line_bytes(clean)
        with _changing(self.path, "written", len(line)):
            disk.write(self.path, line, append=True)

    def rewind(self, last_step: int) -> None:
        """Drop every row of a step after ``last_step``, so that each step stands once."""
        sweep(self.path.parent)
        if self.path.exists():
            kept = (line for row, line in self._lines() if row.get("step", 0) <= last_step)
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the lock of ``run_dir``; the kernel frees it when the process ends, however it ends.

    Errors:
        RunInUseError: another process holds it; the message names process, host and start.
        UsageError: the folder cannot be written, or is somebody else's.
    """
    try:
        # Whatever the umask says: only the owner writes in a run.
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        permissions.require_own(run_dir)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"{run_dir}: cannot be written ({error.strerror}); choose --run") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            raise RunInUseError(
                f"{run_dir}: in use by {holder or 'another process'}; "
                "wait for it, stop it, or choose another --run folder"
            ) from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {started}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        os.close(descriptor)
