"""Several processes, one GPU each: join, shard with FSDP2, sum, gather."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import training_device
from sevenfold.model import float8
from sevenfold.train import optimizer as optimizers
from sevenfold.train import replicas
from sevenfold.train.config import TrainConfig

log = logging.getLogger(__name__)
T = TypeVar("T")
# How long processes wait for each other without a word, and their launcher for a word of any. The
# first step of a compiled model can take minutes; the 7B's took 45 s alone on an H100.
PATIENCE_S = 1800.0
PATIENCE_VARIABLE = "SEVENFOLD_PATIENCE_S"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together; ``per_node`` of them run on each host."""

    rank: int
    world: int
    device: torch.device
    per_node: int = 1

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

    def agree(self, wish: bool) -> bool:
        """Return True if all processes wish it."""
        return self.sum([float(wish)]) == [float(self.world)]

    def first_difference(self, facts: Mapping[str, str]) -> str | None:
        """Return the first of these facts that is not the same in all processes, None if none."""
        if self.world == 1:
            return None
        names = sorted(facts)
        if self._differ([_number(repr(names))])[0]:
            return "the settings there are"
        values = self._differ([_number(facts[name]) for name in names])
        return next((name for name, differs in zip(names, values, strict=True) if differs), None)

    def _differ(self, values: list[float]) -> list[bool]:
        highest = torch.tensor(values, dtype=torch.float64, device=self.device)
        lowest = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return [bool(differs) for differs in highest != lowest]


def _number(text: str) -> float:
    """Return 48 bits of a text's SHA-256, a whole number that a double holds exactly."""
    return float(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))


