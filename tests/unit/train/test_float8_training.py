"""Training in FP8, emulated, on the model of a few thousand weights of test_loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.train import test_loop
from tests.unit.train.test_loop import assert_equal, losses, signalling, tiny_model, weights

from sevenfold.base.errors import StoppedError
from sevenfold.model import float8
from sevenfold.model.float8 import convert_to_float8
from sevenfold.objective.next_token import NEXT_TOKEN, Objective
from sevenfold.train import loop, resuming
from sevenfold.train.config import Duration
from sevenfold.train.recovery import StopRequest

CONFIG = dataclasses.replace(test_loop.CONFIG, precision="fp8")
SHORT = dataclasses.replace(CONFIG, duration=Duration(steps=6))


def bench(folder: Path, **settings: Any) -> loop.Workbench:
    """The bench of test_loop, without dropout, its layers in emulated FP8."""
    model = convert_to_float8(tiny_model(), emulate=True)
    return test_loop.bench(folder, model=model, **{"config": CONFIG, **settings})


def history(made: loop.Workbench) -> torch.Tensor:
    return made.scorer.causal_model.get_buffer(f"model.{float8.HISTORY}").clone()


def one_step(made: loop.Workbench, step: int) -> None:
    loop.train_step(made, made.batches.batch(step), made.batches.length(step), StopRequest())


def test_it_learns_as_bf16_does(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, validate_every=24)
    in_bf16 = test_loop.bench(
        tmp_path / "bf16", config=dataclasses.replace(config, precision="bf16"), model=tiny_model()
    )
    found = []
    for made in (bench(tmp_path / "fp8", config=config), in_bf16):
        loop.fit(made)
        rows = [row for row in made.metrics.read() if "event" not in row]
        found.append([row["loss"] for row in rows] + [rows[-1]["validation_loss"]])
    assert found[0][-2] < found[0][0] - 0.1
    assert np.allclose(found[0], found[1], rtol=1e-2, atol=0)
    assert found[0] != found[1]


@pytest.mark.fault("C13")
def test_stopped_and_resumed_it_is_bit_identical(tmp_path: Path) -> None:
    unbroken = bench(tmp_path / "unbroken")
    loop.fit(unbroken)
    for stop_at in (7, 12):
        made = bench(tmp_path / "broken")
        made.objective = signalling(made, stop_at)
        with pytest.raises(StoppedError):
            loop.fit(made)
    made = bench(tmp_path / "broken")
    assert float8.has_history(made.scorer)
    loop.fit(made)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))
    assert torch.equal(history(made), history(unbroken))


@pytest.mark.fault("C13", "E01")
@pytest.mark.parametrize("call", [2, 5, 8])
def test_out_of_memory_leaves_no_trace_in_the_scales(tmp_path: Path, call: int) -> None:
    """It comes while the first scales are sought, in the first step, and in a later one."""
    fake = torch.OutOfMemoryError("fake")
    made = bench(tmp_path / "oom", config=SHORT, objective=test_loop.failing({call}, fake))
    known = bench(tmp_path / "known", config=SHORT)
    loop.fit(made)
    assert made.memory.num_recoveries == 1
    known.decisions.micro_batches = list(made.decisions.micro_batches)
    loop.fit(known)
    assert losses(tmp_path / "oom") == losses(tmp_path / "known")
    assert_equal(weights(made), weights(known))
    assert torch.equal(history(made), history(known))


def test_the_history_grows_once_a_step_whatever_the_micro_batch(tmp_path: Path) -> None:
    found = []
    for micro_batch in (4, 1):
        config = dataclasses.replace(CONFIG, micro_batch=micro_batch)
        made = bench(tmp_path / str(micro_batch), config=config)
        one_step(made, 0)
        one_step(made, 1)
        found.append(history(made))
    assert bool((found[0] != 0).sum(1).eq(float8.ROUNDS + 2).any())
    # The first step sought its scales with one micro-batch, later ones see all rows.
    assert torch.allclose(found[0][:, -1], found[1][:, -1], rtol=0.1)


def test_a_skipped_step_leaves_the_history_alone(tmp_path: Path) -> None:
    made = bench(tmp_path)
    one_step(made, 0)
    before = history(made)

    def spoilt(scorer: Any, batch: Any) -> Any:
        summed = NEXT_TOKEN.total(scorer, batch)
        return dataclasses.replace(summed, total=summed.total * float("nan"))

    made.objective = Objective(weigh=NEXT_TOKEN.weigh, total=spoilt)
    one_step(made, 1)
    assert made.guard.num_skipped == 1
    assert torch.equal(history(made), before)
    made.objective = NEXT_TOKEN
    one_step(made, 2)
    assert made.guard.num_skipped == 1
    assert torch.equal(history(made)[:, -2], before[:, -1])


def test_validation_changes_no_scale(tmp_path: Path) -> None:
    made = bench(tmp_path)
    one_step(made, 0)
    before = history(made)
    first = loop.validation_loss(made)
    assert loop.validation_loss(made) == first
    assert torch.equal(history(made), before)


@pytest.mark.fault("C13")
def test_by_force_it_goes_on_in_another_precision_and_back(tmp_path: Path) -> None:
    def made_in(precision: str, **settings: Any) -> loop.Workbench:
        config = dataclasses.replace(SHORT, precision=precision, **settings)
        model = tiny_model()
        if precision == "fp8":
            convert_to_float8(model, emulate=True)
        return test_loop.bench(tmp_path, model=model, config=config, resume=False)

    loop.fit(made_in("bf16"))
    for precision, steps in (("fp8", 9), ("bf16", 12)):
        made = made_in(precision, duration=Duration(steps=steps))
        made.identity = {"config": {"precision": precision}}
        assert resuming.resume(made, force="to see")
        assert float8.has_history(made.scorer) == (precision == "bf16")
        loop.fit(made)
        assert made.guard.num_skipped == 0
        assert float8.has_history(made.scorer)
    rows = [row for row in made.metrics.read() if "event" not in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
