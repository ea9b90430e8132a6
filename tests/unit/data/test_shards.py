from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevenfold.base import storage
from sevenfold.base.config import build
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data import shards
from sevenfold.data.batches import Batches, PackedText
from sevenfold.data.shards import PackConfig, PackedShards, open_shards, write_rows
from sevenfold.train.config import ContextPhase

LENGTH, VOCAB = 8, 100


def table(rows: int = 4, length: int = LENGTH, dtype: str = "int64", start: int = 0) -> Any:
    return ((start + np.arange(rows * length)) % VOCAB).reshape(rows, length).astype(dtype)


def open_(folder: Path, **facts: Any) -> PackedShards:
    return open_shards(folder, **{"vocab_size": VOCAB, "min_length": LENGTH} | facts)


def write(folder: Path, split: str, parts: list[list[int]], config: PackConfig) -> int:
    """Pack ids that lie in several files beside ``folder``."""
    paths = [folder.parent / f"ids-{number}.npy" for number in range(len(parts))]
    for path, ids in zip(paths, parts, strict=True):
        np.save(path, np.array(ids, np.uint32))
    return write_rows(folder, split, paths, config, num_workers=1)


def save(folder: Path, array: Any, name: str = "train-00000.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


def test_packing_and_reading_gives_the_documents_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3 * LENGTH)
    documents = [[0, *range(2, 2 + n % 17), 1] for n in range(30)]
    stream = [token for document in documents for token in document]
    for dtype in ("int64", "uint16"):
        folder = tmp_path / dtype
        folder.mkdir()
        config = PackConfig(row_length=LENGTH, dtype=dtype, strategy="concatenate")  # type: ignore[arg-type]
        num_rows = write(folder, "train", [stream[:50], stream[50:51], [], stream[51:]], config)
        write(folder, "validation", [[0, *range(60, 80), 1]], config)
        assert num_rows == len(stream) // LENGTH
        assert len(list(folder.glob("train-*.npy"))) == -(-num_rows // 3)
        found = open_(folder)
        rows = found.train.rows(np.arange(found.train.num_rows))
        assert rows.dtype == np.int64
        assert rows.reshape(-1).tolist() == stream[: num_rows * LENGTH]
        assert found.train.rows(np.array([5, 1])).tolist() == rows[[5, 1]].tolist()
        assert found.train.num_tokens == num_rows * LENGTH
        assert np.load(folder / "train-00000.npy").dtype == dtype


@pytest.mark.fault("G03")
def test_an_id_too_big_for_the_type_is_refused(tmp_path: Path) -> None:
    config = PackConfig(row_length=2, dtype="uint16", strategy="concatenate")
    with pytest.raises(UsageError, match=r"id 65536 does not fit into uint16; set pack\.dtype to"):
        write(tmp_path, "train", [[1, 65_536]], config)
    with pytest.raises(UsageError, match=r"row_length"):
        build(PackConfig, {"row_length": 1, "dtype": "int64"})


@pytest.mark.fault("G03")
@pytest.mark.parametrize("dtype", shards.ID_TYPES)
def test_every_integer_type_is_read(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, table(dtype=dtype))
    save(tmp_path, table(2, dtype=dtype, start=7), "validation-00000.npy")
    found = open_(tmp_path)
    assert (found.train.num_rows, found.validation.num_rows) == (4, 2)
    assert found.validation.rows(np.array([1])).tolist() == table(2, start=7)[1:].tolist()


def test_without_validation_files_the_last_rows_are_held_out(tmp_path: Path) -> None:
    save(tmp_path, table(150), "a.npy")
    save(tmp_path, table(150, start=3), "b.npy")
    found = open_(tmp_path)
    assert (found.train.num_rows, found.validation.num_rows) == (297, 3)
    assert found.validation.rows(np.arange(3)).tolist() == table(150, start=3)[-3:].tolist()


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    save(tmp_path, table())
    before = open_(tmp_path).fingerprint
    assert open_(tmp_path).fingerprint == before
    save(tmp_path, table(start=1))
    assert open_(tmp_path).fingerprint != before


def test_a_folder_of_our_own_has_the_fingerprint_of_its_manifest(tmp_path: Path) -> None:
    """By it the record of a stage and the lineage of a run name the rows that were trained on."""
    save(tmp_path, table())
    manifest = storage.write_manifest(tmp_path, kind="packed")
    assert open_(tmp_path).fingerprint == manifest["fingerprint"]
    assert open_(tmp_path).pad_id is None
    storage.write_manifest(tmp_path, kind="packed", pad_id=2)
    assert open_(tmp_path).pad_id == 2


def refused(folder: Path, message: str, **facts: Any) -> None:
    with pytest.raises(BadDataError, match=message):
        open_(folder, **facts)


BAD_ARRAYS: dict[str, tuple[Any, str]] = {
    "float": (table(dtype="float32"), r"dtype float32 .*expected little-endian int64, int32,"),
    "bool": (table(dtype="bool"), r"dtype bool .*convert it, checking that no id changes"),
    "int8": (table(dtype="int8"), r"dtype int8"),
    "big_endian": (table(dtype=">i8"), r"dtype >i8 \(>i8\), expected little-endian"),
    "structured": (np.zeros((4, 8), dtype=[("id", "<i8")]), r"dtype .*expected little-endian"),
    "text": (np.full((4, 8), "a"), r"dtype <U1"),
    "one_dimension": (table().reshape(-1), r"shape \(32,\), expected \(rows, tokens\); reshape"),
    "three_dimensions": (table().reshape(2, 2, 8), r"shape \(2, 2, 8\)"),
    "no_rows": (table(0), r"shape \(0, 8\) holds no token; remove the file"),
    "fortran": (np.asfortranarray(table()), r"Fortran order, .*save numpy\.ascontiguousarray"),
    "short_rows": (table(length=4), r"rows of 4 tokens, but the longest context is 8; pack rows"),
}


@pytest.mark.fault("G01", "G03", "G04")
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_other_arrays_are_refused_by_name(tmp_path: Path, name: str) -> None:
    array, message = BAD_ARRAYS[name]
    save(tmp_path, array)
    refused(tmp_path, r"train-00000\.npy: .*" + message)


@pytest.mark.fault("G02")
@pytest.mark.parametrize("value", [VOCAB, -1, 2**40])
def test_an_id_without_a_token_is_named_with_its_place(
    tmp_path: Path, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_CHUNK_TOKENS", 10)
    array = table()
    array[2, 5] = value
    save(tmp_path, array)
    refused(
        tmp_path,
        rf"train-00000\.npy: id {value} at \(2, 5\) is outside the vocabulary of 100 \(0 to 99\); "
        r"pack the text with this run's tokenizer",
    )


BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"an empty file; fetch or pack it again"),
    "raw": (bytes(range(64)), r"not an \.npy file .*write it with numpy\.save"),
    "header": (b"\x93NUMPY\x01\x00\x10\x00garbage garbage!" + bytes(64), r"cut off or damaged"),
    "short_header": (b"\x93NUMPY\x01\x00", r"cut off or damaged .*pack it again"),
}


