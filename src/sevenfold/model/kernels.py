"""Optional Triton kernels: Liger's patches of transformers' Llama, and cut cross-entropy (CCE).

Liger works by replacing classes and functions of transformers' Llama module, so it must run before
a model is built from them: a model that exists keeps the classes it was built from.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import weakref
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from sevenfold.base.errors import UsageError, install_command
from sevenfold.model.config import KernelConfig

if TYPE_CHECKING:
    import torch

    from sevenfold.base.hardware import GPUInfo

log = logging.getLogger(__name__)

# Layers compiled one by one, and the head of `objective.linear_cross_entropy` that keeps logits.
PLAIN = KernelConfig(liger=False, cce=False)
# What trains the 7B fastest, as far as was measured: in whole steps CCE was slower than kept logits
# (on an H100), and Liger's kernels slower than what the compiler makes of the layers (on an H200,
# with the same chip). docs/performance.md, "What `auto` takes for kernels", has the figures.
FASTEST = {"H100": PLAIN, "H200": PLAIN}

_built_models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_active: dict[str, bool] = {"liger": False, "cce": False}


class ActiveKernels(TypedDict):
    """What :func:`setup_kernel_optimizations` has put into place in this process."""

    liger: bool
    cce: bool
    liger_fused_linear_cross_entropy: bool


def note_model(model: torch.nn.Module) -> None:
    """Remember that ``model`` was built, so that patching afterwards is refused."""
    _built_models.add(model)


def active_kernels() -> ActiveKernels:
    """Say which kernels are in place."""
    return ActiveKernels(
        liger=_active["liger"], cce=_active["cce"], liger_fused_linear_cross_entropy=False
    )


def decide(
    wanted: KernelConfig,
    gpu: GPUInfo,
    *,
    model_type: str = "llama",
    before: KernelConfig | None = None,
) -> KernelConfig:
    """Replace ``auto`` by what is fastest on ``gpu``, or by what was taken ``before``.

    On a kind of GPU that was never measured, which is said once, it is what was fastest on the
    others. Liger knows models of type ``llama`` only.
    """
    if "auto" not in (wanted.liger, wanted.cce):
        return wanted
    fastest = before or FASTEST.get(gpu["gpu_type"], PLAIN)
    if before is None and gpu["num_gpus"] and gpu["gpu_type"] not in FASTEST:
        _say_unmeasured(gpu["name"])
    liger, cce = wanted.liger, wanted.cce
    if liger == "auto":
        liger = cce is not True and model_type == "llama" and fastest.liger is True
    if cce == "auto":
        cce = not liger and fastest.cce is True
    return KernelConfig(liger=liger, cce=cce)


@functools.cache
def _say_unmeasured(gpu: str) -> None:
    log.warning(
        "kernels: auto takes compiled layers and our own loss, as it does on %s; on %s nothing was "
        "measured: compare with sevenfold bench pretrain --set kernels.liger=true, or "
        "--set kernels.cce=true",
        " and ".join(FASTEST),
        gpu,
    )


def setup_kernel_optimizations(
    *, liger: bool | Literal["auto"] = "auto", cce: bool | Literal["auto"] = "auto"
) -> ActiveKernels:
    """Put the asked or the fastest kernels into place; call it before any model is built.

    Liger replaces RoPE, RMSNorm and SwiGLU. Its own fused linear cross-entropy stays off always:
    the loss belongs to the objective, which CCE serves.

    Errors:
        UsageError: both are asked for; a model exists already; there is no GPU; the package is
            missing; or Liger was put into place earlier in this process and is now unwanted.
    """
    if liger is True and cce is True:
        raise UsageError(
            "kernels: liger and cce are mutually exclusive; set kernels.liger or kernels.cce to "
            "false"
        )
    wanted = KernelConfig(liger=liger, cce=cce)
    if "auto" in (liger, cce) and True not in (liger, cce):
        from sevenfold.base.hardware import detect_gpu_type

        wanted = decide(wanted, detect_gpu_type())
    liger, cce = wanted.liger is True, wanted.cce is True
    gc.collect()
    if len(_built_models):
        names = ", ".join(sorted({type(model).__name__ for model in _built_models}))
        raise UsageError(
            f"setup_kernel_optimizations was called after a model was built ({names}); the "
            "kernels patch the model's classes, so call it before initialize or load_model"
        )
    if _active["liger"] and not liger:
        raise UsageError(
            "Liger's kernels are in place in this process and cannot be taken out; start a new "
            "process to train without them"
        )
    if (liger or cce) and not _has_gpu():
        asked = "liger" if liger else "cce"
        raise UsageError(
            f"kernels.{asked}: its Triton kernels need an NVIDIA GPU and this machine has none; "
            f"set kernels.{asked}=false"
        )
    if liger and not _active["liger"]:
        # The arguments are the rule: Liger never takes over the loss.
        _import("liger_kernel.transformers", "liger").apply_liger_kernel_to_llama(
            rope=True,
            rms_norm=True,
            swiglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
    if cce:
        _import("cut_cross_entropy", "cce")
    _active.update(liger=liger, cce=cce)
    log.debug("kernels in place: %s", _active)
    return active_kernels()


def _has_gpu() -> bool:
    # Script 05 imports this module, and its --help is not to wait for torch.
    import torch

    return torch.cuda.is_available()


def _import(module: str, setting: str) -> ModuleType | Any:
    """Import a Triton package late: it costs seconds, and fails where there is no GPU."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"kernels.{setting}: cannot import {module} ({error}); install it with "
            f"{install_command('kernels')}, or set kernels.{setting}=false"
        ) from error
