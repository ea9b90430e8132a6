"""GPU detection, backends and out-of-memory recovery, for scripts and tests."""

from sevenfold.base.hardware import GPUInfo, OOMHandler, detect_gpu_type, setup_torch_backends

__all__ = ["GPUInfo", "OOMHandler", "detect_gpu_type", "setup_torch_backends"]
