"""A base in four bits: small, frozen, near the weights it was made of; no work for gradients."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sevenfold.base.errors import UsageError
from sevenfold.model.config import InitConfig, LoRAAdapterConfig, ModelConfig
from sevenfold.model.float8 import convert_to_float8
from sevenfold.model.four_bits import freeze_in_four_bits, require_four_bits
from sevenfold.model.llama import initialize
from sevenfold.model.lora import add_adapter, merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, about optional kernels

CPU = torch.device("cpu")
IDS_BT = torch.arange(40).view(2, 20) * 7 % 320
ADAPTER = LoRAAdapterConfig(r=1, alpha=2.0, dropout=0.0, targets="all-linear")


@pytest.fixture
def base(tiny: ModelConfig, init: InitConfig) -> Any:
    return initialize(tiny, init, 0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS_BT).logits
    return found


def test_weights_take_four_bits_and_stay_near(base: Any) -> None:
    exact = {n: p.detach().clone() for n, p in base.named_parameters()}
    before = logits(base)
    error = freeze_in_four_bits(base, CPU, torch.float32)
    assert 0.05 < error < 0.12  # a normal distribution in 16 values: 0.09
    bnb = require_four_bits()
    small = {n: m for n, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(small) == 7 * base.config.num_hidden_layers
    for name, module in small.items():
        weight = exact[f"{name}.weight"]
        assert module.weight.numel() * module.weight.element_size() == weight.numel() // 2
        found = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert (found - weight).abs().max() <= 0.16 * weight.abs().max()
    assert torch.equal(base.get_input_embeddings().weight, exact["model.embed_tokens.weight"])
    assert 0 < (logits(base) - before).abs().mean() < 0.3 * before.std()


@pytest.mark.parametrize("kind", ["full", "nf4", "fp8"])
def test_frozen_weights_cost_no_gradient_work(base: Any, kind: str) -> None:
    """Backward is one product a weight, for its inputs; the weight's gradient would be a second."""
    if kind == "nf4":
        freeze_in_four_bits(base, CPU, torch.float32)
    if kind == "fp8":
        convert_to_float8(base, emulate=True)
    adapted = add_adapter(base, ADAPTER)
    layer = adapted.get_base_model().model.layers[1].mlp
    layer.compile(backend="aot_eager")  # as layers are; torchao's FP8 rests on it for this
    matrices = 3 * base.config.hidden_size * base.config.intermediate_size
    sides = 3 * (base.config.hidden_size + base.config.intermediate_size) * ADAPTER.r
    tokens = 16
    inputs = torch.randn(1, tokens, base.config.hidden_size, requires_grad=True)
    total = layer(inputs).sum()
    with FlopCounterMode(display=False) as counter:
        total.backward()
    # Two operations a weight and token; adapters have both gradients.
    assert counter.get_total_flops() == 2 * tokens * (matrices + 2 * sides)
    assert all(p.grad is None for n, p in adapted.named_parameters() if "lora_" not in n)


def test_an_adapter_learns_on_four_bits_and_merges_into_the_weights_as_they_were(
    base: Any,
) -> None:
    exact = copy.deepcopy(base)
    freeze_in_four_bits(base, CPU, torch.float32)
    torch.manual_seed(0)
    adapted = add_adapter(base, LoRAAdapterConfig(r=4, alpha=8, dropout=0, targets="all-linear"))
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=IDS_BT, labels=IDS_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    whole = add_adapter(exact, LoRAAdapterConfig(r=4, alpha=8, dropout=0, targets="all-linear"))
    assert not whole.load_state_dict(trainable, strict=False).unexpected_keys
    with_adapter = logits(whole)
    merged = merge_adapter(whole)
    assert (logits(merged) - with_adapter).abs().max() <= 1e-5
    with torch.no_grad():
        again = merged(input_ids=IDS_BT, labels=IDS_BT).loss
    assert float(again) < losses[0] - 0.3


def test_compiled_layers_give_the_same(base: Any) -> None:
    freeze_in_four_bits(base, CPU, torch.float32)
    before = logits(base)
    for layer in base.model.layers:
        layer.compile(backend="aot_eager")
    assert (logits(base) - before).abs().max() <= 1e-5


def test_without_bitsandbytes_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[qlora\]', or set lora\.base=ful"):
        require_four_bits()
