"""Packed token rows: ``.npy`` files of N x row_length ids, written here, read from anywhere.

Reading refuses by name whatever training would silently get wrong: other types, other shapes, ids
without a token, damaged files. Pickled objects are never loaded.
"""

from __future__ import annotations

import logging
import struct
import tokenize
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from sevenfold.base import storage, workers
from sevenfold.base.config import configuration, fingerprint
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.sources import is_saved_dataset, load_saved_dataset
from sevenfold.data.token_rows import AnyArray, TokenIds, TokenShards, repeated_rows, state, watched

log = logging.getLogger(__name__)

SHARD_TOKENS = 2**24
ID_TYPES = ("int64", "int32", "uint16", "uint32")
HELD_OUT_FRACTION = 0.01
REPEATED_SHARE = 0.5  # of the rows to train on, above which it is warned of
SHARED_SHARE = 0.01  # of the held-out rows, above which training on them is refused
_CHUNK_TOKENS = 2**22


@configuration
class PackConfig:
    """Rows of ``row_length`` tokens; uint16 takes a quarter of int64's disk.

    ``strategy``: ``concatenate`` puts documents one after the other and cuts where a row is full;
    ``best_fit`` cuts only documents longer than a row, and pads what stays empty.
    """

    row_length: Annotated[int, Field(ge=2)]
    dtype: Literal["int64", "uint16"]
    strategy: Literal["concatenate", "best_fit"]


@dataclass(frozen=True, kw_only=True)
class PackedShards:
    """The rows of a folder, to train on and held out, and a fingerprint of all its bytes.

    ``files`` are the SHA-256 of its files, by their paths in it; ``pad_id`` is what fills the ends
    of rows, None where they are full.
    """

    train: TokenShards
    validation: TokenShards
    fingerprint: str
    files: dict[str, str]
    pad_id: int | None = None


