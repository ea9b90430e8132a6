"""FP8 on a machine without FP8: the refusals, and torchao's emulation of the arithmetic."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from sevenfold.base.errors import UsageError
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.float8 import convert_to_float8, float8_names, require_float8
from sevenfold.model.llama import initialize


def test_layers_are_converted_and_the_head_is_not(tiny: ModelConfig, init: InitConfig) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = initialize(tiny, init, 0)
    ids_bt = torch.arange(32).view(2, 16)
    with torch.no_grad():
        exact_btv = model(input_ids=ids_bt).logits
    assert convert_to_float8(model, emulate=True) is model
    converted = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    # Seven linear modules in each of two layers.
    assert len(converted) == 14
    assert not any("lm_head" in name for name in converted)
    near_btv = model(input_ids=ids_bt).logits
    error = (near_btv - exact_btv).norm() / exact_btv.norm()
    assert 0 < error < 0.1
    near_btv.sum().backward()
    gradient = model.model.layers[0].mlp.down_proj.weight.grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())


def test_sides_not_divisible_by_16_stay(tiny: ModelConfig, init: InitConfig) -> None:
    odd = initialize(dataclasses.replace(tiny, intermediate_size=50), init, 0)
    assert all("self_attn" in name for name in float8_names(odd))
    assert len(float8_names(odd)) == 8


def test_a_model_without_a_fitting_layer_is_refused() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(UsageError, match="no linear layer has both sides divisible by 16; change"):
        convert_to_float8(torch.nn.Sequential(torch.nn.Linear(8, 16)), emulate=True)


@pytest.mark.fault("K03", "K12")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match=r"8\.9 or above.*this machine has none; use --no-fp8"):
        require_float8()


@pytest.mark.fault("K03", "K12")
def test_an_a100_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UsageError, match=r"NVIDIA A100 has 8\.0; use --no-fp8"):
        require_float8()


@pytest.mark.fault("K12")
def test_a_missing_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match=r"needs torchao.*pip install 'sevenfold\[fp8\]'"):
        require_float8(emulate=True)
