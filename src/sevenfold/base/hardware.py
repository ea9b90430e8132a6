"""What the machine can do: GPU detection, backends, and out-of-memory recovery by halving."""

from __future__ import annotations

import gc
import logging
import os
from typing import Any, TypedDict

import torch

from sevenfold.base.errors import MemoryExhaustedError, UsageError

log = logging.getLogger(__name__)

# Dense BF16 peaks in TFLOP/s from NVIDIA's data sheets, used for MFU only.
PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
# Kinds that a plan may name: how PyTorch calls one, its GiB, and its compute capability.
KINDS = {
    "A100-40GB": ("NVIDIA A100-SXM4-40GB", 39.4, (8, 0)),
    "A100": ("NVIDIA A100-SXM4-80GB", 79.1, (8, 0)),
    "H100": ("NVIDIA H100 80GB HBM3", 79.1, (9, 0)),
    "H200": ("NVIDIA H200", 139.8, (9, 0)),
}


class GPUInfo(TypedDict):
    """One machine's GPUs, as far as training decisions need them."""

    name: str
    gpu_type: str
    num_gpus: int
    memory_gib: float
    compute_capability: tuple[int, int]
    supports_bf16: bool
    supports_fp8: bool
    compile_mode: str
    peak_bf16_tflops: float


def detect_gpu_type() -> GPUInfo:
    """Describe the first visible GPU; ``gpu_type`` is ``cpu`` where there is none.

    ``compile_mode`` is ``max-autotune`` (of PyTorch's two, the one without CUDA graphs) on Hopper,
    ``default`` on other GPUs, ``none`` on a CPU, where compiling costs more than it brings.
    """
    if not torch.cuda.is_available():
        return GPUInfo(
            name="CPU",
            gpu_type="cpu",
            num_gpus=0,
            memory_gib=0.0,
            compute_capability=(0, 0),
            supports_bf16=True,
            supports_fp8=False,
            compile_mode="none",
            peak_bf16_tflops=0.0,
        )
    properties = torch.cuda.get_device_properties(0)
    return _describe(
        properties.name,
        properties.total_memory / 2**30,
        (properties.major, properties.minor),
        torch.cuda.device_count(),
    )


def gpu_of_kind(kind: str) -> GPUInfo:
    """Describe one GPU of a kind in ``KINDS`` as :func:`detect_gpu_type` would.

    Errors:
        UsageError: there is no such kind.
    """
    known = {name.lower(): about for name, about in KINDS.items()}
    if kind.lower() not in known:
        raise UsageError(f"--gpus {kind}: no such kind; name one of {', '.join(KINDS)}")
    return _describe(*known[kind.lower()], 1)


def _describe(name: str, memory_gib: float, capability: tuple[int, int], num_gpus: int) -> GPUInfo:
    known = next((kind for kind in PEAK_BF16_TFLOPS if kind in name), "other")
    hopper = capability[0] == 9
    return GPUInfo(
        name=name,
        gpu_type=known,
        num_gpus=num_gpus,
        memory_gib=memory_gib,
        compute_capability=capability,
        supports_bf16=capability >= (8, 0),
        supports_fp8=capability >= (8, 9),
        compile_mode="max-autotune" if hopper else "default",
        peak_bf16_tflops=PEAK_BF16_TFLOPS.get(known, 0.0),
    )


def setup_torch_backends(*, deterministic: bool = False) -> None:
    """Set the process-wide switches: TF32 for fp32 products on GPUs, or full determinism.

    Deterministic mode makes two runs of the same program bit-identical on the same GPU; it is
    slower, and PyTorch raises where an operation has no deterministic form, so also where cuBLAS
    has not been told before its first product to use workspaces of a fixed size.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic, warn_only=False)


def training_device(local_rank: int = 0) -> torch.device:
    """Return this process's device: its GPU where there is one, the CPU otherwise.

    Errors:
        UsageError: there are GPUs, but fewer than processes.
    """
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK {local_rank}: no GPU is left for this process, "
                f"{torch.cuda.device_count()} are visible; start one process per GPU"
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def release_memory() -> None:
    """Give cached device memory back, after the failed step's tensors have been dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for_gpu() -> None:
    """Return when the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Let :func:`peak_memory_gib` count from now on; a CPU process's peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Return the peak of allocated GPU memory, or of the process's memory on a CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class OOMHandler:
    """Halves the micro-batch when the device runs out of memory, and says when it cannot.

    The step is redone whole by the caller: with the batch divided by its global weight, a smaller
    micro-batch changes memory and rounding, never the gradient's scale.
    """

    def __init__(self, micro_batch: int, *, enabled: bool):
        """Start from ``micro_batch`` sequences of the longest context in one forward."""
        self.micro_batch = micro_batch
        self.enabled = enabled
        self.num_recoveries = 0

    @staticmethod
    def is_out_of_memory(error: BaseException) -> bool:
        """True for PyTorch's own out-of-memory type; messages are not looked at."""
        return isinstance(error, torch.OutOfMemoryError)

    def halve(self, facts: dict[str, Any]) -> None:
        """Halve the micro-batch after an out-of-memory error.

        Errors:
            MemoryExhaustedError: recovery is off, or one sequence alone does not fit; ``facts``
                (step, seq_len) and the peak are in the message.
        """
        where = ", ".join(f"{name} {value}" for name, value in facts.items())
        peak = peak_memory_gib()
        if not self.enabled:
            raise MemoryExhaustedError(
                f"out of memory at micro-batch {self.micro_batch} ({where}, peak {peak:.1f} GiB); "
                "add --enable-oom-recovery, or set a smaller micro_batch"
            )
        if self.micro_batch <= 1:
            raise MemoryExhaustedError(
                f"out of memory at micro-batch 1 ({where}, peak {peak:.1f} GiB); set a shorter "
                "context, recompute: true, or use more or larger GPUs"
            )
        self.micro_batch //= 2
        self.num_recoveries += 1
        log.warning("out of memory (%s): going on with micro-batch %d", where, self.micro_batch)
