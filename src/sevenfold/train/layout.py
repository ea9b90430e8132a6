"""How several GPUs hold one model: whole weights in each, a copy on each node, or shares of one.

What memory has room for is asked of the planner, by training and by everything that plans it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sevenfold.base.hardware import GPUInfo
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Demand, Precision

# The share of a GPU's memory that may be planned for: beyond it layers give their gathered weights
# back between forward and backward, and nodes hold shares of one model instead of a copy each.
# Exchanges take memory, too, which no plan counts: it is not PyTorch's.
PLANNED_SHARE = 0.9


def precision_on(
    config: TrainConfig,
    gpu: GPUInfo,
    *,
    num_gpus: int,
    per_node: int | None = None,
    compares: bool = False,
) -> Precision:
    """Return what a stage's precision comes to on ``num_gpus`` of a kind, in nodes of ``per_node``.

    ``auto`` is what the kind is best at; FP8 is ours where GPUs may keep whole weights. A stage
    that ``compares`` with scores from before takes torchao's, which depends on what is computed
    together, only where FP8 is asked for.
    """
    found = config.precision
    if found == "auto":
        found = "fp8" if gpu["supports_fp8"] else "bf16" if gpu["num_gpus"] else "fp32"
    if found == "fp8" and num_gpus > 1 and not _may_keep_whole(config, found, num_gpus, per_node):
        return "bf16" if compares and config.precision == "auto" else "fp8_torchao"
    return found


def _may_keep_whole(
    config: TrainConfig, precision: Precision, num_gpus: int, per_node: int | None
) -> bool:
    """Within a node, and where weights need no autocast, which several processes do without."""
    mixed = config.weights == "fp32" and precision != "fp32"
    return per_node in (None, num_gpus) and not mixed


def lay_out(demand: Demand, *, memory_gib: float, agree: Callable[[bool], bool] = bool) -> Demand:
    """Return ``demand`` as its GPUs, of ``memory_gib`` each, hold the model.

    Each keeps whole weights and updates a share of them; or each node holds a copy of its own; or
    all share one. Of shared layers, weights stay gathered from forward to backward. Each of these
    where the planned peak leaves room for it; our FP8 is not sharded, so it is not asked.

    Args:
        demand: what is asked of each GPU, however it was laid out before.
        memory_gib: what a GPU has.
        agree: lets all processes decide alike; True if all have room.
    """
    demand = dataclasses.replace(demand, replicated=False, copies=1, stays_gathered=False)
    num_gpus, per_node = demand.world_size, demand.per_node or demand.world_size
    if num_gpus == 1:
        return demand

    def fits(asked: Demand) -> bool:
        return agree(asked.peak_gib <= PLANNED_SHARE * memory_gib)

    if _may_keep_whole(demand.train, demand.precision, num_gpus, per_node):
        whole = dataclasses.replace(demand, replicated=True)
        if demand.precision == "fp8" or fits(whole):
            return whole
    if 1 < per_node < num_gpus:
        copied = dataclasses.replace(demand, copies=num_gpus // per_node)
        demand = copied if fits(copied) else demand
    gathered = dataclasses.replace(demand, stays_gathered=True)
    return gathered if fits(gathered) else demand


def in_words(demand: Demand) -> str:
    """Say how several GPUs hold the model; nothing of one GPU."""
    if demand.world_size == 1:
        return ""
    if demand.replicated:
        return "whole weights on each"
    shared = "one copy a node" if demand.copies > 1 else "shared by all"
    return f"{shared}, gathered {'once' if demand.stays_gathered else 'twice'} a pass"
