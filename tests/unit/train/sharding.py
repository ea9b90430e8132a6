"""Four processes, as two nodes of two, train a toy model whole and sharded; see test_sharding."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sevenfold.model import float8
from sevenfold.train import adamw_8bit, checkpoint, parallel, replicas
from sevenfold.train import optimizer as optimizers
from sevenfold.train.config import OptimizerConfig

# Five rows are not as many in each of four processes: the last has none.
STEPS, MICRO_BATCHES, WIDTH, INNER, OUT = 3, 2, 256, 32, 5


class Layer(nn.Module):
    """An MLP beside the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = values + self.down(nn.functional.silu(self.up(values)))
        return found


class Toy(nn.Module):
    """Two layers and a head, whose loss is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, OUT)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers:
            values = layer(values)
        found: Tensor = self.head(values).float().square().sum()
        return found


def make_optimizer(model: nn.Module, kind: Any) -> torch.optim.Optimizer:
    config = OptimizerConfig(
        kind=kind, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
    )
    made = optimizers.make_optimizer(model, config)
    optimizers.set_learning_rate(made, 0.01)
    return made


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, processes: parallel.Processes
) -> dict[str, list[float]]:
    """Train as the loop does; return losses, gradients' norms and how far these are off."""
    losses, off, norms, parameters = [], [], [], list(replicas.trained(model).values())
    factor = parallel.num_averaged(model, processes) / 1000
    for _ in range(STEPS):
        total = 0.0
        for row in parallel.exchanging_once(model, rows):
            loss = model(row)
            (loss * factor).backward()
            total += float(loss.detach())
        norm, number = optimizers.gradient_norm(parameters)
        whole = [getattr(p.grad, "full_tensor", lambda found=p.grad: found)() for p in parameters]
        exact = torch.cat([gradient.double().flatten() for gradient in whole]).norm()
        off.append(abs(number / float(exact) - 1))
        norms.append(number)
        optimizers.clip_gradients(optimizer, 1.0, norm)
        optimizers.update(optimizer, model)
        optimizer.zero_grad(set_to_none=True)
        losses += processes.sum([total])
    return {"losses": losses, "off": off, "norms": norms}


def to_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the main process's tensors."""
    copies = [{name: tensor.clone() for name, tensor in tensors.items()}]
    dist.broadcast_object_list(copies)
    return copies[0]


def digest_of_share(model: nn.Module) -> str:
    return checkpoint.digest({n: adamw_8bit._local(p) for n, p in model.state_dict().items()})


def to_float8(model: nn.Module, *, replicated: bool, sharded: bool) -> None:
    if replicated:
        float8.convert_to_float8(model, emulate=True)
    else:
        float8.convert_with_torchao(model, emulate=True, sharded=sharded)


def compare(
    processes: parallel.Processes,
    *,
    num_copies: int = 1,
    replicated: bool = False,
    keep_whole: bool = False,
    in_fp8: bool = False,
    kind: str = "adamw",
    bf16: bool = False,
) -> dict[str, Any]:
    """Return what one process and all of them come to from the same weights and rows.

    Then what they have gathered is shared out to other sharded weights, which must go on alike.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(0)
    whole, later = Toy().to(dtype), Toy().to(dtype)
    sharded = copy.deepcopy(whole)
    for each in (whole, sharded, later):
        if in_fp8:
            to_float8(each, replicated=replicated, sharded=each is not whole)
    for each in (sharded, later):
        if replicated:
            parallel.replicate(each, processes)
        else:
            how = {"bf16": bf16, "keep_whole": keep_whole, "num_copies": num_copies}
            parallel.shard(each, list(each.layers), processes, **how)
    rows = torch.randn(processes.world * MICRO_BATCHES, 4, WIDTH, dtype=dtype)
    own = rows[processes.rank :: processes.world]
    alone = parallel.Processes(rank=0, world=1, device=processes.device)
    expected = train(whole, make_optimizer(whole, kind), rows, alone)
    optimizer = make_optimizer(sharded, kind)
    EXCHANGES.clear()
    found = train(sharded, optimizer, own, processes)
    num_exchanges = len(EXCHANGES)
    parts: list[Any] = [None] * processes.world
    dist.all_gather_object(parts, digest_of_share(sharded))
    gathered = to_all(parallel.gather_model(sharded, processes))
    taken = parallel.gather_optimizer(sharded, optimizer, processes)
    only_main = processes.agree(bool(taken) == processes.is_main)
    moments = to_all(taken)
    other = make_optimizer(later, kind)
    parallel.scatter_model(later, gathered, processes)
    parallel.scatter_optimizer(later, other, dict(moments), processes)
    again = parallel.gather_optimizer(later, other, processes)
    torch.manual_seed(1)
    on = train(sharded, optimizer, own, processes)
    torch.manual_seed(1)
    other_on = train(later, other, own, processes)
    return {
        **{name: [expected[name], found[name]] for name in expected},
        "weights": [float((gathered[n] - t).abs().max()) for n, t in whole.state_dict().items()],
        "parts": parts,
        "same_moments": processes.agree(
            only_main and all(torch.equal(value, moments[name]) for name, value in again.items())
        ),
        "later": [on, other_on],
        "num_exchanges": num_exchanges,
        "differing": processes.first_difference({"norms": repr(found["norms"])}),
    }


class Tied(Toy):
    """Reads and writes with the same matrix, and has a buffer that no state holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(OUT, WIDTH)
        self.register_buffer("factors", torch.rand(WIDTH), persistent=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.table(ids) * self.factors)