@pytest.mark.fault("G01", "G05")
@pytest.mark.parametrize("name", BAD_BYTES)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data, message = BAD_BYTES[name]
    (tmp_path / "a.npy").write_bytes(data)
    refused(tmp_path, r"a\.npy: .*" + message)


@pytest.mark.fault("G05")
def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, table())
    for size in (path.stat().st_size - 1, 200, 130):
        path.write_bytes(path.read_bytes()[:size])
        refused(tmp_path, r"train-00000\.npy: cut off or damaged .*pack it again")


@pytest.mark.fault("G05")
def test_an_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", table())
    with pytest.raises(UsageError, match=r"no \.npy file there \(a\.npz is not read\); give"):
        open_(tmp_path)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(tmp_path, r"a\.npy: an \.npz archive; save each array with numpy\.save")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.fault("G06", "L01")
def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    array = np.empty((2, 8), dtype=object)
    array[:] = Payload(marker)
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "a.npy", array, allow_pickle=True)
    refused(folder, r"a\.npy: holds pickled objects, which are never loaded; save ids as int64")
    # What follows the header is the bare pickle.
    whole = (folder / "a.npy").read_bytes()
    (folder / "a.npy").write_bytes(whole[whole.index(b"\n") + 1 :])
    refused(folder, r"a\.npy: not an \.npy file")
    assert not marker.exists()


