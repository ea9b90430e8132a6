"""The optimizer, gradient clipping, and a flat form of the optimizer's state for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sevenfold.base.errors import CheckpointError
from sevenfold.model import float8, many_tensors
from sevenfold.train import adamw_8bit, replicas
from sevenfold.train.adamw_8bit import AdamW8bit
from sevenfold.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters; vectors (norms, biases) do not decay."""
    trainable = list(replicas.trained(model).values())
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw_8bit":
        made: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas, epsilon=config.epsilon)
    else:
        made = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=True)
    made.register_step_post_hook(_count_update)
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def _count_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let PyTorch count the change of the weights: fused kernels do not, nor need others."""
    torch.autograd.graph.increment_version(parameters(optimizer))


def update(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Apply the gradients of a step, which is over with that."""
    optimizer.step()
    replicas.gather(model)
    float8.end_step(model)


def gradient_norm(parameters: Iterable[Tensor]) -> tuple[Tensor, float]:
    """Return the global norm of all gradients, in fp32: [], and as a number.

    PyTorch's own norm of bf16 gradients is a bf16 number, with three digits.
    """
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    sharded = [each for each in gradients if hasattr(each, "to_local")]
    parts = [each.to_local() if hasattr(each, "to_local") else each for each in gradients]
    parts = [part for part in parts if part.numel()] or [parts[0].new_zeros(1)]
    norm = torch.linalg.vector_norm(many_tensors.norms(parts, 2.0))
    if sharded:
        # All gradients are sharded alike. Copies hold the same, but are summed up together: sums
        # of their own may differ in a last bit, and one node would skip a step, another apply it.
        mesh = sharded[0].device_mesh
        squared = norm.square() * mesh["shards"].size() / mesh.size()
        torch.distributed.all_reduce(squared)
        norm = squared.sqrt()
    return norm, float(norm)


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float, norm: Tensor) -> None:
    """Scale gradients, whose global norm is ``norm``, down to ``clip_norm``."""
    if isinstance(optimizer, AdamW8bit):
        # As PyTorch computes it; applied in fp32 and without a pass over the gradients of its own.
        optimizer.scale_gradients((clip_norm / (norm + 1e-6)).clamp(max=1.0))
    else:
        nn.utils.clip_grads_with_norm_(parameters(optimizer), clip_norm, norm, foreach=True)


def draw_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every parameter a random gradient: what a benchmark of the optimizer works on.

    A gradient that has memory already is drawn there.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.randn_like(parameter)
        else:
            parameter.grad.normal_()


def state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """Bytes that two moments of every trainable parameter take, 8-bit ones with their scales."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.kind == "adamw_8bit":
        return sum(adamw_8bit.state_bytes(p.shape) for p in trainable)
    return sum(2 * p.numel() * p.element_size() for p in trainable)


def flatten_state(names: list[str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state as tensors named ``parameter::field``.

    ``names`` are the parameters' names in the optimizer's order.
    """
    return {
        f"{name}::{field}": value
        for name, parameter in zip(names, parameters(optimizer), strict=True)
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def restore_state(
    names: list[str], optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]
) -> None:
    """Put back what :func:`flatten_state` returned; of what never had a gradient there is nothing.

    Errors:
        CheckpointError: the state belongs to other parameters or another optimizer, or a shape
            differs.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, field = key.split("::", 1)
        fields.setdefault(name, {})[field] = value
    if strange := sorted(set(fields) - set(names)):
        raise CheckpointError(
            f"optimizer state: belongs to other parameters ({strange[0]}); start the stage again "
            "with --no-resume"
        )
    fused = bool(optimizer.param_groups[0].get("fused"))
    for name, parameter in zip(names, parameters(optimizer), strict=True):
        if name in fields:
            _require_shapes(name, fields[name], _shapes(optimizer, parameter))
            for field, value in fields[name].items():
                # The fused AdamW counts its steps on the device, ours counts them on the CPU.
                counted_on_cpu = field == "step" and not fused
                placed = value if counted_on_cpu else value.to(parameter.device)
                optimizer.state[parameter][field] = placed


def _shapes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an optimizer's whole state for one parameter."""
    if isinstance(optimizer, AdamW8bit):
        return {"step": (), **adamw_8bit.state_shapes(parameter.shape)}
    return {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}


def _require_shapes(
    name: str, state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    again = "start the stage again with --no-resume"
    if odd := sorted(set(state) ^ set(expected)):
        raise CheckpointError(
            f"optimizer state {name}::{odd[0]}: the state is another optimizer's; {again}"
        )
    for field, shape in expected.items():
        if tuple(state[field].shape) != shape:
            raise CheckpointError(
                f"optimizer state {name}::{field}: shape {tuple(state[field].shape)}, expected "
                f"{shape}; {again}"
            )


def parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the trained parameters, in the optimizer's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in its order."""
    by_identity = {id(parameter): name for name, parameter in replicas.trained(model).items()}
    return [by_identity[id(parameter)] for parameter in parameters(optimizer)]