def open_shards(
    folder: Path,
    *,
    vocab_size: int,
    min_length: int,
    tokenizer_fingerprint: str | None = None,
    known: Mapping[str, str] | None = None,
) -> PackedShards:
    """Open a folder of packed ``.npy`` files, or a saved data set with ``input_ids``.

    Files that begin with ``validation`` (or a split of that name) are held out; where there are
    none, the last hundredth of the rows is. Every id is looked at before anything trains, unless
    the files are, by their SHA-256, those ``known`` to have been looked at for this vocabulary.

    Errors:
        UsageError: nothing is there.
        BadDataError: a file is not what training needs; file, place, what was expected.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; run scripts/03_tokenize_and_pack.py, or name a folder of "
            "packed .npy files with --data"
        )
    if is_saved_dataset(folder):
        parts, row_length = _open_input_ids(folder, min_length)
        hashes = storage.sha256_files(folder, sorted(folder.rglob("*.arrow")))
    else:
        # Before they are hashed, which takes minutes: what changes meanwhile is no longer that.
        files = {path: state(path) for path in _list_files(folder)}
        hashes = _hashes(folder, list(files))
        _check_tokenizer(folder, tokenizer_fingerprint)
        arrays = {path: _open_array(path, min_length) for path in files}
        row_length = _common_length(arrays)
        parts = defaultdict(list)
        for path, array in arrays.items():
            split = "validation" if path.name.startswith("validation") else "train"
            parts[split].append(watched(str(path), array, {path: files[path]}))
    for part in [part for split in parts.values() for part in split if hashes != known]:
        _check_ids(part.name, part.array, vocab_size, row_length)
    train, validation = _split(folder, parts, row_length)
    if hashes != known:
        _check_repeats(folder, train, validation, drawn="validation" not in parts)
    about: dict[str, Any] = {"fingerprint": fingerprint(hashes)}
    if (folder / storage.MANIFEST).is_file():  # then lineage finds the folder by it
        about = storage.read_manifest(folder)
    return PackedShards(
        train=train,
        validation=validation,
        fingerprint=str(about["fingerprint"]),
        files=hashes,
        pad_id=about.get("pad_id"),
    )


def _open_input_ids(folder: Path, min_length: int) -> tuple[dict[str, list[TokenIds]], int]:
    """Map the ``input_ids`` of a saved data set as flat arrays, by split; and the row length.

    Rows of one length that holds the longest context stay rows; others are read as one stream of
    tokens, cut into rows of ``min_length``.

    Errors:
        BadDataError: no such column, not whole numbers, a null.
    """
    names = ["train", "validation"] if (folder / "dataset_dict.json").is_file() else [None]
    parts: dict[str, list[TokenIds]] = {}
    lengths: set[int] = set()
    for name in names:
        if name == "validation" and not (folder / "validation").is_dir():
            continue
        table = load_saved_dataset(folder, name)
        where = str(folder if name is None else folder / name)
        arrays, found = _flat_ids(table, where)
        parts[name or "train"] = arrays
        lengths |= found
    common = lengths.pop() if len(lengths) == 1 else 0
    return parts, common if common >= min_length else min_length


def _flat_ids(table: Any, where: str) -> tuple[list[TokenIds], set[int]]:
    import pyarrow

    if "input_ids" not in table.column_names:
        raise BadDataError(
            f"{where}: no column 'input_ids'; it has {', '.join(table.column_names)}; rename it"
        )
    arrays: list[TokenIds] = []
    files = {path: state(path) for path in (Path(f["filename"]) for f in table.cache_files)}
    lengths: set[int] = set()
    column = table.with_format("arrow").data.column("input_ids")
    if table._indices is not None:
        column = table.flatten_indices().data.column("input_ids")
    for chunk in column.chunks:
        kind = chunk.type
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        if not is_list or not pyarrow.types.is_integer(kind.value_type):
            raise BadDataError(
                f"{where}:input_ids: {kind}, expected lists of whole numbers; save ids as int32 "
                "or int64"
            )
        values = chunk.flatten()
        if chunk.null_count or values.null_count:
            raise BadDataError(f"{where}:input_ids: holds null, expected ids; remove those rows")
        lengths |= set(np.unique(chunk.value_lengths().to_numpy(zero_copy_only=False)).tolist())
        if len(values):
            ids = values.to_numpy(zero_copy_only=True)
            arrays.append(watched(f"{where}:input_ids", ids, files))
    return arrays, lengths


def _list_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*.npy") if not path.name.startswith("."))
    if not files:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".npz", ".bin", ".pkl"))
        hint = f" ({others[0]} is not read)" if others else ""
        raise UsageError(
            f"{folder}: no .npy file there{hint}; give packed .npy files (N x length, int64) or a "
            "save_to_disk folder with input_ids"
        )
    for path in files:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadDataError(f"{path}: a link out of {folder}; copy the file into the folder")
    return files


def _hashes(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """Return every file's SHA-256: the manifest's, checked, where there is one."""
    if (folder / storage.MANIFEST).is_file():
        manifest = storage.verify_folder(folder)
        hashes = {file["path"]: file["sha256"] for file in manifest["files"]}
        for path in files:
            if path.relative_to(folder).as_posix() not in hashes:
                raise BadDataError(f"{path}: not in {storage.MANIFEST}; remove it, or pack again")
    else:
        hashes = storage.sha256_files(folder, files)
    seen: dict[str, str] = {}
    for name, found in hashes.items():
        if name.endswith(".npy") and found in seen:
            raise BadDataError(
                f"{folder / name}: the same bytes as {seen[found]}; a shard counts once, and held-"
                "out rows must not be trained on; remove one"
            )
        seen[found] = name
    return hashes


def _check_tokenizer(folder: Path, expected: str | None) -> None:
    if expected is None or not (folder / storage.MANIFEST).is_file():
        return
    found = storage.read_manifest(folder).get("inputs", {}).get("tokenizer")
    if found is not None and found != expected:
        raise BadDataError(
            f"{folder}: packed with another tokenizer ({found[:12]}) than the run's "
            f"({expected[:12]}); run scripts/03_tokenize_and_pack.py again"
        )


def _open_array(path: Path, min_length: int) -> AnyArray:
    """Map one file, and refuse what is not a plain table of ids with rows long enough."""
    if path.stat().st_size == 0:
        raise BadDataError(f"{path}: an empty file; fetch or pack it again")
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PK\x03\x04":
        raise BadDataError(f"{path}: an .npz archive; save each array with numpy.save instead")
    if magic != b"\x93NUMPY":
        raise BadDataError(
            f"{path}: not an .npy file (it begins with {magic!r}); write it with numpy.save"
        )
    try:
        array: AnyArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, struct.error, tokenize.TokenError) as error:
        if "Python objects" in str(error) or "Object arrays" in str(error):
            raise BadDataError(
                f"{path}: holds pickled objects, which are never loaded; save ids as int64"
            ) from None
        reason = " ".join(str(error).split())
        raise BadDataError(f"{path}: cut off or damaged ({reason}); pack it again") from None
    return _checked_shape(path, array, min_length)


def _checked_shape(path: Path, array: AnyArray, min_length: int) -> AnyArray:
    if array.dtype.str not in {np.dtype(name).newbyteorder("<").str for name in ID_TYPES}:
        raise BadDataError(
            f"{path}: dtype {array.dtype} ({array.dtype.str}), expected little-endian "
            f"{', '.join(ID_TYPES)}; convert it, checking that no id changes"
        )
    if array.ndim != 2:
        raise BadDataError(
            f"{path}: shape {array.shape}, expected (rows, tokens); reshape to two dimensions"
        )
    if array.size == 0:
        raise BadDataError(f"{path}: shape {array.shape} holds no token; remove the file")
    if not array.flags.c_contiguous:
        raise BadDataError(
            f"{path}: stored in Fortran order, expected C order; save numpy.ascontiguousarray of it"
        )
    if array.shape[1] < min_length:
        raise BadDataError(
            f"{path}: rows of {array.shape[1]} tokens, but the longest context is {min_length}; "
            f"pack rows of at least {min_length}, or shorten the contexts"
        )
    return array


def _common_length(arrays: dict[Path, AnyArray]) -> int:
    first = next(iter(arrays))
    for path, array in arrays.items():
        if array.shape[1] != arrays[first].shape[1]:
            raise BadDataError(
                f"{path}: rows of {array.shape[1]} tokens, but {first.name} has rows of "
                f"{arrays[first].shape[1]}; pack all files alike"
            )
    return int(arrays[first].shape[1])


def _check_ids(name: str, array: AnyArray, vocab_size: int, row_length: int) -> None:
    """Look at every id, a few million at a time."""
    flat = array.reshape(-1)
    for start in range(0, len(flat), _CHUNK_TOKENS):
        chunk = np.asarray(flat[start : start + _CHUNK_TOKENS])
        wrong = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        if len(wrong):
            index = start + int(wrong[0])
            place = f"({index // row_length}, {index % row_length})"
            raise BadDataError(
                f"{name}: id {chunk[wrong[0]]} at {place} is outside the vocabulary of "
                f"{vocab_size} (0 to {vocab_size - 1}); pack the text with this run's tokenizer"
            )
    if len(flat) > 1 and bool((flat[: 2**16] == flat[0]).all()):
        log.warning("%s: every token looked at is %d; is this the right file?", name, flat[0])


def _split(
    folder: Path, parts: dict[str, list[TokenIds]], row_length: int
) -> tuple[TokenShards, TokenShards]:
    train, held_out = parts.get("train", []), parts.get("validation", [])
    num_train = sum(part.size for part in train) // row_length
    num_held_out = sum(part.size for part in held_out) // row_length
    if num_held_out and num_train:
        return TokenShards(train, row_length), TokenShards(held_out, row_length)
    if num_train < 2:
        tokens = sum(part.size for part in [*train, *held_out])
        raise BadDataError(
            f"{folder}: {tokens} tokens make {num_train} rows of {row_length} to train on; at "
            "least one row must train and one be held out; give more text or shorter rows"
        )
    last = max(1, round(num_train * HELD_OUT_FRACTION))
    log.warning("%s: no validation files; the last %d rows are held out", folder, last)
    return (
        TokenShards(train, row_length, range(num_train - last)),
        TokenShards(train, row_length, range(num_train - last, num_train)),
    )


def _check_repeats(folder: Path, train: TokenShards, held_out: TokenShards, *, drawn: bool) -> None:
    """Refuse held-out rows that are trained on; warn of rows that come again and again.

    ``drawn``: nobody named the held-out rows, so that they repeat what repeats itself.
    """
    num_repeated, shared = repeated_rows(train, held_out)
    if num_repeated > REPEATED_SHARE * train.num_rows:
        log.warning(
            "%s: %d of %d rows to train on repeat another; is this the right data?",
            folder,
            num_repeated,
            train.num_rows,
        )
    if not shared:
        return
    row, other = shared[0]
    found = (
        f"{folder}: {len(shared)} of {held_out.num_rows} held-out rows are trained on too, the "
        f"first is row {row}, row {other} of those to train on"
    )
    if len(shared) > SHARED_SHARE * held_out.num_rows and not drawn:
        raise BadDataError(f"{found}; hold out rows that are not trained on")
    log.warning("%s; what is measured on them says little", found)


def write_rows(
    folder: Path, split: str, parts: Sequence[Path], config: PackConfig, *, num_workers: int
) -> int:
    """Cut the ids of ``parts``, read one after the other, into rows; return how many.

    They go to ``<split>-00000.npy``, ... of bounded size; tokens that do not fill a row are left
    out. What is written does not depend on ``num_workers``.

    Errors:
        UsageError: an id does not fit into the configured type.
    """
    sizes = [int(np.load(path, mmap_mode="r", allow_pickle=False).size) for path in parts]
    num_rows = sum(sizes) // config.row_length
    step = max(1, SHARD_TOKENS // config.row_length)
    tasks = [
        _Cut(
            target=folder / f"{split}-{number:05d}.npy",
            parts=tuple(zip(parts, sizes, strict=True)),
            start=first * config.row_length,
            stop=min(first + step, num_rows) * config.row_length,
            config=config,
        )
        for number, first in enumerate(range(0, num_rows, step))
    ]
    for _ in workers.share(_write_cut, tasks, workers=num_workers):
        pass
    return num_rows


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Tokens ``start`` to ``stop`` of ``parts``, which are files and their sizes in tokens."""

    target: Path
    parts: tuple[tuple[Path, int], ...]
    start: int
    stop: int
    config: PackConfig


def _write_cut(cut: _Cut) -> None:
    ids = np.empty(cut.stop - cut.start, dtype=cut.config.dtype)
    largest = np.iinfo(cut.config.dtype).max
    begins = 0
    for path, size in cut.parts:
        first, last = max(cut.start - begins, 0), min(cut.stop - begins, size)
        if first < last:
            taken = np.load(path, mmap_mode="r", allow_pickle=False)[first:last]
            if taken.max() > largest:
                raise UsageError(
                    f"pack.dtype: id {taken.max()} does not fit into {cut.config.dtype}; set "
                    "pack.dtype to int64"
                )
            ids[begins + first - cut.start : begins + last - cut.start] = taken
        begins += size
    storage.write_array(cut.target, ids.reshape(-1, cut.config.row_length))
