"""How several GPUs hold one model: what memory has room for, decided alike by all that ask."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.unit.train.test_planner import BIG, H100, TRAIN

from sevenfold.train import layout
from sevenfold.train.config import TrainConfig
from sevenfold.train.layout import in_words, lay_out, precision_on
from sevenfold.train.memory import Demand


def demand(nodes: int, per_node: int, rows: int, **changes: Any) -> Demand:
    return Demand(
        **{
            "model": BIG,
            "train": dataclasses.replace(TRAIN, micro_batch=rows),
            "precision": "bf16",
            "world_size": nodes * per_node,
            "per_node": per_node,
            "loss_kernel": "cce",
            **changes,
        }
    )


def with_weights(weights: Any) -> TrainConfig:
    kind: Any = "adamw" if weights == "fp32" else TRAIN.optimizer.kind
    optimizer = dataclasses.replace(TRAIN.optimizer, kind=kind)
    return dataclasses.replace(TRAIN, weights=weights, optimizer=optimizer)


@pytest.mark.parametrize(
    ("nodes", "per_node", "memory_gib", "rows", "expected"),
    [
        (1, 2, 140, 8, (1, True)),
        (1, 2, 80, 4, (1, True)),
        (1, 2, 80, 5, (1, False)),
        (1, 8, 80, 2, (1, True)),
        (2, 8, 80, 2, (2, True)),
        (4, 8, 40, 1, (4, True)),
        (4, 8, 40, 3, (4, False)),
        (4, 2, 44, 1, (4, False)),
        (4, 2, 40, 1, (1, True)),  # 32.2 GiB, and 6.9 that sums of gradients take more in fp32
        (4, 2, 40, 2, (1, False)),
        (4, 1, 80, 2, (1, True)),
        (4, 1, 140, 2, (1, True)),  # a copy each would have room, but nothing would be shared
    ],
)
def test_memory_decides_how_the_7b_is_shared_out(
    nodes: int,
    per_node: int,
    memory_gib: float,
    rows: int,
    expected: tuple[int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy on each node where a node's GPUs have room for it, and layers gathered once."""
    monkeypatch.setattr(layout, "_may_keep_whole", lambda *_: False)
    found = lay_out(demand(nodes, per_node, rows), memory_gib=memory_gib)
    assert (found.copies, found.stays_gathered) == expected
    assert not found.replicated
    # However it was laid out before, it is asked anew.
    assert lay_out(found, memory_gib=memory_gib) == found
    # Where one process sees no room, none takes it.
    apart = lay_out(found, memory_gib=memory_gib, agree=lambda wish: False)
    assert (apart.copies, apart.stays_gathered) == (1, False)


@pytest.mark.parametrize(
    ("nodes", "weights", "precision", "memory_gib", "expected"),
    [
        (1, "bf16", "bf16", 60, True),
        (1, "bf16", "bf16", 57, False),
        (1, "bf16", "fp8", 57, True),
        (1, "fp32", "bf16", 140, False),
        (2, "bf16", "bf16", 140, False),
    ],
)
def test_gpus_of_one_node_keep_whole_weights_where_they_fit(
    nodes: int, weights: Any, precision: Any, memory_gib: float, expected: bool
) -> None:
    """A 7B's 2 rows on each of two GPUs: 52.5 GiB planned, of which 90 % of 60 have room."""
    asked = demand(
        nodes,
        2 // nodes,
        2,
        train=with_weights(weights),
        precision=precision,
        loss_kernel="chunked",
    )
    found = lay_out(asked, memory_gib=memory_gib)
    assert found.replicated is expected
    # Alone there is nothing to lay out.
    assert not lay_out(dataclasses.replace(found, world_size=1), memory_gib=140).replicated


@pytest.mark.parametrize(
    ("asked", "weights", "num_gpus", "per_node", "expected"),
    [
        ("auto", "bf16", 8, 8, "fp8"),
        ("fp8", "bf16", 8, None, "fp8"),
        ("auto", "bf16", 16, 8, "fp8_torchao"),
        ("auto", "fp32", 8, 8, "fp8_torchao"),
        ("auto", "fp32", 1, 1, "fp8"),
        ("bf16", "bf16", 8, 8, "bf16"),
    ],
)
def test_which_fp8_several_gpus_train(
    asked: Any, weights: Any, num_gpus: int, per_node: int | None, expected: str
) -> None:
    train = dataclasses.replace(with_weights(weights), precision=asked)
    assert precision_on(train, H100, num_gpus=num_gpus, per_node=per_node) == expected
    found = precision_on(train, H100, num_gpus=num_gpus, per_node=per_node, compares=True)
    assert found == (expected if expected != "fp8_torchao" else "bf16")


def test_in_words() -> None:
    words = [
        in_words(lay_out(demand(nodes, per_node, rows), memory_gib=memory_gib))
        for nodes, per_node, memory_gib, rows in (
            (1, 1, 80, 2),
            (1, 8, 80, 2),
            (2, 8, 80, 2),
            (1, 2, 44, 2),
        )
    ]
    assert words == [
        "",
        "whole weights on each",
        "one copy a node, gathered once a pass",
        "shared by all, gathered twice a pass",
    ]


def test_what_is_planned_for_leaves_a_tenth_of_memory() -> None:
    asked = demand(1, 2, 2)
    peak_gib = dataclasses.replace(asked, replicated=True).peak_gib
    room_gib = peak_gib / layout.PLANNED_SHARE
    assert lay_out(asked, memory_gib=room_gib + 0.1).replicated
    assert not lay_out(asked, memory_gib=room_gib - 0.1).replicated
