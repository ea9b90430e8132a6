"""8-bit moments: the paper's quantization, torchao's numbers, and means that rounding keeps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sevenfold.train import adamw_8bit
from sevenfold.train import optimizer as optimizers
from sevenfold.train.adamw_8bit import BLOCK, AdamW8bit, state_bytes, state_shapes

SEED = torch.tensor(1, dtype=torch.int32)
BETAS, EPSILON, RATE, DECAY = (0.9, 0.95), 1e-8, 1e-2, 0.1


def gradient(step: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 10.0**-step


def trained(make: Any, weights: Tensor, num_steps: int = 5) -> Tensor:
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make([{"params": [parameter], "weight_decay": DECAY}])
    for step in range(num_steps):
        parameter.grad = gradient(step, weights.shape).to(weights.dtype)
        optimizer.step()
    return parameter.detach()


def ours(groups: Any) -> AdamW8bit:
    return AdamW8bit(groups, betas=BETAS, epsilon=EPSILON, lr=RATE)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


def test_it_computes_what_torchaos_does() -> None:
    """To rounding in fp32; torchao's is compiled, here it runs as written."""
    optim = pytest.importorskip("torchao.optim", reason="torchao's optimizer is the reference")
    with torch.compiler.set_stance("force_eager"):
        theirs = trained(
            lambda groups: optim.AdamW8bit(groups, lr=RATE, betas=BETAS, eps=EPSILON),
            drawn(32, 512),
        )
    torch.testing.assert_close(trained(ours, drawn(32, 512)), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "tolerance"), [((32, 512), 0.15), ((512,), 1e-6), ((32, 100), 1e-6), ((4, 256), 1e-6)]
)
def test_it_moves_weights_as_adamw_does(shape: tuple[int, ...], tolerance: float) -> None:
    """A quantized moment misses by per cents; what is no block of 256 is not quantized."""
    before = drawn(*shape)

    def exact(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON)

    moved, expected = trained(ours, before) - before, trained(exact, before) - before
    error = (moved - expected).norm() / expected.norm()
    assert error < tolerance
    assert (error > 1e-3) == adamw_8bit.in_8_bits(torch.Size(shape))


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_that_of_the_nearest_value(signed: bool) -> None:
    """In one step from nothing with betas of 0 a moment is the gradient, or its square."""
    parameter = torch.nn.Parameter(torch.zeros(16, BLOCK))
    optimizer = AdamW8bit([{"params": [parameter]}], betas=(0.0, 0.0), epsilon=EPSILON)
    parameter.grad = gradient(0, parameter.shape)
    optimizer.step()
    moment = "exp_avg" if signed else "exp_avg_sq"
    exact = parameter.grad if signed else parameter.grad.square()
    state = optimizer.state[parameter]
    table = torch.tensor(adamw_8bit.dynamic_table(signed=signed))
    scaled = exact / exact.abs().amax(-1, keepdim=True)
    nearest = (scaled.unsqueeze(-1) - table).abs().amin(-1)
    found = (scaled - table[state[f"{moment}_codes"].int()]).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-7)
    assert torch.equal(state[f"{moment}_scale"], exact.abs().amax(-1, keepdim=True))


def test_rounding_to_bf16_keeps_the_mean_and_what_bf16_can_hold() -> None:
    torch.manual_seed(0)
    between = torch.full((200_000,), 1 + 2**-7 * 0.3)
    rounded = adamw_8bit._round_stochastically(between, SEED)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(1 + 2**-7 * 0.3, abs=5e-5)
    held = drawn(1000).bfloat16()
    assert torch.equal(adamw_8bit._round_stochastically(-held.float(), SEED), -held)


def test_noise_takes_all_values_alike_and_differs_by_place_and_by_seed() -> None:
    """2^21 draws of 2^16 values: 32 each on average, with the spread that chance has."""
    seeds = torch.tensor([5, 6, 1 << 30], dtype=torch.int32)
    drawn = torch.stack([adamw_8bit._noise(torch.empty(2**13, BLOCK), seed) for seed in seeds])
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == 2**16 - 1
    for one in drawn:
        counts = torch.bincount(one.flatten(), minlength=2**16).double()
        assert float((counts - 32).square().mean() / 32) == pytest.approx(1.0, abs=0.03)
    centred = drawn.double().flatten(1) - (2**16 - 1) / 2
    pairs = [(centred[0], centred[1]), (centred[0], centred[2])]
    pairs += [(each[:-step], each[step:]) for each in centred for step in (1, 2, BLOCK)]
    for one, other in pairs:
        correlation = (one * other).mean() / centred.square().mean()
        assert abs(float(correlation)) < 4 * 2**-10.5