def join() -> Processes:
    """Join the processes that torchrun started; alone, return a world of one.

    Errors:
        UsageError: they do not meet, there are too few GPUs, SEVENFOLD_PATIENCE_S is not a number
            of seconds, LOCAL_WORLD_SIZE does not say how many run on each node, or LOCAL_RANK which
            of its GPUs is whose.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = training_device(_local_rank(world))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return Processes(rank=0, world=1, device=device)
    meets = not dist.is_initialized()
    if meets:
        _meet(world, device)
    per_node = os.environ.get("LOCAL_WORLD_SIZE", "")
    counts = per_node.isdecimal() and int(per_node) > 0 and world % int(per_node) == 0
    joined = Processes(
        rank=dist.get_rank(), world=world, device=device, per_node=int(per_node) if counts else 1
    )
    # Taken for one node, several would keep whole weights on each GPU and exchange them over the
    # network; of nodes that count otherwise, each would share the model out in its own way.
    differs = meets and joined.first_difference({"LOCAL_WORLD_SIZE": per_node})
    if differs or not counts:
        raise UsageError(
            f"LOCAL_WORLD_SIZE '{per_node}': of {world} processes (WORLD_SIZE), as many must run "
            "on each node, and this must say how many; torchrun and scripts/slurm_train.sbatch "
            "set it"
        )
    return joined


def _local_rank(world: int) -> int:
    num_gpus = torch.cuda.device_count()
    text = os.environ.get("LOCAL_RANK", "" if world > 1 and num_gpus > 1 else "0")
    if not text.isdecimal():
        raise UsageError(
            f"LOCAL_RANK '{text}': {num_gpus} GPUs are visible to one of {world} processes, and "
            "this must say which one is its own, counted from 0 on each node; torchrun and "
            "scripts/slurm_train.sbatch set it"
        )
    return int(text)


def _meet(world: int, device: torch.device) -> None:
    _require_address(os.environ.get("MASTER_ADDR", ""))
    # Before they meet, the first may have to measure a model from outside; NCCL's own ten minutes
    # can be too few.
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A launcher of less patience ends them itself, and says what each was doing.
    timeout = timedelta(seconds=max(PATIENCE_S, patience_of_user()))
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (ValueError, dist.DistError) as error:
        raise UsageError(
            f"WORLD_SIZE {world}: the processes do not meet ({str(error).splitlines()[0]}); each "
            "needs RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and a free MASTER_PORT, as "
            "torchrun and scripts/slurm_train.sbatch set them"
        ) from None


def patience_of_user() -> float:
    """Return how long to wait without a word, in seconds: SEVENFOLD_PATIENCE_S where it is set.

    Errors:
        UsageError: it is not a number of seconds.
    """
    text = os.environ.get(PATIENCE_VARIABLE, str(PATIENCE_S))
    try:
        found_s = float(text)
    except ValueError:
        found_s = 0.0
    if not 0 < found_s < math.inf:
        raise UsageError(f"{PATIENCE_VARIABLE}: '{text}' is not a number of seconds above 0")
    return found_s


def _require_address(host: str) -> None:
    """Refuse a meeting place that no name server knows; PyTorch would ask for it for minutes."""
    try:
        socket.getaddrinfo(host or None, 0)
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR '{host}': no such host ({error.strerror}); name the first node, or let "
            "Sevenfold start the processes of one node itself"
        ) from None


def autocast(config: TrainConfig, processes: Processes) -> AbstractContextManager[Any]:
    """Compute in bf16 where weights are kept in fp32 on a single GPU; FSDP2 casts itself."""
    mixed = config.weights == "fp32" and config.precision in ("bf16", "fp8", "fp8_torchao")
    if mixed and processes.world == 1:
        return torch.autocast(processes.device.type, dtype=torch.bfloat16)
    return nullcontext()


def shard(
    scorer: nn.Module,
    layers: list[nn.Module],
    processes: Processes,
    *,
    bf16: bool,
    keep_whole: bool = False,
    num_copies: int = 1,
) -> None:
    """Shard parameters, gradients and optimizer state over all processes with FSDP2.

    ``keep_whole`` keeps a layer's gathered weights from forward to backward, where memory allows:
    half as many are gathered. Of ``num_copies``, each is sharded over that share of the processes,
    neighbours by rank, and only sums of gradients pass between them. Gradients are summed in fp32.
    Where the main process alone has weights and others are on the meta device, all get its own.
    """
    if processes.world == 1:
        return
    empty = _is_empty_somewhere(scorer, processes)
    whole = dict(scorer.state_dict()) if empty and processes.is_main else {}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute = torch.bfloat16 if bf16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    shape = (num_copies, processes.world // num_copies)
    first = 0 if num_copies > 1 else 1
    mesh = init_device_mesh(
        processes.device.type, shape[first:], mesh_dim_names=("copies", "shards")[first:]
    )
    sharded: list[Any] = [
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_whole)
        for layer in layers
    ]
    root: Any = fully_shard(scorer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # Asked for one layer ahead, so that a late process does not leave the GPU without weights.
    for module, following in itertools.pairwise([root, *sharded]):
        module.set_modules_to_forward_prefetch([following])
    if processes.is_main:
        kept = "stay gathered" if keep_whole else "are gathered again for the backward pass"
        log.info(
            "%d processes, copies of the model: %d; layers %s", processes.world, num_copies, kept
        )
    if empty:
        _fill(scorer, whole, processes)
    float8.scale_sharded_weights(scorer)


def replicate(scorer: nn.Module, processes: Processes) -> None:
    """Keep whole weights in every process, each of which updates its share; see `replicas`.

    Where the main process alone has weights and others are on the meta device, all get its own.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(processes.device.type, (processes.world,), mesh_dim_names=("shards",))
    if _is_empty_somewhere(scorer, processes):
        _make_room(scorer, processes)
        scorer.to(processes.device)
        for parameter in scorer.parameters():
            dist.broadcast(parameter.detach(), 0)
        _fill_the_rest(scorer, processes)
    replicas.share_out(scorer, mesh)
    if processes.is_main:
        log.info("%d processes with whole weights, which share the update out", processes.world)


def _is_empty_somewhere(model: nn.Module, processes: Processes) -> bool:
    return processes.sum([float(any(p.is_meta for p in model.parameters()))])[0] > 0


