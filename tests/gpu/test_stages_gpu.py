"""Every stage stopped and gone on with on a real GPU, by the command line, as the 7B trains."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.miniature import (
    STAGES,
    fingerprint,
    losses,
    recipe,
    sevenfold,
    without,
    write_gates,
    write_recipe,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WIDER = {"hidden_size": 256, "intermediate_size": 512, "num_kv_heads": 2}
"""Heads of 64, which GPU kernels take."""


def as_the_7b(train: dict[str, Any], optimizer: str = "adamw_8bit") -> dict[str, Any]:
    """Return the settings of a stage with the 7B's weights, optimizer and compiled layers."""
    return {
        **train,
        "precision": "bf16",
        "weights": "bf16",
        "optimizer": {**train["optimizer"], "kind": optimizer},
        "compile": "default",
        "deterministic": True,
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a whole run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    stages = recipe()
    stages["pretrain"] = as_the_7b(stages["pretrain"])
    for stage, optimizer in (("sft", "adamw_8bit"), ("dpo", "adamw_8bit"), ("lora", "adamw")):
        stages[stage]["train"] = as_the_7b(stages[stage]["train"], optimizer)
    config = write_recipe(
        folder,
        **{stage: stages[stage] for stage in STAGES},
        model=stages["model"] | WIDER,
        init=stages["init"] | {"std": 0.02},
        kernels={"liger": "auto", "cce": "auto"},
    )
    done = sevenfold(
        "run",
        "--config",
        config,
        "--run",
        folder / "run",
        "--gates",
        write_gates(folder, limit=9.0),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.fault("C01", "A02", "A05")
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_twice_a_stage_ends_with_the_same_model(
    unbroken: Path, tmp_path: Path, stage: str
) -> None:
    """Killed in step 6 after the checkpoint of step 4, asked to stop in step 7, then let alone."""
    shutil.copytree(unbroken, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    without(run, stage)
    killed = sevenfold(stage, "--run", run, faults="kill@step=6:phase=backward")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stopped = sevenfold(stage, "--run", run, faults="term@step=7:phase=optimizer")
    assert stopped.returncode == 75, stopped.stderr
    again = sevenfold(stage, "--run", run)
    assert again.returncode == 0, again.stderr
    assert "resuming from step 7 of" in again.stdout
    assert losses(run, stage) == losses(unbroken / "run", stage)
    assert fingerprint(run, stage) == fingerprint(unbroken / "run", stage)
    assert json.loads((run / stage / "record.json").read_text())["bit_identical"] is True


def test_dpo_in_compiled_fp8_begins_where_its_reference_is(unbroken: Path, tmp_path: Path) -> None:
    """By the same held scales the same layers round alike, in passes with gradients and without."""
    shutil.copytree(unbroken, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    without(run, "dpo")
    done = sevenfold("dpo", "--run", run, "--fp8", "--set", "dpo.train.log_every=1")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "dpo" / "record.json").read_text())["config"]["precision"] == "fp8"
    first = json.loads((run / "dpo" / "metrics.jsonl").read_text().partition("\n")[0])
    assert abs(first["margin"]) < 1e-4
    assert abs(first["kl"]) < 1e-4