@pytest.mark.fault("G07")
def test_a_folder_must_be_there_and_hold_something(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder; run scripts/03_tokenize_and_pack\.py"):
        open_(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"no \.npy file there; give packed \.npy files"):
        open_(tmp_path)


@pytest.mark.fault("G07", "G10", "L05")
def test_files_of_a_folder_must_fit_together(tmp_path: Path) -> None:
    save(tmp_path, table(), "a.npy")
    save(tmp_path, table(length=16), "b.npy")
    refused(tmp_path, r"b\.npy: rows of 16 tokens, but a\.npy has rows of 8; pack all files alike")
    save(tmp_path, table(), "b.npy")
    refused(tmp_path, r"b\.npy: the same bytes as a\.npy; a shard counts once, .*remove one")
    (tmp_path / "b.npy").rename(tmp_path / "validation-0.npy")
    refused(tmp_path, r"validation-0\.npy: the same bytes as a\.npy; .*held-out rows must not")
    (tmp_path / "validation-0.npy").unlink()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.npy"
    np.save(outside, table(start=5))
    (tmp_path / "c.npy").symlink_to(outside)
    refused(tmp_path, r"c\.npy: a link out of .*; copy the file into the folder")


@pytest.mark.fault("G01")
def test_one_row_alone_cannot_train_and_be_held_out(tmp_path: Path) -> None:
    save(tmp_path, table(1))
    refused(tmp_path, r"8 tokens make 1 rows of 8 to train on; at least one row must train")


@pytest.mark.fault("G10")
def test_rows_of_one_token_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, np.full((4, 8), 3))
    open_(tmp_path)
    assert "every token looked at is 3" in caplog.text


@pytest.mark.fault("G10")
def test_repeated_rows_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, np.tile(table(), (100, 1)), "a.npy")
    open_(tmp_path)
    assert "392 of 396 rows to train on repeat another; is this the right data?" in caplog.text
    assert "4 of 4 held-out rows are trained on too" in caplog.text
    caplog.clear()
    save(tmp_path, np.concatenate([table(), table(40, start=3)]), "a.npy")
    save(tmp_path, table(2, start=5), "validation.npy")
    open_(tmp_path)
    assert caplog.text == ""


@pytest.mark.fault("G10")
def test_held_out_rows_that_are_trained_on_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the files differ: in their type, or in the rows around them."""
    save(tmp_path, table())
    save(
        tmp_path, np.concatenate([table(3, start=5), table(dtype="uint16")[2:3]]), "validation.npy"
    )
    refused(
        tmp_path,
        r"1 of 4 held-out rows are trained on too, the first is row 3, row 2 of those to train on; "
        r"hold out rows that are not trained on",
    )
    # One in many is bad luck.
    many = np.random.default_rng(0).integers(0, VOCAB, (200, LENGTH))
    save(tmp_path, np.concatenate([many, table()[:1]]), "validation.npy")
    open_(tmp_path)
    assert "1 of 201 held-out rows are trained on too" in caplog.text


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(200)


CHANGES: dict[str, Any] = {
    "cut": truncate,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "other": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.fault("G09", "A11")
@pytest.mark.parametrize("kind", ["npy", "data set"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_training_ends_it_with_the_files_name(
    tmp_path: Path, kind: str, change: str
) -> None:
    """The thread that makes batches ahead passes the error on; nothing hangs or crashes."""
    if kind == "npy":
        changed = save(tmp_path, table(40))
    else:
        saved(tmp_path, table(40).tolist())
        (changed,) = tmp_path.glob("*.arrow")
    batches = Batches(
        PackedText(open_(tmp_path).train, bos_id=None),
        tokens_per_batch=2 * LENGTH,
        contexts=(ContextPhase(length=LENGTH, until=1.0),),
        num_steps=50,
        seed=1,
    )
    made = batches.prefetch(0)
    next(made)
    time.sleep(0.01)  # past the resolution of the file's time
    CHANGES[change](changed)
    with pytest.raises(BadDataError, match=rf"{changed.name}: changed while it was being read; le"):
        list(made)


@pytest.mark.fault("G09")
@pytest.mark.parametrize("kind", ["npy", "data set"])
def test_a_file_that_changes_after_it_was_hashed_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of a large corpus the first file is hashed minutes before the last."""
    if kind == "npy":
        changed = save(tmp_path, table(40))
    else:
        saved(tmp_path, table(40).tolist())
        (changed,) = tmp_path.glob("*.arrow")
    hash_files = storage.sha256_files

    def hash_and_change(folder: Path, files: Any) -> dict[str, str]:
        hashes = hash_files(folder, files)
        time.sleep(0.01)
        with changed.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\1")
        return hashes

    monkeypatch.setattr(storage, "sha256_files", hash_and_change)
    with pytest.raises(BadDataError, match=rf"{changed.name}: changed while it was being read; le"):
        open_(tmp_path).train.rows(np.arange(2))


