"""What a step needs of a model is looked for once, and again when the model has changed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train import test_loop
from tests.unit.train.test_loop import CONFIG, tiny_model
from torch import nn

from sevenfold.model import accumulating, float8
from sevenfold.model.remembered import Remembered
from sevenfold.train import loop, replicas
from sevenfold.train.recovery import StopRequest


def in_fp8(model: Any) -> None:
    float8.convert_to_float8(model, emulate=True)


@pytest.mark.parametrize("convert", [in_fp8, accumulating.accumulate_in_products])
def test_a_step_does_not_walk_through_the_model(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 7B with adapters has 2,700 modules, and a GPU waits."""
    model = tiny_model()
    convert(model)
    made = test_loop.bench(tmp_path, config=CONFIG, model=model)

    def step() -> None:
        batch, length = made.batches.batch(made.step), made.batches.length(made.step)
        loop.train_step(made, batch, length, StopRequest())
        made.step += 1

    made.scorer.train()
    step()
    before = torch.cat([p.detach().flatten() for p in made.scorer.parameters()])
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("walked"))
        step()
    after = torch.cat([p.detach().flatten() for p in made.scorer.parameters()])
    assert not torch.equal(before, after)


def test_a_model_that_is_changed_after_it_was_looked_at_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    assert float8.has_history(model)  # it needs none
    in_fp8(model)
    assert not float8.has_history(model)

    model = tiny_model()
    accumulating.begin_step(model)
    assert all(p.grad is None for p in model.parameters())
    accumulating.accumulate_in_products(model)
    accumulating.begin_step(model)
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None

    model = tiny_model()
    assert replicas._shared(model) == []
    monkeypatch.setattr(replicas, "_share", lambda whole, mesh: whole[:1])
    replicas.share_out(model, None)
    assert len(replicas._shared(model)) == len(list(model.parameters()))


def test_what_is_remembered_keeps_no_model_alive() -> None:
    found = Remembered(lambda model: [*model.children()])
    model = nn.Sequential(nn.Linear(1, 1))
    assert found(model) is found(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
