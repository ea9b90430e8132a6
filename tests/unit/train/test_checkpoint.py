"""Checkpoints: whole or absent, checked byte for byte, never a silent fresh start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sevenfold.base import faults, storage
from sevenfold.base.errors import CheckpointError
from sevenfold.train import checkpoint, tensor_files
from sevenfold.train.checkpoint import (
    Checkpoints,
    Snapshot,
    _MainMemory,
    random_state,
    restore_random_state,
)


def snapshot(step: int) -> Snapshot:
    shared = torch.arange(6.0)
    return Snapshot(
        step=step,
        model={"a": shared, "b": shared, "view": torch.arange(12.0).view(3, 4).t()},
        optimizer={"a::step": torch.tensor(float(step))},
        random=random_state(),
        state={"step": step},
    )


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(snapshot(step))
    checkpoints.finish()
    return checkpoints


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    loaded = saved(tmp_path, 3).load_latest()
    assert loaded is not None
    assert loaded.step == 3
    assert loaded.state == {"step": 3}
    assert torch.equal(loaded.model["b"], torch.arange(6.0))
    assert torch.equal(loaded.model["view"], torch.arange(12.0).view(3, 4).t())
    assert float(loaded.optimizer["a::step"]) == 3.0


@pytest.mark.fault("B01", "B02", "B03")
@pytest.mark.parametrize("damage", ["none", "flip", "remove", "lose", "foreign"])
def test_what_is_large_is_cut_into_files_each_of_which_counts(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = saved(tmp_path, 1)  # as an earlier version wrote it
    monkeypatch.setattr(tensor_files, "LARGEST_FILE_BYTES", 50)
    checkpoints = saved(tmp_path, 2)
    folder = checkpoints.path(2)
    assert sorted(path.name for path in folder.glob("model*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (folder / "optimizer.safetensors").is_file()
    last = folder / "model-00002-of-00002.safetensors"
    if damage == "flip":
        data = bytearray(last.read_bytes())
        data[-1] ^= 1
        last.write_bytes(data)
    elif damage == "remove":
        last.unlink()
    elif damage == "lose":  # and with a manifest that does not know it
        last.unlink()
        storage.write_manifest(folder, kind="checkpoint", step=2)
    elif damage == "foreign":  # what the manifest does not list is not read
        save_file({"c": torch.ones(1)}, folder / "model-00003-of-00002.safetensors")
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == (2 if damage in ("none", "foreign") else 1)
    if damage == "lose":
        assert "of model the manifest lists ['model-00001-of-00002.safetensors']" in caplog.text
        assert "put the folder back as it was, or remove it" in caplog.text
    elif damage in ("flip", "remove"):
        assert "model-00002-of-00002.safetensors: " in caplog.text
    assert loaded.model.keys() == {"a", "b", "view"}
    earlier = whole.load(1)
    assert checkpoint.digest(loaded.model) == checkpoint.digest(earlier.model)


@pytest.mark.fault("B11")
def test_only_the_newest_are_kept_whatever_their_times(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    for step, moment in ((1, 9e8), (2, 1e9), (3, 1e8)):
        os.utime(checkpoints.path(step), (moment, moment))
    checkpoints.keep = 2
    checkpoints.save(snapshot(4))
    checkpoints.finish()
    assert checkpoints.steps() == [3, 4]


def test_where_no_memory_can_be_page_locked_it_is_said_once_and_ordinary_memory_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit for locked memory, or too little of it; page-locking fails alike without a GPU."""
    empty = torch.empty

    def refusing(*size: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("cannot lock")
        return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", refusing)
    memory = _MainMemory()
    memory.reserve({"a": (torch.Size([2, 3]), torch.bfloat16), "b": (torch.Size([]), torch.int8)})
    assert {name: (t.shape, t.dtype) for name, t in memory._buffers.items()} == {
        "a": (torch.Size([2, 3]), torch.bfloat16),
        "b": (torch.Size([]), torch.int8),
    }
    assert caplog.text.count("no page-locked memory (cannot lock)") == 1


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).load_latest() is None


@pytest.mark.fault("B01", "B02", "B03", "B05")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    path = checkpoints.path(2) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    assert name in caplog.text
    assert (tmp_path / "damaged-step-00000002").is_dir()
    checkpoints.save(snapshot(2))
    checkpoints.finish()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.fault("B04")
def test_all_damaged_is_an_error_that_lists_each(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (checkpoints.path(step) / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged .*00000002.*00000001"):
        checkpoints.load_latest()


@pytest.mark.fault("B04")
def test_damaged_checkpoints_set_aside_before_are_no_fresh_start(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (checkpoints.path(1) / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"every checkpoint is damaged .*--no-resume"):
            checkpoints.load_latest()


@pytest.mark.fault("B06")
def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / ".step-00000002.partial-77").mkdir()
    assert checkpoints.load_latest() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_random_state_comes_back() -> None:
    state = random_state()
    first = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.fault("A01")
def test_killed_at_any_file_operation_one_checkpoint_is_whole(tmp_path: Path) -> None:
    """Fork a child per crash point; each is killed somewhere in saving steps 1 and 2."""
    survived = 0
    for point in range(1, 200):
        folder = tmp_path / str(point)
        child = os.fork()
        if child == 0:
            os.environ["SEVENFOLD_FAULTS"] = f"kill@fs:{point}"
            faults._operations_done = 0
            saved(folder, 1, 2, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        checkpoints = Checkpoints(folder, keep=1)
        loaded = checkpoints.load_latest()
        if os.WIFEXITED(status):
            assert loaded is not None
            assert loaded.step == 2
            assert point > 20
            return
        survived += loaded is not None
        assert loaded is None or torch.equal(loaded.model["a"], torch.arange(6.0))
    pytest.fail(f"the process never ran to its end ({survived} survived)")
