"""Ways to share a model out over processes come to what one process comes to."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[3]
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
WHOLE = ["whole", "whole, fp8", "whole, bf16"]
# What we call ourselves must not be what PyTorch is about to give up.
OURS = "error:`torch.distributed:FutureWarning"
WAYS = ["in all", "copies", "fp8", "fp8 and bf16", *WHOLE]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sharding.py finds, in four processes on two nodes of two."""
    target = tmp_path_factory.mktemp("sharding") / "found.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = f"{REPOSITORY / 'src'}:{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    sizes = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-W", OURS, "-m", "tests.unit.train.sharding", str(target)]
        + (["torchao"] if HAS_TORCHAO else []),
        env={**os.environ, **meeting, **sizes, "PYTHONPATH": paths},
        cwd=REPOSITORY,
        timeout=240,
        check=True,
    )
    read: dict[str, Any] = json.loads(target.read_text())
    return read


def of(found: dict[str, Any], way: str) -> dict[str, Any]:
    if way.startswith("fp8") and not HAS_TORCHAO:
        pytest.skip("torchao is not installed")
    chosen: dict[str, Any] = found[way]
    return chosen


@pytest.mark.fault("C09")
@pytest.mark.parametrize("way", WAYS)
def test_training_comes_to_what_one_process_comes_to(found: dict[str, Any], way: str) -> None:
    """bf16 weights are rounded by chance, sharded ones by other draws: they agree to per cents."""
    one, several = of(found, way)["losses"]
    by_chance = way in ("fp8 and bf16", "whole, bf16")
    assert np.allclose(one, several, rtol=0.03 if by_chance else 1e-5)
    assert max(of(found, way)["weights"]) < (0.05 if by_chance else 1e-4)
    assert one[-1] < one[0] / 3


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_sharded_gradients_are_exact(found: dict[str, Any], way: str) -> None:
    """Also those of bf16 gradients, of which PyTorch's own norm has three digits."""
    assert max(max(off) for off in of(found, way)["off"]) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_all_judge_a_step_by_the_same_norm(found: dict[str, Any], way: str) -> None:
    """To the last bit, or some would skip a step that others apply."""
    assert of(found, way)["differing"] is None


def test_a_process_without_a_share_knows_the_norm(found: dict[str, Any]) -> None:
    number, expected = found["norm of one row"]
    assert number == expected


@pytest.mark.parametrize("way", WAYS)
def test_every_node_holds_the_same_copy(found: dict[str, Any], way: str) -> None:
    """Also where weights are rounded by chance: what a checkpoint takes is one copy.

    The history of FP8 belongs to it, so all have the same scales.
    """
    first, second, *others = of(found, way)["parts"]
    if way in WHOLE:
        assert {second, *others} == {first}
        return
    assert first != second
    assert (others == [first, second]) == (way != "in all")


@pytest.mark.fault("C09")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_gathered_is_shared_out_again(found: dict[str, Any], way: str) -> None:
    """FP8 casts weights by scales that are to be of the weights that were put back."""
    assert of(found, way)["same_moments"]
    on, other_on = of(found, way)["later"]
    assert on == other_on


@pytest.mark.parametrize("way", WAYS)
def test_copies_exchange_gradients_once_a_step(found: dict[str, Any], way: str) -> None:
    """Two micro-batches a step, three steps, and three parts of the model, or its ten weights."""
    expected = 30 if way in WHOLE else 0 if way == "in all" else 9
    assert of(found, way)["num_exchanges"] == expected


def test_weights_that_no_process_trains_are_left_alone(found: dict[str, Any]) -> None:
    """As one process leaves them, without decay; those that one trains are trained in all."""
    assert max(found["without gradients"]["off"].values()) < 1e-6
    one, several = found["without gradients"]["state"]
    assert one == several
    assert {key.split(".")[0] for key in several} == {"0", "1"}


@pytest.mark.parametrize("way", ["filled", "filled in fp8", "filled, whole"])
def test_weights_of_one_process_are_shared_out_bit_for_bit(found: dict[str, Any], way: str) -> None:
    """The others begin on the meta device, without any, and with another random state."""
    if way not in found:
        pytest.skip("torchao is not installed")
    filled = found[way]
    assert filled["same_weights"]
    assert filled["tied"]
    assert filled["same_random_state"]
    assert np.allclose(*filled["losses"], rtol=1e-6)
