"""Checkpoints of other forms than ours, and threads that die."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train.test_checkpoint import saved
from tests.unit.train.test_loop import assert_equal, bench, losses, weights

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, CheckpointError
from sevenfold.train import loop
from sevenfold.workflow.damage import PARTS


class Payload:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path, path: Path) -> None:
    torch.save({"model": Payload(marker)}, path)


@pytest.mark.fault("B16", "L01")
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_hostile_pickle_in_place_of_any_file_is_refused_unread(
    tmp_path: Path, name: str, form: str
) -> None:
    """Its checksum is right: whoever can write the folder can write the manifest."""
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    folder, marker = checkpoints.path(2), tmp_path / "marker"
    pickled(marker, folder / name)
    if form == "plain":
        # The pickle alone, out of torch's archive.
        import zipfile

        with zipfile.ZipFile(folder / name) as archive:
            [inner] = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
            data = archive.read(inner)
        (folder / name).write_bytes(data)
    if name != storage.MANIFEST:
        storage.write_manifest(folder, kind="checkpoint", step=2)
        storage.verify_folder(folder)
    with pytest.raises(CheckpointError):
        checkpoints.load(2)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    assert not marker.exists()


def test_the_pickle_is_one_that_works(tmp_path: Path) -> None:
    pickled(tmp_path / "marker", tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.fault("B15")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [(True, False), (False, True)])
def test_a_checkpoint_does_not_show_whether_layers_were_compiled(
    tmp_path: Path, compiled: tuple[bool, bool]
) -> None:
    unbroken = bench(tmp_path / "unbroken")
    loop.fit(unbroken)
    for last, is_compiled in zip((12, 24), compiled, strict=True):
        made = bench(tmp_path / "mixed", resume=False)
        if is_compiled:
            for layer in made.scorer.causal_model.model.layers:
                layer.compile(backend="eager", dynamic=False)
        loop.resuming.resume(made)
        assert made.step == last - 12
        made.batches.num_steps = 24
        if last == 12:
            stop_after(made, 12)
            continue
        loop.fit(made)
    names = set(made.checkpoints.load(24).model)
    assert not any("_orig_mod" in name for name in names)
    assert names == set(unbroken.checkpoints.load(24).model)
    assert losses(tmp_path / "mixed") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))


def stop_after(made: loop.Workbench, step: int) -> None:
    import signal

    from sevenfold.base.errors import StoppedError

    weigh = made.objective.weigh

    def stopping(batch: Any) -> float:
        if made.scorer.training and made.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return weigh(batch)

    made.objective = type(made.objective)(weigh=stopping, total=made.objective.total)
    with pytest.raises(StoppedError):
        loop.fit(made)


@pytest.mark.fault("A11")
def test_a_batch_that_cannot_be_made_ends_training_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ahead dies two steps early; the steps before it are still done."""
    made = bench(tmp_path)
    original = made.batches.source.batch

    def batch(indices: Any, length: int) -> Any:
        if made.step >= 3:
            raise BadDataError("rows.npy: the file has changed")
        return original(indices, length)

    monkeypatch.setattr(made.batches.source, "batch", batch)
    with pytest.raises(BadDataError, match=r"rows\.npy: the file has changed"):
        loop.fit(made)
    assert 3 <= made.step <= 6
