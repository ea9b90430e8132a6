"""Whole weights on every GPU, of which each updates its share of the rows (ZeRO stage 1).

Everything that is fast on one GPU stays so: FP8 casts weights once a step, gradients are added up
inside products. Processes exchange twice a step: gradients after its last micro-batch, rows of
weights after the update. A share is a DTensor as FSDP2 makes them, so optimizer, norm and
checkpoints see no difference; its memory is the whole weight's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sevenfold.model import float8
from sevenfold.model.remembered import Remembered

SHARE = "share"


def share_out(model: nn.Module, mesh: Any) -> None:
    """Give this process its rows of every trained parameter, on a ``mesh`` of one dimension."""
    for parameter in _trained_wholes(model).values():
        setattr(parameter, SHARE, _share(parameter.detach(), mesh))
    _shared.forget()


def trained(model: nn.Module) -> dict[str, Any]:
    """Return what an optimizer is to change, by name: shares, or parameters that have none."""
    return {name: getattr(p, SHARE, p) for name, p in _trained_wholes(model).items()}


def _trained_wholes(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@Remembered
def _shared(model: nn.Module) -> list[tuple[nn.Parameter, Any]]:
    wholes = _trained_wholes(model).values()
    return [(p, getattr(p, SHARE)) for p in wholes if hasattr(p, SHARE)]


def _share(whole: Tensor, mesh: Any) -> Any:
    """Return this process's rows of ``whole`` as a DTensor; it shares their memory."""
    from torch.distributed.tensor import DTensor, Shard

    most = _most_rows(whole, mesh.size())
    local = whole[most * mesh.get_local_rank() :][:most]
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _most_rows(whole: Tensor, num_shares: int) -> int:
    """Rows of each share but the last ones, which may have fewer or none."""
    return -(-whole.shape[0] // num_shares)


def _padded(whole: Tensor, num_shares: int) -> Tensor:
    """Return ``whole`` itself if all shares have as many rows, else a copy that ends in zeros."""
    if missing := _most_rows(whole, num_shares) * num_shares - whole.shape[0]:
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    return whole


@torch.no_grad()
def exchange(model: nn.Module) -> None:
    """Sum all processes' gradients, each its rows, in fp32; whole gradients are gone then.

    A share's gradient lies where the whole one was, so that it takes no memory of its own. What no
    process has a gradient of is left alone, as by one process. FP8 learns the largest magnitude
    that any process has seen.
    """
    shared = _shared(model)
    trained_here = [whole.grad is not None for whole, _ in shared]
    for whole, share in shared:
        mesh = share.device_mesh
        gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad.contiguous()
        sent = _padded(gradient, mesh.size())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=mesh.get_group())
        share.grad = _share(gradient, mesh)
        own = share.grad.to_local()
        parts = received.unflatten(0, (mesh.size(), -1))
        own.copy_(parts.sum(0, dtype=torch.float32)[: own.shape[0]])
        whole.grad = None
    if shared:
        group = shared[0][1].device_mesh.get_group()
        float8.agree(model, group)
        trained_anywhere = torch.tensor(trained_here, dtype=torch.uint8, device=shared[0][0].device)
        dist.all_reduce(trained_anywhere, dist.ReduceOp.MAX, group=group)
        # A GPU is waited for here once all has been asked of it; the sum of losses, next, would.
        for (_, share), is_trained in zip(shared, trained_anywhere.tolist(), strict=True):
            if not is_trained:
                share.grad = None


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """Put the rows that all processes have updated into the whole weights of each."""
    shared = _shared(model)
    for whole, share in shared:
        mesh = share.device_mesh
        gathered = _padded(whole.detach(), mesh.size())
        # Each sends from where its rows belong, as FSDP2 does, so that nothing is copied.
        own = gathered.chunk(mesh.size())[mesh.get_local_rank()]
        _all_gather(gathered, own, mesh.get_group())
        if gathered.shape != whole.shape:
            whole.copy_(gathered[: whole.shape[0]])
    # Neither an optimizer's step nor an exchange need count as a change; FP8 casts what did.
    torch.autograd.graph.increment_version([whole for whole, _ in shared])


def _all_gather(target: Tensor, own: Tensor, group: Any) -> None:
    # PyTorch 2.13 has given it this name, and warns of the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(target, own, group=group)
