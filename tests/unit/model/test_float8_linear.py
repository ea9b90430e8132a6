"""FP8 layers: rounding, scales, what is kept for how long. Emulated: a CPU has no FP8 products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sevenfold.model import float8, float8_linear
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.float8_linear import E4M3, E5M2, Float8Linear, cast, scale_for, transposed
from sevenfold.model.llama import initialize
from sevenfold.train.config import OptimizerConfig
from sevenfold.train.optimizer import make_optimizer, set_learning_rate

NAN, INFINITY = float("nan"), float("inf")


class Twice(nn.Module):
    """Two layers with one input, as gate and up have, and one behind them."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=True)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        hidden = functional.silu(self.gate_proj(values)) * self.up_proj(values)
        down: Tensor = self.down_proj(hidden)
        return down


def converted(width: int = 32) -> Twice:
    torch.manual_seed(0)
    model = Twice(width)
    float8.convert_to_float8(model, emulate=True)
    return model


def scalings(model: nn.Module) -> float8.Scalings:
    found: Any = model.get_submodule(float8.NAME)
    return found


def step(model: nn.Module, values: Tensor, factor: float = 1.0) -> Tensor:
    """Do what training does with a step, and return the output."""
    model.zero_grad(set_to_none=True)
    float8.begin_step(model)
    output: Tensor = model(values)
    (output.square().sum() * factor).backward()
    float8.end_step(model)
    return output.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("dtype", "end"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_what_is_too_large_saturates_and_what_is_not_finite_stays_visible(
    dtype: torch.dtype, end: float
) -> None:
    values = torch.tensor([1e6, -1e6, 0.0, -3.0, NAN, INFINITY, -INFINITY])
    found = cast(values, torch.tensor(1.0), dtype).float()
    assert found[:4].tolist() == [end, -end, 0.0, -3.0]
    assert bool(found[4:].isnan().all())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_are_the_largest_powers_of_two_in_range(dtype: torch.dtype) -> None:
    end = torch.finfo(dtype).max
    amax = torch.cat([torch.logspace(-25, 25, 400), torch.tensor([end, end / 2, end * 1.0001])])
    scale = scale_for(amax, dtype)
    assert bool((amax * scale <= end).all())
    assert bool((amax * scale * 2 > end).all())
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    assert bool((1 / scale).isfinite().all())
    assert float(scale_for(torch.tensor(0.0), dtype)) == 1.0


def test_values_round_as_torchao_rounds_them() -> None:
    """Forward with the input's own scale; gradients once the history holds the same scales."""
    torchao = pytest.importorskip("torchao.float8", reason="torchao is not installed")
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=False)
    recipe: Any = torchao.Float8LinearConfig.from_recipe_name("tensorwise")
    recipe = dataclasses.replace(recipe, emulate=True, round_scales_to_power_of_2=True)
    theirs = nn.ModuleDict({"linear": plain})
    torchao.convert_to_float8_training(theirs, config=recipe)
    ours = nn.ModuleDict({"linear": plain})
    float8.convert_to_float8(ours, emulate=True)
    scalings(ours).refresh()
    values, gradient = torch.randn(40, 64) * 3, torch.randn(40, 48) * 1e-6
    with torch.no_grad():
        expected = theirs["linear"](values)
        assert torch.allclose(ours["linear"](values), expected, rtol=1e-6, atol=1e-6)
    found = []
    for model, rounds in ((ours, 2), (theirs, 1)):
        for _ in range(rounds):
            plain.weight.grad = None
            inputs = values.clone().requires_grad_()
            float8.begin_step(model)
            model["linear"](inputs).backward(gradient)
            float8.end_step(model)
            if model is ours:
                scalings(ours).refresh()
        assert inputs.grad is not None
        assert plain.weight.grad is not None
        found.append((inputs.grad, plain.weight.grad))
    for our, their in zip(*found, strict=True):
        assert distance(our, their) < 1e-6