def test_files_without_a_manifest_are_hashed_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of packed rows from elsewhere there may be hundreds of GB, at every start."""
    together = threading.Barrier(2)
    hashed = storage.sha256_file

    def sha256_file(path: Path) -> str:
        together.wait(timeout=20)
        return hashed(path)

    monkeypatch.setattr(storage, "_readers", lambda: ThreadPoolExecutor(2))
    monkeypatch.setattr(storage, "sha256_file", sha256_file)
    save(tmp_path, table(150), "a.npy")
    save(tmp_path, table(150, start=3), "b.npy")
    found = open_(tmp_path).files
    assert found == {name: hashed(tmp_path / name) for name in ("a.npy", "b.npy")}


def packed_folder(target: Path) -> None:
    with storage.new_folder(target, kind="packed", inputs={"tokenizer": "a" * 64}) as folder:
        storage.write_array(folder / "train-00000.npy", table())
        storage.write_array(folder / "validation-00000.npy", table(2, start=3))


@pytest.mark.fault("G08", "C12")
def test_our_own_folder_is_checked_against_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    packed_folder(folder)
    assert open_(folder, tokenizer_fingerprint="a" * 64).train.num_rows == 4
    refused(
        folder,
        r"packed with another tokenizer \(aaaaaaaaaaaa\) than the run's \(bbbbbbbbbbbb\); run "
        r"scripts/03_tokenize_and_pack\.py again",
        tokenizer_fingerprint="b" * 64,
    )
    np.save(folder / "extra.npy", table(start=9))
    refused(folder, r"extra\.npy: not in manifest\.json; remove it, or pack again")
    (folder / "extra.npy").unlink()
    with (folder / "train-00000.npy").open("r+b") as file:
        file.seek(200)
        file.write(b"\x07")
    refused(folder, r"train-00000\.npy: its SHA-256 is not the manifest's")


def saved(folder: Path, rows: list[list[Any]], column: str = "input_ids") -> Any:
    import datasets

    data = datasets.Dataset.from_dict({column: rows})
    data.save_to_disk(str(folder))
    return data


def test_input_ids_of_one_length_stay_rows(tmp_path: Path) -> None:
    saved(tmp_path, table(20).tolist())
    found = open_(tmp_path, min_length=4)
    assert found.train.row_length == LENGTH
    assert found.train.rows(np.array([3])).tolist() == table(20)[3:4].tolist()
    assert (found.train.num_rows, found.validation.num_rows) == (19, 1)


def test_input_ids_of_other_lengths_are_one_stream(tmp_path: Path) -> None:
    rows = [[0, *range(2, 2 + n), 1] for n in range(1, 30)]
    stream = [token for row in rows for token in row]
    saved(tmp_path, rows)
    found = open_(tmp_path)
    every = [
        *found.train.rows(np.arange(found.train.num_rows)),
        *found.validation.rows(np.array([0])),
    ]
    assert np.concatenate(every).tolist() == stream[: len(every) * LENGTH]


def test_a_shuffled_data_set_and_its_splits_are_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"input_ids": table(20).tolist()})
    parts = datasets.DatasetDict({"train": data.select([4, 2]), "validation": data.select([7])})
    parts.save_to_disk(str(tmp_path))
    found = open_(tmp_path)
    assert found.train.rows(np.arange(2)).tolist() == table(20)[[4, 2]].tolist()
    assert found.validation.rows(np.arange(1)).tolist() == table(20)[[7]].tolist()


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([[1, 2]], "ids", r"no column 'input_ids'; it has ids; rename it"),
        ([[1.5, 2.0]], "input_ids", r"input_ids: list<.*double>, expected lists of whole numbers"),
        ([[1, None]], "input_ids", r"input_ids: holds null, expected ids; remove those rows"),
        ([[1] * 8, [1] * 3 + [100] + [1] * 4], "input_ids", r"input_ids: id 100 at \(1, 3\)"),
        ([[1, 2]], "input_ids", r"2 tokens make 0 rows of 8"),
    ],
)
def test_other_data_sets_are_refused(
    tmp_path: Path, rows: list[list[Any]], column: str, message: str
) -> None:
    saved(tmp_path, rows, column)
    refused(tmp_path, message)
