"""What the machine is described as, and recovery from lack of memory."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

import gpu_utils
from sevenfold.base import hardware
from sevenfold.base.errors import MemoryExhaustedError, UsageError


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], num_gpus: int = 1
) -> None:
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=80 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = hardware.detect_gpu_type()
    assert found["gpu_type"] == "cpu"
    assert (found["num_gpus"], found["compile_mode"], found["supports_fp8"]) == (0, "none", False)
    assert hardware.training_device(3) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "capability", "kind", "fp8", "mode", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100", True, "max-autotune", 989.0),
        ("NVIDIA H200", (9, 0), "H200", True, "max-autotune", 989.0),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100", False, "default", 312.0),
        ("NVIDIA GeForce RTX 4090", (8, 9), "other", True, "default", 0.0),
    ],
)
def test_gpus_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    kind: str,
    fp8: bool,
    mode: str,
    peak: float,
) -> None:
    pretend_gpu(monkeypatch, name, capability, num_gpus=4)
    found = hardware.detect_gpu_type()
    assert (found["gpu_type"], found["supports_fp8"], found["compile_mode"]) == (kind, fp8, mode)
    assert (found["num_gpus"], found["peak_bf16_tflops"]) == (4, peak)
    assert found["memory_gib"] == pytest.approx(80)
    assert hardware.training_device(3) == torch.device("cuda", 3)


def test_backends_are_set_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        hardware.setup_torch_backends(deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32
        hardware.setup_torch_backends()
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = before


def test_peak_memory_is_this_process() -> None:
    assert 0.01 < hardware.peak_memory_gib() < 100


def test_only_torch_own_out_of_memory_counts() -> None:
    handler = hardware.OOMHandler(4, enabled=True)
    assert handler.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not handler.is_out_of_memory(RuntimeError("CUDA out of memory"))


def test_the_micro_batch_is_halved_down_to_one() -> None:
    handler = hardware.OOMHandler(4, enabled=True)
    facts = {"step": 3, "seq_len": 2048}
    handler.halve(facts)
    handler.halve(facts)
    assert (handler.micro_batch, handler.num_recoveries) == (1, 2)
    message = r"micro-batch 1 \(step 3, seq_len 2048, .*set a shorter context, recompute: true"
    with pytest.raises(MemoryExhaustedError, match=message):
        handler.halve(facts)


def test_without_recovery_the_flag_is_named() -> None:
    handler = hardware.OOMHandler(4, enabled=False)
    with pytest.raises(MemoryExhaustedError, match="micro-batch 4.*add --enable-oom-recovery"):
        handler.halve({"step": 1})


def test_the_script_offers_the_same_names() -> None:
    for name in ("detect_gpu_type", "GPUInfo", "OOMHandler", "setup_torch_backends"):
        assert getattr(gpu_utils, name) is getattr(hardware, name)


@pytest.mark.fault("F06")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.training_device(1) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"LOCAL_RANK 2: no GPU .* 2 are visible; start one proc"):
        hardware.training_device(2)