def test_gradients_come_near_those_of_exact_products() -> None:
    model, values = converted(), torch.randn(3, 8, 32)
    torch.manual_seed(0)
    exact = Twice()
    expected = exact(values)
    expected.square().sum().mul(1e-7).backward()
    for _ in range(float8.ROUNDS):
        output = step(model, values, 1e-7)
    assert 0 < distance(output, expected.detach()) < 0.1
    for name, gradient in gradients(model).items():
        assert 0 <= distance(gradient, gradients(exact)[name]) < 0.15, name


def test_first_rounds_find_the_scales_of_tiny_gradients() -> None:
    """With scale 1 they are zero in FP8, so that without the rounds a first step learns nothing."""
    model, values = converted(), torch.randn(3, 8, 32)
    assert not float8.has_history(model)
    step(model, values, 1e-9)
    assert not bool(gradients(model)["gate_proj.weight"].any())
    for _ in range(float8.ROUNDS - 1):
        step(model, values, 1e-9)
    assert bool(gradients(model)["gate_proj.weight"].any())
    assert not float8.has_history(model)
    step(model, values, 1e-9)
    assert float8.has_history(model)
    float8.forget_history(model)
    assert not float8.has_history(model)


def test_layers_of_one_input_share_its_scale_and_gradients_have_their_own() -> None:
    model = converted()
    gate, up, down = model.gate_proj, model.up_proj, model.down_proj
    assert isinstance(gate, Float8Linear)
    assert isinstance(up, Float8Linear)
    assert isinstance(down, Float8Linear)
    assert gate.input_scaling is up.input_scaling is not down.input_scaling
    assert gate.gradient_scaling is not up.gradient_scaling
    assert scalings(model).history.shape == (5, float8.HISTORY_LENGTH)


def test_the_largest_of_the_last_steps_decides_and_is_forgotten_after_sixteen() -> None:
    model, values = converted(), torch.randn(8, 32)
    amax = float(values.abs().max())
    step(model, values * 100)
    inputs = model.gate_proj.input_scaling
    for _ in range(float8.HISTORY_LENGTH):
        step(model, values)
        # The scale in force was set before this step, when the large one was still known.
        assert float(inputs.scale) == float(scale_for(torch.tensor(100 * amax), E4M3))
    step(model, values)
    assert float(inputs.scale) == float(scale_for(torch.tensor(amax), E4M3))


def test_an_outlier_saturates_and_the_next_step_knows_it() -> None:
    model, values = converted(), torch.randn(8, 32)
    step(model, values)
    usual = step(model, values)
    spiked = values.clone()
    spiked[0, 0] = 1e30
    output = step(model, spiked)
    assert bool(output.isfinite().all())
    assert torch.equal(output[1:], usual[1:])
    model(values)
    assert float(model.gate_proj.input_scaling.scale) < 1e-27


@pytest.mark.parametrize("bad", [NAN, INFINITY])
def test_what_is_not_finite_reaches_the_loss_and_the_gradients_and_not_the_history(
    bad: float,
) -> None:
    model, values = converted(), torch.randn(8, 32)
    step(model, values)
    before = scalings(model).history.clone()
    spoilt = values.clone()
    spoilt[0, 0] = bad
    assert bool(step(model, spoilt).isnan().any())
    assert bool(gradients(model)["gate_proj.weight"].isnan().any())
    assert bool(scalings(model).history.isfinite().all())
    assert torch.equal(scalings(model).history[:, -2], before[:, -1])
    for name, gradient in gradients(model).items():
        assert gradient.shape == model.get_parameter(name).shape
    step(model, values)
    output = model(values)
    output.backward(torch.full_like(output, bad))
    assert bool(gradients(model)["down_proj.weight"].isnan().all())


def test_a_step_given_up_leaves_no_trace() -> None:
    model, values = converted(), torch.randn(8, 32)
    step(model, values)
    before = scalings(model).history.clone()
    model(values * 1000).sum().backward()
    step(model, values)
    assert torch.equal(scalings(model).history[:2, -1], before[:2, -1])


