"""Every write of the package: atomic, durable, checksummed.

A file is written beside its target, flushed to the disk, renamed into place, and the directory
flushed; a folder likewise, with a ``manifest.json`` of its files' SHA-256. Each of these
operations is a numbered point at which a fault may be injected (``base/faults.py``), so that tests
can stop the process between any two of them.
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
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from sevenfold.base import faults
from sevenfold.base.errors import BadDataError, RunInUseError, SevenfoldError, UsageError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 (hex) of the bytes of ``path``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    faults.at_storage_operation()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    Errors:
        SevenfoldError: the disk is full or refuses; the target is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        faults.at_storage_operation()
        write(temporary)
        faults.at_storage_operation()
        _sync_file(temporary)
        faults.at_storage_operation()
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _storage_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _storage_error(path: Path, error: Exception) -> SevenfoldError:
    parent = next(p for p in path.parents if p.exists())
    free_gib = shutil.disk_usage(parent).free / 2**30
    reason = getattr(error, "strerror", None) or str(error)
    return SevenfoldError(
        f"{path}: could not be written ({reason}); {free_gib:.2f} GiB are free on this disk; "
        "make room or choose another --run folder, then run the same command again"
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    write_atomically(path, lambda temporary: _write(temporary, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as JSON without NaN or infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, error: type[SevenfoldError] = BadDataError) -> Any:
    """Read JSON written by us or by people: no NaN, no key twice.

    Errors:
        error: the file is missing or not such JSON; the message names it.
    """
    try:
        return json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_twice,
        )
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key '{next(k for k in keys if keys.count(k) > 1)}' stands twice")
    return values


@contextlib.contextmanager
def new_folder(target: Path, *, kind: str, **facts: Any) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target``, with a manifest, if the block succeeds.

    ``facts`` go into the manifest; the block may add more with ``manifest_facts(folder, ...)``.
    An existing ``target`` is replaced; a failing block leaves it as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        extra = temporary / ".facts.json"
        if extra.exists():
            facts |= read_json(extra)
            extra.unlink()
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                faults.at_storage_operation()
                _sync_file(path)
        write_manifest(temporary, kind=kind, **facts)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own.
        shutil.rmtree(temporary, ignore_errors=True)
        raise _storage_error(target, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = target.parent / f".{target.name}.replaced"
    if target.exists():
        faults.at_storage_operation()
        target.rename(replaced)
    faults.at_storage_operation()
    temporary.rename(target)
    sync_directory(target.parent)
    remove_folder(replaced)


def manifest_facts(folder: Path, **facts: Any) -> None:
    """Add ``facts`` to the manifest of a folder that is being made by :func:`new_folder`."""
    (folder / ".facts.json").write_text(json.dumps(facts, allow_nan=False), encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` if it exists, after renaming it so that no half of it is ever seen."""
    if not folder.exists():
        return
    faults.at_storage_operation()
    doomed = folder.parent / f".{folder.name}.partial-removed"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    faults.at_storage_operation()
    shutil.rmtree(doomed)


def remove_file(path: Path) -> None:
    """Remove one file if it exists, durably."""
    if path.exists():
        faults.at_storage_operation()
        path.unlink()
        sync_directory(path.parent)


def move_folder(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``, durably."""
    faults.at_storage_operation()
    folder.rename(target)
    sync_directory(target.parent)


def sweep(parent: Path) -> None:
    """Clear what a killed process left in ``parent``; put back a folder caught mid-replacement."""
    if not parent.is_dir():
        return
    for path in sorted(parent.glob(".*.replaced")):
        original = parent / path.name[1 : -len(".replaced")]
        if original.exists():
            shutil.rmtree(path)
        else:
            path.rename(original)
    for path in sorted(parent.glob(".*.partial-*")):
        log.info("removing %s, left by a process that was stopped", path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_manifest(folder: Path, *, kind: str, **facts: Any) -> dict[str, Any]:
    """Write ``manifest.json``: path, bytes and SHA-256 of every file, a fingerprint, ``facts``."""
    files = [
        {
            "path": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    ]
    manifest = {
        "kind": kind,
        "fingerprint": _files_fingerprint(files),
        **facts,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


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

    ``exact``: nothing but hidden files may lie beside the listed ones. A model folder is what all
    its files say: libraries also read those that we did not write.

    Errors:
        error: a file is missing, has another size or other bytes, or points outside the folder;
            or, where ``exact``, is not listed.
    """
    manifest = read_manifest(folder, error)
    listed = {MANIFEST, *(file["path"] for file in manifest["files"])}
    for path in sorted(folder.rglob("*")) if exact else ():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed and not path.name.startswith("."):
            raise error(f"{path}: not one of the files that {MANIFEST} lists; remove it")
    for file in manifest["files"]:
        path = folder / file["path"]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise error(f"{folder / MANIFEST}: {file['path']} lies outside the folder")
        if not path.is_file():
            raise error(f"{path}: missing; the manifest lists it with {file['bytes']} bytes")
        if path.stat().st_size != file["bytes"]:
            raise error(f"{path}: {path.stat().st_size} bytes, the manifest says {file['bytes']}")
        if sha256_file(path) != file["sha256"]:
            raise error(f"{path}: its SHA-256 is not the manifest's; the file has changed")
    return manifest


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write ``array`` to ``path`` atomically, as ``.npy`` without objects."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: Path) -> NDArray[Any]:
    """Read what :func:`write_array` wrote; objects are never loaded."""
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array


class JsonLines:
    """A file of one JSON object a line that can go back to an earlier step."""

    def __init__(self, path: Path):
        """Open ``path`` for appending; a half-written last line is dropped."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null."""
        clean = {k: None if _is_infinite(v) else v for k, v in row.items()}
        with self.path.open("ab") as file:
            file.write(json.dumps(clean, allow_nan=False).encode() + b"\n")

    def rewind(self, last_step: int) -> None:
        """Drop every row of a step after ``last_step``, so that each step stands once."""
        if self.path.exists():
            rows = [row for row in self.read() if row.get("step", 0) <= last_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the lock of ``run_dir``; the kernel frees it when the process ends, however it ends.

    Errors:
        RunInUseError: another process holds it; the message names process, host and start.
        UsageError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
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
