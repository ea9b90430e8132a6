"""Gradients added up inside the product: the same sums, in place, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sevenfold.model import accumulating
from sevenfold.model.accumulating import AccumulatingLinear, accumulate_in_products, begin_step
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.llama import initialize


def trained(model: nn.Module, steps: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the gradients of the last step, each the sum over its micro-batches."""
    for step in steps:
        model.zero_grad(set_to_none=True)
        begin_step(model)
        for ids_bt in step:
            model(input_ids=ids_bt, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # looked at by the compiler itself
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_are_those_of_plain_layers(
    tiny: ModelConfig, init: InitConfig, compiled: bool
) -> None:
    """Two steps, so that the second would show what the first had left behind."""
    generator = torch.Generator().manual_seed(1)
    steps = [
        [torch.randint(tiny.vocab_size, (2, 16), generator=generator) for _ in range(3)]
        for _ in range(2)
    ]
    plain, model = initialize(tiny, init, 0), initialize(tiny, init, 0)
    wanted = trained(plain, steps)
    accumulate_in_products(model)
    layers = [module for module in model.modules() if isinstance(module, AccumulatingLinear)]
    assert len(layers) == 7 * tiny.num_layers
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", dynamic=False)
    found = trained(model, steps)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    for layer in layers:
        assert layer.weight.grad is layer.total


def test_frozen_layers_and_the_head_stay_and_state_and_scores_are_the_same(
    tiny: ModelConfig, init: InitConfig
) -> None:
    model = initialize(tiny, init, 0)
    ids_bt = torch.arange(16).view(1, 16)
    before, scores = set(model.state_dict()), model(input_ids=ids_bt).logits
    frozen = model.model.layers[0].mlp.up_proj
    frozen.weight.requires_grad_(False)
    accumulate_in_products(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.get_output_embeddings()) is nn.Linear
    assert set(model.state_dict()) == before
    assert torch.equal(model(input_ids=ids_bt).logits, scores)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_bt).logits, scores)


def test_a_bias_is_added_and_learns() -> None:
    linear = nn.Linear(8, 4)
    layer = AccumulatingLinear(linear)
    input_ni = torch.randn(5, 8)
    assert torch.allclose(layer(input_ni), linear(input_ni), atol=1e-6)
    accumulating.begin_step(layer)
    layer(input_ni).sum().backward()
    assert torch.allclose(linear.bias.grad, torch.full((4,), 5.0))
    assert torch.allclose(linear.weight.grad, input_ni.sum(0).expand(4, 8), atol=1e-5)