def _make_room(model: nn.Module, processes: Processes) -> None:
    """Put weights that are on the meta device, if they are, onto this process's, without values."""
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=processes.device)
        for module in model.modules():  # tied weights are two empty ones now
            if callable(tie := getattr(module, "tie_weights", None)):
                tie()


def _fill_the_rest(model: nn.Module, processes: Processes) -> None:
    """Give all processes the main one's buffers and its random state."""
    for buffer in model.buffers():
        # As bytes where they are some: not everything that exchanges numbers knows FP8.
        dist.broadcast(buffer.view(torch.uint8) if buffer.itemsize == 1 else buffer, 0)
    random = torch.get_rng_state().to(processes.device)
    dist.broadcast(random, 0)
    torch.set_rng_state(random.cpu())


def _fill(model: nn.Module, whole: dict[str, Tensor], processes: Processes) -> None:
    """Give all processes their shares of the main process's weights, and its random state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    _make_room(model, processes)
    plain: dict[str, Any] = {name: float8.plain(tensor) for name, tensor in whole.items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, plain, options=options)
    _fill_the_rest(model, processes)


def exchanging_once(model: Any, micro_batches: Iterable[T]) -> Iterator[T]:
    """Let copies of a model sum their gradients with or after a step's last micro-batch only."""
    all_of_them = list(micro_batches)
    for number, each in enumerate(all_of_them, 1):
        if hasattr(model, "set_requires_all_reduce"):
            model.set_requires_all_reduce(number == len(all_of_them))
        yield each
    replicas.exchange(model)


def num_averaged(model: nn.Module, processes: Processes) -> int:
    """Return over how many processes gradients are averaged; those of whole weights are summed.

    So these are as large as in one process, and FP8 goes on with the scales of another number.
    """
    return 1 if processes.world == 1 or is_whole(model) else processes.world


def is_whole(model: nn.Module) -> bool:
    """Whether this process has all rows of all weights."""
    return not any(hasattr(parameter, "to_local") for parameter in model.parameters())


def not_finite(tensors: Mapping[str, Any], processes: Processes) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity in any process."""
    parts = (t.to_local() if hasattr(t, "to_local") else t for t in tensors.values())
    flags = processes.sum([float(not torch.isfinite(part).all()) for part in parts])
    return [name for name, bad in zip(tensors, flags, strict=True) if bad]


def gather_model(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return all parameters and buffers whole; sharded ones on the CPU of the main process."""
    if processes.world == 1 or is_whole(model):
        return dict(model.state_dict())
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered: dict[str, Any] = get_model_state_dict(model, options=options)
    return gathered


def scatter_model(model: nn.Module, state: dict[str, Tensor], processes: Processes) -> None:
    """Load whole tensors, held by every process, into a possibly sharded model.

    Weights that ``state`` does not name (frozen ones) stay as they are.
    """
    if processes.world == 1 or is_whole(model):
        model.load_state_dict(state, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)
    float8.scale_sharded_weights(model)


def gather_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> dict[str, Tensor]:
    """Return the optimizer's state as whole, flat tensors; sharded ones in the main process."""
    flat = optimizers.flatten_state(optimizers.parameter_names(model, optimizer), optimizer)
    if processes.world == 1:
        return flat
    gathered = {}
    for key, value in flat.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if processes.is_main:  # nobody else's main memory need hold them
            gathered[key] = whole.detach().cpu()
        del whole  # a GPU need not have room for two, let alone all, beside whole weights
    return gathered


def scatter_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    flat: dict[str, Tensor],
    processes: Processes,
) -> None:
    """Load what :func:`gather_optimizer` returned to the main process, held by every one."""
    names = optimizers.parameter_names(model, optimizer)
    if processes.world > 1:
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = dict(zip(names, optimizers.parameters(optimizer), strict=True))
        for key, value in flat.items():
            parameter = parameters.get(key.split("::")[0])
            if isinstance(parameter, DTensor) and value.ndim == parameter.ndim:
                value = value.to(processes.device)
                flat[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    optimizers.restore_state(names, optimizer, flat)
