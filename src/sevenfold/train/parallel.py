"""Several processes, one GPU each: start, shard with FSDP2, sum, gather."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sevenfold.base.errors import SevenfoldError
from sevenfold.base.hardware import training_device
from sevenfold.train import optimizer as optimizers

# How long the other processes have to save or give up after one has failed.
GRACE_S = 60.0
# Processes that are to start again wait in an exchange: nothing but a checkpoint can be under way.
START_AGAIN_S = 30.0

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one process that writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Add ``values`` up over all processes."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            dist.barrier()


def num_processes_to_start() -> int:
    """Processes a training script should start: one per visible GPU, unless started already."""
    if "WORLD_SIZE" in os.environ or not torch.cuda.is_available():
        return 1
    return torch.cuda.device_count()


class StartAgainError(SevenfoldError):
    """All processes have to start again together, from the last checkpoint."""

    exit_code = 76


def start_again_if_several(processes: Processes, micro_batch: int) -> None:
    """End this process if it is one of several, which cannot do a step again on its own.

    The others wait in the middle of an exchange that this one has left. Each starts again from
    the last checkpoint and finds the smaller micro-batch, and from which step on, in
    ``recovery.json``.

    Errors:
        StartAgainError: there are several processes.
    """
    if processes.world > 1:
        raise StartAgainError(
            f"process {processes.rank} of {processes.world} ran out of memory; all start again "
            f"from the last checkpoint, from this step on with micro-batch {micro_batch}: under "
            "torchrun, run the same command again"
        )


def launch(arguments: list[str], num_processes: int) -> int:
    """Run ``python arguments`` once per process on this host; return 0 or the first bad exit code.

    When one process fails, the others are asked to stop, and ended after a grace. SIGTERM is
    passed on to all of them. They are started anew as often as one of them asks for that.
    """
    while (code := _launch_once(arguments, num_processes)) == StartAgainError.exit_code:
        log.warning("starting all %d processes again", num_processes)
    return code


def _launch_once(arguments: list[str], num_processes: int) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
    }
    children = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        return _first_failure(children)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for child in children:
            child.kill()
            child.wait()


def _first_failure(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes, or for one to fail and then for the others as long as is fair."""
    failure, deadline_s = 0, math.inf
    while time.monotonic() < deadline_s:
        codes = [child.poll() for child in children]
        if None not in codes:
            break
        if any(codes) and not failure:
            failure = next(code for code in codes if code)
            patience_s = START_AGAIN_S if failure == StartAgainError.exit_code else GRACE_S
            deadline_s = time.monotonic() + patience_s
            for child in children:
                child.terminate()
        time.sleep(0.1)
    ended = [child.returncode for child in children if child.returncode]
    if StartAgainError.exit_code in ended:
        return StartAgainError.exit_code
    return failure or next(iter(ended), 0)


def join() -> Processes:
    """Join the processes that torchrun started; alone, return a world of one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = training_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return Processes(rank=0, world=1, device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank=dist.get_rank(), world=world, device=device)


def shard(scorer: nn.Module, layers: list[nn.Module], processes: Processes, *, bf16: bool) -> None:
    """Shard parameters, gradients and optimizer state over all processes with FSDP2."""
    if processes.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute = torch.bfloat16 if bf16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(scorer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def gather_model(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return all parameters and buffers whole, on the CPU of the main process."""
    if processes.world == 1:
        return dict(model.state_dict())
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered: dict[str, Any] = get_model_state_dict(model, options=options)
    return gathered


def scatter_model(model: nn.Module, state: dict[str, Tensor], processes: Processes) -> None:
    """Load whole tensors, held by every process, into a possibly sharded model.

    Weights that ``state`` does not name (frozen ones) stay as they are.
    """
    if processes.world == 1:
        model.load_state_dict(state, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)


def gather_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> dict[str, Tensor]:
    """Return the optimizer's state as whole, flat tensors."""
    names = optimizers.parameter_names(model, optimizer)
    if processes.world == 1:
        return optimizers.flatten_state(names, optimizer)
    flat = {}
    for name, parameter in zip(names, optimizers.parameters(optimizer), strict=True):
        for field, value in optimizer.state.get(parameter, {}).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            flat[f"{name}::{field}"] = whole.detach().cpu()
    return flat


def scatter_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    flat: dict[str, Tensor],
    processes: Processes,
) -> None:
    """Load what :func:`gather_optimizer` returned, held by every process."""
    names = optimizers.parameter_names(model, optimizer)
    if processes.world > 1:
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = dict(zip(names, optimizers.parameters(optimizer), strict=True))
        for key, value in flat.items():
            parameter = parameters.get(key.split("::")[0])
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = value.to(processes.device)
                flat[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    optimizers.restore_state(names, optimizer, flat)
