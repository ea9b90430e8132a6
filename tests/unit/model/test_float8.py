"""Which layers FP8 converts, by which recipe, and where it is refused; emulated."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sevenfold.base.errors import UsageError
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.float8 import (
    HISTORY,
    convert_to_float8,
    convert_with_torchao,
    float8_names,
    require_float8,
)
from sevenfold.model.llama import initialize, load_model, save_model

Convert = Callable[..., torch.nn.Module]


@pytest.mark.parametrize("convert", [convert_to_float8, convert_with_torchao])
def test_layers_are_converted_and_the_head_is_not(
    tiny: ModelConfig, init: InitConfig, convert: Convert
) -> None:
    if convert is convert_with_torchao:
        pytest.importorskip("torchao", reason="torchao is not installed")
    model = initialize(tiny, init, 0)
    ids_bt = torch.arange(32).view(2, 16)
    with torch.no_grad():
        exact_btv = model(input_ids=ids_bt).logits
    assert convert(model, emulate=True) is model
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


def test_the_export_is_the_plain_model_without_scales(
    tiny: ModelConfig, init: InitConfig, tmp_path: Path
) -> None:
    model = initialize(tiny, init, 0)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    convert_to_float8(model, emulate=True)
    given = model.state_dict()
    assert any(name.endswith(HISTORY) for name in given)
    for number, state in enumerate((None, given)):
        target = tmp_path / str(number)
        save_model(model, None, target, torch.float32, state_dict=state)
        found = load_model(target).state_dict()
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            assert torch.equal(found[name], value), name


def test_sides_not_divisible_by_16_stay(tiny: ModelConfig, init: InitConfig) -> None:
    odd = initialize(dataclasses.replace(tiny, intermediate_size=50), init, 0)
    assert all("self_attn" in name for name in float8_names(odd))
    assert len(float8_names(odd)) == 8


@pytest.mark.parametrize("convert", [convert_to_float8, convert_with_torchao])
def test_a_model_without_a_fitting_layer_is_refused(convert: Convert) -> None:
    if convert is convert_with_torchao:
        pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(UsageError, match="no linear layer has both sides divisible by 16; change"):
        convert(torch.nn.Sequential(torch.nn.Linear(8, 16)), emulate=True)


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
    with pytest.raises(UsageError, match=r"needs torchao.*pip install -e '\.\[fp8\]'"):
        require_float8(emulate=True, torchao=True)
    require_float8(emulate=True)
