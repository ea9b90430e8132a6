"""The optimizer's state as flat tensors, 8-bit moments included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.base.errors import CheckpointError
from sevenfold.train import optimizer
from sevenfold.train.checkpoint import (
    Checkpoints,
    Snapshot,
    random_state,
    restore_random_state,
)
from sevenfold.train.config import OptimizerConfig


def config(kind: Any) -> OptimizerConfig:
    return OptimizerConfig(
        kind=kind, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
    )


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.Linear(64, 32))
    return layers.to(torch.bfloat16)


def steps(net: torch.nn.Module, made: torch.optim.Optimizer, numbers: range) -> None:
    """Do some steps; the data depend on the step alone, the rounding on the random state."""
    for number in numbers:
        data = torch.randn(8, 256, generator=torch.Generator().manual_seed(number))
        optimizer.set_learning_rate(made, 1e-2 / (1 + number))
        net(data.to(torch.bfloat16)).float().square().sum().backward()
        made.step()
        made.zero_grad()


@pytest.mark.fault("C01")
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_from_a_checkpoint_the_same_weights_come_out(tmp_path: Path, kind: str) -> None:
    """The 8-bit one keeps codes and scales, and rounds its bf16 weights by chance."""
    net = model()
    made = optimizer.make_optimizer(net, config(kind))
    steps(net, made, range(3))
    names = optimizer.parameter_names(net, made)
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(
        Snapshot(
            step=3,
            model=dict(net.state_dict()),
            optimizer=optimizer.flatten_state(names, made),
            random=random_state(),
            state={},
        )
    )
    steps(net, made, range(3, 6))
    kept.finish()
    snapshot = kept.load_latest()
    assert snapshot is not None
    other = model()
    again = optimizer.make_optimizer(other, config(kind))
    other.load_state_dict(snapshot.model)
    optimizer.restore_state(names, again, snapshot.optimizer)
    restore_random_state(snapshot.random)
    steps(other, again, range(3, 6))
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert any("codes" in key for key in snapshot.optimizer) == (kind == "adamw_8bit")


def test_the_state_of_other_parameters_is_refused() -> None:
    net = model()
    made = optimizer.make_optimizer(net, config("adamw"))
    steps(net, made, range(1))
    names = optimizer.parameter_names(net, made)
    flat = optimizer.flatten_state(names, made)
    with pytest.raises(CheckpointError, match=r"other parameters \(2.weight\).*--no-resume"):
        optimizer.restore_state(names, made, {**flat, "2.weight::exp_avg": torch.zeros(2)})
    wrong = {**flat, "0.weight::exp_avg": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"exp_avg: shape \(3, 3\), expected \(64, 256\)"):
        optimizer.restore_state(names, made, wrong)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_training_goes_on_beside_weights_that_nothing_reaches(kind: str) -> None:
    """A layer of a model from outside may have no part in any answer: it has no state."""
    net = torch.nn.ModuleList(torch.nn.Linear(256, 32) for _ in range(2))
    made = optimizer.make_optimizer(net, config(kind))
    net[0](torch.ones(1, 256)).sum().backward()
    made.step()
    names = optimizer.parameter_names(net, made)
    flat = optimizer.flatten_state(names, made)
    assert {key.split("::")[0] for key in flat} == {"0.weight", "0.bias"}
    again = optimizer.make_optimizer(net, config(kind))
    optimizer.restore_state(names, again, flat)
    restored = optimizer.flatten_state(names, again)
    assert restored.keys() == flat.keys()
    assert all(torch.equal(value, flat[key]) for key, value in restored.items())


def test_the_norm_of_bf16_gradients_is_no_bf16_number() -> None:
    """Nor is that of fp32 ones another than PyTorch's."""
    made = [torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.bfloat16)) for _ in range(2)]
    for number, parameter in enumerate(made):
        drawn = torch.randn(64, 32, generator=torch.Generator().manual_seed(number))
        parameter.grad = drawn.bfloat16()
    exact = torch.cat([p.grad.double().flatten() for p in made]).norm()
    norm, number = optimizer.gradient_norm(made)
    assert norm.dtype == torch.float32
    assert number == pytest.approx(float(exact), rel=1e-6)
    wide = [torch.nn.Parameter(p.detach().float()) for p in made]
    for one, other in zip(wide, made, strict=True):
        one.grad = other.grad.float()
    theirs = torch.nn.utils.get_total_norm([p.grad for p in wide], foreach=True)
    assert torch.equal(optimizer.gradient_norm(wide)[0], theirs)