def test_recomputing_and_splitting_change_no_history() -> None:
    from torch.utils.checkpoint import checkpoint

    values = torch.randn(8, 32)
    histories = []
    for parts, recompute in ((1, False), (1, True), (4, False)):
        model = converted()
        for _ in range(3):
            float8.begin_step(model)
            for part in values.chunk(parts):
                inputs = part.clone().requires_grad_()
                scalings(model).refresh()
                if recompute:
                    output: Any = checkpoint(model.forward, inputs, use_reentrant=False)
                else:
                    output = model(inputs)
                output.square().sum().backward()
            float8.end_step(model)
        histories.append(scalings(model).history)
    assert torch.equal(histories[1], histories[0])
    assert torch.allclose(histories[2], histories[0], rtol=1e-5, atol=0)


def test_without_gradients_the_own_scale_serves_and_nothing_is_noted() -> None:
    model, values = converted(), torch.randn(8, 32)
    step(model, values)
    with torch.no_grad():
        small, large = model(values), model(values * 2**20)
    assert bool(large.isfinite().all())
    assert distance(model(values).detach(), small) < 0.1
    float8.begin_step(model)
    with torch.no_grad():
        model(values)
    assert float(model.gate_proj.input_scaling.amax) == 0


def test_held_scales_round_alike_whatever_stands_beside() -> None:
    """An input's own scale depends on what else is in it, and so do its smallest numbers."""
    model = converted()
    torch.manual_seed(1)
    small, large = torch.randn(8, 32), torch.randn(8, 32) * 30
    both = torch.cat([small, large])
    step(model, both)
    with torch.no_grad():
        assert not torch.equal(model(small), model(both)[:8])
    amax = float8.inputs_of_last_step(model)
    assert amax is not None
    assert both.abs().max() in amax
    float8.hold_inputs(model, amax)
    with torch.no_grad():
        alone, beside = model(small), model(both)[:8]
    assert torch.equal(alone, beside)
    assert torch.equal(alone, model(small).detach())
    # A step with less, or a little more, changes nothing; one with more is in range all the same.
    for factor, same in ((0.01, True), (1.2, True), (100.0, False)):
        step(model, both * factor)
        found = model(small).detach()
        assert torch.equal(alone, found) is same
        assert bool(model(both * factor).isfinite().all())
    float8.forget_history(model)
    assert torch.equal(alone, model(small).detach())


def test_nothing_is_held_where_nothing_is_in_fp8() -> None:
    model = Twice()
    assert float8.inputs_of_last_step(model) is None
    float8.hold_inputs(model, torch.ones(2))


def change_by_the_optimizer(model: nn.Module) -> None:
    """Its fused kernel is one of those whose changes PyTorch does not count by itself."""
    config = OptimizerConfig(
        kind="adamw", betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
    )
    made = make_optimizer(model, config)
    set_learning_rate(made, 0.1)
    made.step()


def change_by_loading(model: nn.Module) -> None:
    state = {n: t * 2 if t.ndim == 2 else t for n, t in model.state_dict().items()}
    model.load_state_dict(state)


