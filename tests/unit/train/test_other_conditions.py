"""Layers compiled on one side of a checkpoint only, and a thread that dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.train.test_loop import assert_equal, bench, losses, signalling, weights

from sevenfold.base.errors import BadDataError, StoppedError
from sevenfold.train import loop


@pytest.mark.slow
@pytest.mark.fault("B15")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [(True, False), (False, True)])
def test_a_checkpoint_does_not_show_whether_layers_were_compiled(
    tmp_path: Path, compiled: tuple[bool, bool]
) -> None:
    unbroken = bench(tmp_path / "unbroken")
    loop.fit(unbroken)
    for stop_at, is_compiled in zip((12, None), compiled, strict=True):
        made = bench(tmp_path / "mixed", resume=False)
        if is_compiled:
            for layer in made.scorer.causal_model.model.layers:
                layer.compile(backend="eager", dynamic=False)
        loop.resuming.resume(made)
        if stop_at is None:
            assert made.step == 12
            loop.fit(made)
        else:
            made.objective = signalling(made, stop_at)
            with pytest.raises(StoppedError):
                loop.fit(made)
    names = set(made.checkpoints.load(24).model)
    assert not any("_orig_mod" in name for name in names)
    assert names == set(unbroken.checkpoints.load(24).model)
    assert losses(tmp_path / "mixed") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))


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