def fill(
    processes: parallel.Processes, *, in_fp8: bool, replicated: bool = False
) -> dict[str, Any]:
    """Return whether weights that one process draws are all processes' after sharding."""
    torch.manual_seed(0)
    expected = Tied()
    following = torch.get_rng_state()
    torch.manual_seed(0 if processes.is_main else 9)
    with torch.device("cpu" if processes.is_main else "meta"):
        model = Tied()
    if in_fp8:
        for each in (expected, model):
            to_float8(each, replicated=replicated, sharded=each is model)
    if replicated:
        parallel.replicate(model, processes)
    else:
        parallel.shard(model, list(model.layers), processes, bf16=False, num_copies=2)
    ids = torch.arange(OUT)[None]
    gathered = parallel.gather_model(model, processes)
    return {
        "losses": [float(each(ids).detach()) for each in (expected, model)],
        "tied": model.head.weight is model.table.weight,
        "same_random_state": processes.agree(torch.equal(torch.get_rng_state(), following)),
        "same_weights": not processes.is_main
        or all(torch.equal(gathered[n], value) for n, value in expected.state_dict().items()),
    }


def norm_of_one_row(processes: parallel.Processes) -> list[float]:
    """Return the norm of a gradient that lies in the first process alone, and what it should be."""
    model = nn.Linear(4, 1, bias=False)
    parallel.shard(model, [], processes, bf16=False)
    model(torch.full((1, 4), 3.0)).sum().backward()
    _, number = optimizers.gradient_norm(model.parameters())
    return [number, 6.0]


def without_gradients(processes: parallel.Processes) -> dict[str, Any]:
    """Return what weights come to that all processes, the first alone, and none have a part in."""
    torch.manual_seed(0)
    whole = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    shared = copy.deepcopy(whole)
    parallel.replicate(shared, processes)
    state = []
    for model, ranks in ((whole, range(processes.world)), (shared, [processes.rank])):
        optimizer = make_optimizer(model, "adamw")
        for _ in range(2):
            for rank in parallel.exchanging_once(model, ranks):
                values = model[0](torch.full((1, 4), 1.0 + rank))
                (model[1](values) if rank == 0 else values).square().sum().backward()
            optimizers.update(optimizer, model)
            optimizer.zero_grad(set_to_none=True)
        names = optimizers.parameter_names(model, optimizer)
        state.append(sorted(optimizers.flatten_state(names, optimizer)))
    ours = dict(shared.named_parameters())
    off = {n: float((ours[n] - p).abs().max().detach()) for n, p in whole.named_parameters()}
    return {"off": off, "state": state}


EXCHANGES: list[int] = []


def count_exchanges() -> None:
    """Note the sizes of what is summed over processes, or sent to be, but for single numbers.

    Those are rounded otherwise in every group of processes, as by GPUs that sum in other orders.
    """
    inner, send = dist.all_reduce, dist.all_to_all_single

    def sent(received: Tensor, tensor: Tensor, **named: Any) -> Any:
        EXCHANGES.append(tensor.numel())
        return send(received, tensor, **named)

    def counted(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        if tensor.numel() > 100:
            EXCHANGES.append(tensor.numel())
        done = inner(tensor, *arguments, **named)
        if tensor.numel() == 1:
            group = named.get("group") or dist.group.WORLD
            tensor *= 1 + 2**-22 * min(dist.get_process_group_ranks(group))
        return done

    dist.all_reduce, dist.all_to_all_single = counted, sent


def change_uncounted() -> None:
    """Write weights as GPUs do, by our kernels and by NCCL: PyTorch does not count the changes."""
    update, gather = adamw_8bit._apply, replicas._all_gather

    def updated(parameter: Tensor, *arguments: Any) -> None:
        with torch.autograd._unsafe_preserve_version_counter(adamw_8bit._local(parameter)):
            update(parameter, *arguments)

    def gathered(target: Tensor, *arguments: Any) -> None:
        with torch.autograd._unsafe_preserve_version_counter(target):
            gather(target, *arguments)

    adamw_8bit._apply, replicas._all_gather = updated, gathered


def run(target: Path) -> None:
    """Compare every way to shard; the first process writes what it found."""
    count_exchanges()
    change_uncounted()
    processes = parallel.join()
    copies = processes.world // processes.per_node
    found = {
        "in all": compare(processes, num_copies=1),
        "copies": compare(processes, num_copies=copies),
    }
    found["filled, whole"] = fill(processes, in_fp8=True, replicated=True)
    found["whole"] = compare(processes, replicated=True)
    found["whole, fp8"] = compare(
        processes, replicated=True, in_fp8=True, kind="adamw_8bit", bf16=False
    )
    found["whole, bf16"] = compare(processes, replicated=True, kind="adamw_8bit", bf16=True)
    found["without gradients"] = without_gradients(processes)
    found["filled"] = fill(processes, in_fp8=False)
    found["norm of one row"] = norm_of_one_row(processes)
    if "torchao" in sys.argv:
        found["filled in fp8"] = fill(processes, in_fp8=True)
        in_8_bits: dict[str, Any] = {"num_copies": copies, "in_fp8": True, "kind": "adamw_8bit"}
        found["fp8"] = compare(processes, keep_whole=True, **in_8_bits)
        found["fp8 and bf16"] = compare(processes, bf16=True, **in_8_bits)
    if processes.is_main:
        target.write_text(json.dumps(found))


def main(target: Path) -> int:
    """Run in four processes that share what has been imported; return how many failed."""
    if "torchao" in sys.argv:
        importlib.import_module("torchao.float8")
    torch.set_num_threads(1)
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
            try:
                run(target)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
