"""Weights stored in 16 bits, trained in 32: no jump in 8 when they first move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sevenfold.model import float8
from sevenfold.model.float8_linear import E4M3, cast
from sevenfold.model.rounded_weights import spread

STORED = [torch.bfloat16, torch.float16]


def stored(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(64, 256).to(dtype).float()
    weight[0, :8] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-9, 96.0, -(2.0**-14), 3.0])
    return weight


@pytest.mark.parametrize("dtype", STORED)
def test_stored_again_the_weights_are_what_they_were(dtype: torch.dtype) -> None:
    before = stored(dtype)
    weight = before.clone()
    assert spread([weight], 7) == int((before != 0).sum())
    assert torch.equal(weight.to(dtype).float(), before)
    assert (weight != before).float().mean() > 0.99
    assert torch.equal(weight == 0, before == 0)
    # On both sides alike.
    assert abs(float((weight.abs() > before.abs()).float().mean()) - 0.5) < 0.02


def test_a_seed_says_what_is_drawn() -> None:
    first, again, other = (stored(torch.bfloat16) for _ in range(3))
    spread([first], 7)
    spread([again], 7)
    spread([other], 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_all_of_their_bits_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 32).to(dtype)
    before = weight.clone()
    assert spread([weight], 7) == 0
    assert torch.equal(weight, before)


def test_a_weight_between_two_fp8_numbers_no_longer_jumps() -> None:
    """One in 16 lies there, and half of those were rounded down."""
    weight = stored(torch.bfloat16)
    nudged = torch.nextafter(weight, torch.tensor(100.0))
    one = torch.ones(())

    def cast_back(values: Tensor) -> Tensor:
        return cast(values, one, E4M3).float()

    jumped = (cast_back(nudged) != cast_back(weight)).float().mean()
    assert 0.02 < float(jumped) < 0.05
    spread([weight], 7)
    nudged = torch.nextafter(weight, torch.tensor(100.0))
    assert float((cast_back(nudged) != cast_back(weight)).float().mean()) < 1e-3


def test_a_layer_in_fp8_changes_as_little_as_its_weights() -> None:
    """The first step of a model that was stored in bf16: every weight moves by its sign."""
    changes = []
    for spread_first in (False, True):
        torch.manual_seed(0)
        layer = nn.ModuleDict({"linear": nn.Linear(256, 64, bias=False)})
        weight = layer["linear"].weight
        weight.data = weight.data.bfloat16().float()
        values, direction = torch.randn(32, 256), torch.randn(64, 256).sign()
        if spread_first:
            spread([weight.data], 7)
        float8.convert_to_float8(layer, emulate=True)
        scalings = layer.get_submodule(float8.NAME)
        with torch.no_grad():
            scalings.refresh()  # type: ignore[operator]
            before = layer["linear"](values)
            layer["linear"].weight.add_(1e-7 * direction)
            scalings.refresh()  # type: ignore[operator]
            changes.append(float((layer["linear"](values) - before).norm()))
    assert changes[1] < changes[0] / 20
