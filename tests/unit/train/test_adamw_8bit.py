"""8-bit moments: the paper's quantization, torchao's numbers, and means that rounding keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sevenfold.train import adamw_8bit
from sevenfold.train.adamw_8bit import BLOCK, AdamW8bit, state_bytes, state_shapes

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
    rounded = adamw_8bit._round_stochastically(between)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(1 + 2**-7 * 0.3, abs=5e-5)
    held = drawn(1000).bfloat16()
    assert torch.equal(adamw_8bit._round_stochastically(-held.float()), -held)


def test_updates_that_the_nearest_bf16_would_swallow_add_up() -> None:
    """A thousandth of a bf16 step each time; without chance the weight would stay 1 for ever."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(16, BLOCK, dtype=torch.bfloat16))
    optimizer = AdamW8bit([{"params": [parameter]}], betas=BETAS, epsilon=EPSILON, lr=2**-8 / 100)
    for _ in range(300):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(parameter.detach().double().mean()) == pytest.approx(1 - 3 * 2**-8, rel=2e-3)


def test_all_sizes_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized and plain parameters each; the compiler of this test runs what it is given."""
    counter = torch._dynamo.testing.CompileCounter()  # type: ignore[attr-defined]
    compiled = {
        update: torch.compile(update, fullgraph=True, backend=counter)
        for update in (adamw_8bit._update_blocks, adamw_8bit._update)
    }
    monkeypatch.setattr(adamw_8bit, "_compiled", lambda update, _: compiled[update])
    parameters = [
        torch.nn.Parameter(drawn(*shape))
        for shape in [(64, 256), (32, 512), (16, 768), (7,), (90,)]
    ]
    optimizer = ours([{"params": parameters}])
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for parameter in parameters:
            parameter.grad = gradient(step, parameter.shape)
        optimizer.step()
    assert counter.frame_count == 2


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
