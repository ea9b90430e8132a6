"""The optimizer, gradient clipping, and a flat form of the optimizer's state for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sevenfold.base.errors import CheckpointError, UsageError
from sevenfold.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters; vectors (norms, biases) do not decay.

    Errors:
        UsageError: ``adamw_8bit`` without torchao; the message names the extra to install.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UsageError(
                "optimizer kind adamw_8bit needs torchao; install it with: "
                "pip install 'sevenfold[fp8]'"
            ) from None
        optimizer: torch.optim.Optimizer = AdamW8bit(
            groups, lr=0.0, betas=config.betas, eps=config.epsilon, bf16_stochastic_round=True
        )
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of all groups; torchao keeps it in a tensor that its compiled step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def gradient_norm(parameters: Iterable[Tensor]) -> tuple[Tensor, float]:
    """Return the global norm of all gradients: [], sharded where they are, and as a number."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    return norm, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float, norm: Tensor) -> None:
    """Scale gradients, whose global norm is ``norm``, down to ``clip_norm``."""
    nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)


def draw_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every parameter a random gradient: what a benchmark of the optimizer works on."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


def state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """Bytes that two moments of every trainable parameter take, 8-bit ones with their scales."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.kind == "adamw_8bit":
        return sum(2 * (p.numel() + math.ceil(p.numel() / 256) * 4) for p in trainable)
    return sum(2 * p.numel() * p.element_size() for p in trainable)


def flatten_state(names: list[str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state as plain tensors named ``parameter::field`` or ``parameter::field::part``.

    ``names`` are the parameters' names in the optimizer's order.
    """
    flat: dict[str, Tensor] = {}
    for name, parameter in zip(names, parameters(optimizer), strict=True):
        for field, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}::{field}"
            if hasattr(value, "__tensor_flatten__"):
                for part in value.__tensor_flatten__()[0]:
                    flat[f"{key}::{part}"] = getattr(value, part)
            else:
                flat[key] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return flat


def restore_state(
    names: list[str], optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]
) -> None:
    """Put back what :func:`flatten_state` returned.

    Errors:
        CheckpointError: the state belongs to other parameters, or a shape differs.
    """
    found = {key.split("::")[0] for key in flat}
    if found and found != set(names):
        raise CheckpointError(
            f"optimizer state: belongs to other parameters ({sorted(found ^ set(names))[0]}); "
            "start the stage again with --no-resume"
        )
    fused = bool(optimizer.param_groups[0].get("fused"))
    for name, parameter in zip(names, parameters(optimizer), strict=True):
        fields = {key.split("::")[1] for key in flat if key.startswith(f"{name}::")}
        for field in sorted(fields):
            value = _rebuild(f"{name}::{field}", parameter, flat, fused=fused)
            if value.numel() > 1 and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimizer state {name}::{field}: shape {tuple(value.shape)}, expected "
                    f"{tuple(parameter.shape)}; start the stage again with --no-resume"
                )
            optimizer.state[parameter][field] = value


def parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the trained parameters, in the optimizer's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in its order."""
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_identity[id(parameter)] for parameter in parameters(optimizer)]


def _rebuild(key: str, parameter: Tensor, flat: dict[str, Tensor], *, fused: bool) -> Tensor:
    if key in flat:
        # The fused AdamW counts its steps on the device, torchao's counts them on the CPU.
        return flat[key].to(parameter.device) if flat[key].ndim or fused else flat[key]
    from torchao.optim.subclass_8bit import OptimState8bit

    parts = {
        name: flat[f"{key}::{name}"].to(parameter.device) for name in ("codes", "scale", "qmap")
    }
    signed = not key.endswith("exp_avg_sq")
    state: Tensor = OptimState8bit(
        parts["codes"], parts["scale"], parts["qmap"], signed, parameter.dtype
    )
    return state
