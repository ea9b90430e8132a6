"""Two gloo processes with FSDP2 train the same model as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from sevenfold.base.storage import JsonLines

REPOSITORY = Path(__file__).parents[3]


def train(folder: Path, num_processes: int) -> list[float]:
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={num_processes}"]
    command += ["-m", "tests.unit.train.several_processes", str(folder)]
    subprocess.run(
        command,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}"},
        timeout=300,
    )
    rows = JsonLines(folder / "metrics.jsonl").read()
    return [row["loss"] for row in rows if "event" not in row]


def test_two_processes_equal_one_to_rounding(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", 1)
    together = train(tmp_path / "together", 2)
    assert len(together) == 24
    assert np.allclose(alone, together, rtol=1e-4)


def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", 1)
    steps = JsonLines(tmp_path / "alone" / "metrics.jsonl")
    train(tmp_path / "alone", 1)  # a finished stage does nothing more
    assert len([row for row in steps.read() if "event" not in row]) == 24
    for step in (20, 24):
        folder = tmp_path / "alone" / "checkpoints" / f"step-{step:08d}"
        folder.rename(folder.with_name(f"unused-{step}"))
    resumed = train(tmp_path / "alone", 2)
    assert np.allclose(alone, resumed, rtol=1e-4)