def change_one_row(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("down_proj.weight")[3].mul_(5)


def change_the_tensor(model: nn.Module) -> None:
    parameter = model.get_parameter("down_proj.weight")
    parameter.data = parameter.data * 2


CHANGES: list[Callable[[nn.Module], None]] = [
    change_by_the_optimizer,
    change_by_loading,
    change_one_row,
    change_the_tensor,
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_cast_outlives_its_weights(change: Callable[[nn.Module], None]) -> None:
    model, values = converted(64), torch.randn(8, 64)
    step(model, values)
    before = model(values).detach()
    change(model)
    fresh = Twice(64)
    kept = {name: p for name, p in model.state_dict().items() if name != float8.HISTORY}
    fresh.load_state_dict(kept)
    float8.convert_to_float8(fresh, emulate=True)
    with torch.no_grad():
        assert not torch.equal(model(values), before)
        assert torch.equal(model(values), fresh(values))


def test_weights_are_cast_once_as_long_as_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = converted(), torch.randn(8, 32)
    cast_layers: list[int] = []
    real = float8._cast_weights

    def counting(linears: list[Float8Linear]) -> None:
        cast_layers.append(len(linears))
        real(linears)

    monkeypatch.setattr(float8, "_cast_weights", counting)
    for _ in range(3):
        model(values).sum().backward()
    change_one_row(model)
    model(values)
    assert cast_layers == [3, 1]


def test_the_scales_come_back_with_the_state() -> None:
    model, values = converted(), torch.randn(8, 32)
    for factor in (1.0, 7.0, 3.0):
        step(model, values * factor)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = converted()
    step(other, values * 1e5)
    other.load_state_dict(state)
    for each in (model, other):
        each.zero_grad()
        each(values).square().sum().backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(other)[name]), name


@pytest.mark.parametrize("rows", [16, 40, 7])
def test_transposed_rows_are_whole_blocks(rows: int) -> None:
    values = torch.randn(rows, 32).to(E4M3)
    found = transposed(values)
    assert found.is_contiguous()
    assert found.shape[1] % float8_linear.DIVISOR == 0
    assert torch.equal(found[:, :rows].float(), values.t().float())
    assert not bool(found[:, rows:].float().any())


def input_gradient(model: nn.Module, values: Tensor) -> Tensor:
    inputs = values.clone().requires_grad_()
    model(inputs).sum().backward()
    assert inputs.grad is not None
    return inputs.grad


def test_frozen_weights_cost_no_product_and_no_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an adapter: three layers, forward and to their inputs, with the same gradient."""
    model, values = converted(), torch.randn(8, 32)
    expected = input_gradient(model, values)
    model.zero_grad()
    model.requires_grad_(False)
    model(values)
    products: list[torch.dtype] = []
    real = float8_linear.multiply

    def counting(left: Tensor, *args: Any, **settings: Any) -> Tensor:
        products.append(left.dtype)
        return real(left, *args, **settings)

    monkeypatch.setattr(float8_linear, "multiply", counting)
    monkeypatch.setattr(float8_linear, "transposed", lambda _: pytest.fail("transposed again"))
    assert torch.equal(input_gradient(model, values), expected)
    assert not gradients(model)
    assert products == [E4M3] * 3 + [E5M2] * 3


@pytest.mark.parametrize("change", [change_by_loading, change_one_row, change_the_tensor])
def test_the_transposes_kept_are_those_of_the_weights(change: Callable[[nn.Module], None]) -> None:
    model, values = converted(64), torch.randn(8, 64)
    linears = [each for each in model.modules() if isinstance(each, Float8Linear)]
    model.requires_grad_(False)
    for step_to in (lambda _: None, change):
        step_to(model)
        model(values)
        for linear in linears:
            assert linear.weight8_turned is not None
            assert torch.equal(linear.weight8_turned.float(), linear.weight8.float().t())
    model.requires_grad_(True)
    model(values)
    assert all(linear.weight8_turned is None for linear in linears)


# The compiler looks at the .grad of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_it_is_the_same_with_one_cast_for_each_input(
    tiny: ModelConfig, init: InitConfig
) -> None:
    """The whole layer is one graph, which both layers share; back end: none, as it would take long.

    Seven gradients and four inputs are cast; two inputs are kept in FP8, as the others are cast
    again from what is kept anyway.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    ids_bt = torch.arange(32).view(2, 16)
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = initialize(tiny, init, 0)
        float8.convert_to_float8(model, emulate=True)
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False, backend=backend)
        for _ in range(float8.ROUNDS):
            model.zero_grad()
            float8.begin_step(model)
            hidden_bth = model.model(input_ids=ids_bt, use_cache=False).last_hidden_state
            hidden_bth.square().sum().mul(1e-6).backward()
            float8.end_step(model)
        found.append((gradients(model), model.get_buffer("model.float8.history")))
    for name, gradient in found[0][0].items():
        assert distance(found[1][0][name], gradient) < 1e-6, name
    assert torch.allclose(found[0][1], found[1][1])
    assert len(graphs) == 2
    forward, backward = (
        [node.kwargs.get("dtype") for node in graph.graph.nodes if node.op == "call_function"]
        for graph in graphs
    )
    assert forward.count(E4M3) == 4
    assert backward.count(E5M2) == 7