@pytest.mark.parametrize("moment", adamw_8bit.MOMENTS)
def test_one_look_and_one_comparison_find_what_a_search_finds(moment: str) -> None:
    """At every place where a code or a bin ends, at both its neighbours, and in between."""
    kind = adamw_8bit._codes_of(moment, torch.device("cpu"))
    middles = kind.next_from[:-1]
    bins = (torch.arange(adamw_8bit.NUM_BINS, dtype=torch.int32) + adamw_8bit.FIRST_BIN) << 16
    edges = bins.view(torch.float32)
    between = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) ** 8
    places = torch.cat([middles, edges, between, torch.tensor([0.0, 1e-12, 1e-40])])
    if moment == "exp_avg":
        places = torch.cat([places, -places])
    around = [places, *(places.nextafter(torch.tensor(float(to))) for to in (-9, 9))]
    for numbers in around:
        inside = numbers[(numbers.abs() <= 1) & ((moment == "exp_avg") | (numbers >= 0))]
        found = adamw_8bit._encode(inside, kind)
        assert torch.equal(found, torch.bucketize(inside, middles, out_int32=True, right=True))


def test_clipping_is_the_same_as_on_the_gradients_themselves() -> None:
    """To the last bit, where the factor is a power of two; and it holds for one step only."""
    quarter = {"clip_norm": 1.0, "norm": torch.tensor(4 - 1e-6)}
    made: dict[bool, list[Tensor]] = {}
    for as_a_factor in (True, False):
        parameter = torch.nn.Parameter(drawn(16, BLOCK).bfloat16())
        optimizer = ours([{"params": [parameter]}])
        torch.manual_seed(3)
        for clipped in (True, False):
            parameter.grad = gradient(0, parameter.shape).bfloat16()
            if clipped and as_a_factor:
                optimizers.clip_gradients(optimizer, **quarter)  # type: ignore[arg-type]
            elif clipped:
                parameter.grad /= 4
            optimizer.step()
        made[as_a_factor] = [parameter.detach(), *optimizer.state[parameter].values()]
    for one, other in zip(made[True], made[False], strict=True):
        assert torch.equal(one, other)


def test_updates_that_the_nearest_bf16_would_swallow_add_up() -> None:
    """A thousandth of a bf16 step each time; without chance the weight would stay 1 for ever."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(16, BLOCK, dtype=torch.bfloat16))
    optimizer = AdamW8bit([{"params": [parameter]}], betas=BETAS, epsilon=EPSILON, lr=2**-8 / 100)
    for _ in range(300):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(parameter.detach().double().mean()) == pytest.approx(1 - 3 * 2**-8, rel=2e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton, which comes with PyTorch for GPUs, is not installed",
)
def test_the_kernels_compute_the_same() -> None:
    """By Triton's interpreter, which must be asked for before Triton is imported."""
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("update_kernels.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=120,
    )


def test_kernels_get_gradients_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count places from the first one; PyTorch's own functions follow a tensor's steps."""
    seen: list[tuple[int, ...]] = []

    def note(update: Any, weights: torch.Tensor) -> Any:
        return lambda *tensors: seen.append(tensors[1].stride())

    monkeypatch.setattr(adamw_8bit, "_fastest", note)
    parameters = [torch.nn.Parameter(drawn(*shape)) for shape in [(64, 256), (7,), (90,)]]
    for parameter, gradient in zip(
        parameters, (drawn(256, 64).t(), drawn(14)[::2], torch.ones(()).expand(90)), strict=True
    ):
        parameter.grad = gradient
    ours([{"params": parameters}]).step()
    assert seen == [(256, 1), (1,), (1,)]


def test_what_the_state_takes_is_what_is_counted() -> None:
    for shape in [(64, 256), (3, 64, 512), (40,), (64, 100)]:
        parameter = torch.nn.Parameter(drawn(*shape))
        optimizer = ours([{"params": [parameter]}])
        parameter.grad = gradient(0, parameter.shape)
        optimizer.step()
        state = dict(optimizer.state[parameter])
        state.pop("step")
        assert {k: tuple(v.shape) for k, v in state.items()} == state_shapes(parameter.shape)
        assert sum(value.nbytes for value in state.values()) == state_bytes(parameter.shape)
