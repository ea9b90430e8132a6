"""The two rules: before any model, and never both."""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import pytest
import torch
from tests.unit.train.test_planner import CPU, H100

from sevenfold.base import hardware
from sevenfold.base.config import build
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model import kernels
from sevenfold.model.config import InitConfig, KernelConfig, ModelConfig
from sevenfold.model.kernels import active_kernels, setup_kernel_optimizations
from sevenfold.model.llama import initialize


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test begin as a new process does: no model, nothing patched."""
    monkeypatch.setattr(kernels, "_built_models", weakref.WeakSet())
    monkeypatch.setattr(kernels, "_active", {"liger": False, "cce": False})


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a GPU and with a Liger that notes what it is asked to patch."""
    asked: dict[str, Any] = {}
    package = types.ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = asked.update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return asked


def test_nothing_asked_nothing_active() -> None:
    off = {"liger": False, "cce": False, "liger_fused_linear_cross_entropy": False}
    assert setup_kernel_optimizations() == off
    assert active_kernels() == off


def on(gpu_type: str) -> GPUInfo:
    return GPUInfo(**{**H100, "name": f"NVIDIA {gpu_type}", "gpu_type": gpu_type})


def test_auto_takes_what_was_measured_fastest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patched: dict[str, Any]
) -> None:
    open_ones = KernelConfig(liger="auto", cce="auto")
    for gpu_type in ("H100", "H200"):
        assert kernels.decide(open_ones, on(gpu_type)) == kernels.PLAIN
    # A measurement to the contrary is followed, also by script 05's call.
    monkeypatch.setattr(kernels, "FASTEST", {"H100": KernelConfig(liger=True, cce=False)})
    monkeypatch.setattr(hardware, "detect_gpu_type", lambda: on("H100"))
    assert kernels.decide(open_ones, on("H100"), model_type="qwen2") == kernels.PLAIN
    assert kernels.decide(open_ones, on("H100"), before=kernels.PLAIN) == kernels.PLAIN
    assert setup_kernel_optimizations()["liger"]
    assert patched["fused_linear_cross_entropy"] is False
    assert caplog.text == ""
    # Without a GPU there is nothing to take.
    assert kernels.decide(open_ones, CPU) == kernels.PLAIN
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("wanted", "fastest", "taken"),
    [
        ((True, "auto"), (False, True), (True, False)),
        (("auto", True), (True, False), (False, True)),
        ((False, "auto"), (True, False), (False, False)),
        ((False, "auto"), (False, True), (False, True)),
        (("auto", "auto"), (False, True), (False, True)),
        ((True, False), (False, True), (True, False)),
    ],
)
def test_what_is_set_stays_and_never_both(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, fastest: Any, taken: Any
) -> None:
    measured = {"A100": KernelConfig(liger=fastest[0], cce=fastest[1])}
    monkeypatch.setattr(kernels, "FASTEST", measured)
    found = kernels.decide(KernelConfig(liger=wanted[0], cce=wanted[1]), on("A100"))
    assert (found.liger, found.cce) == taken


def test_a_gpu_that_was_never_measured_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels._say_unmeasured.cache_clear()
    for _ in range(2):
        assert kernels.decide(KernelConfig(liger="auto", cce="auto"), on("A100")) == kernels.PLAIN
    (said,) = [record.getMessage() for record in caplog.records]
    assert "as it does on H100 and H200; on NVIDIA A100 nothing was measured: compare with" in said


def test_both_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="liger and cce are mutually exclusive; set"):
        setup_kernel_optimizations(liger=True, cce=True)
    with pytest.raises(UsageError, match="mutually exclusive; set one of them to false"):
        build(KernelConfig, {"liger": True, "cce": True})
    assert build(KernelConfig, {"liger": True, "cce": False}).liger


@pytest.mark.parametrize("asked", [{}, {"liger": True}, {"cce": True}])
def test_a_model_that_exists_is_an_error_and_one_that_is_gone_is_not(
    tiny: ModelConfig, init: InitConfig, asked: dict[str, bool]
) -> None:
    model = initialize(tiny, init, 0)
    with pytest.raises(UsageError, match=r"after a model was built \(LlamaForCausalLM\).*before"):
        setup_kernel_optimizations(**asked)
    del model
    assert not setup_kernel_optimizations()["liger"]


@pytest.mark.fault("K12")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("kernel", ["liger", "cce"])
def test_without_a_gpu_they_are_refused(kernel: str) -> None:
    with pytest.raises(UsageError, match=f"kernels.{kernel}: .*NVIDIA GPU.*kernels.{kernel}=false"):
        setup_kernel_optimizations(**{kernel: True})


def test_liger_never_takes_the_loss(patched: dict[str, Any]) -> None:
    active = setup_kernel_optimizations(liger=True)
    assert active == {"liger": True, "cce": False, "liger_fused_linear_cross_entropy": False}
    assert patched == {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    with pytest.raises(UsageError, match="cannot be taken out; start a new process"):
        setup_kernel_optimizations(liger=False, cce=False)


@pytest.mark.fault("K12")
@pytest.mark.parametrize(
    ("kernel", "module"), [("liger", "liger_kernel.transformers"), ("cce", "cut_cross_entropy")]
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, kernel: str, module: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"cannot import {module}.*'\.\[kernels\]'"):
        setup_kernel_optimizations(**{kernel: True})
    assert not active_kernels()[kernel]  # type: ignore[literal-required]
