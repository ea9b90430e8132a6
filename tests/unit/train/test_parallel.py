"""Two gloo processes with FSDP2 train the same model as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sevenfold.base.storage import JsonLines
from sevenfold.train.parallel import launch

REPOSITORY = Path(__file__).parents[3]


def train(folder: Path, num_processes: int) -> list[float]:
    arguments = ["-m", "tests.unit.train.several_processes", str(folder)]
    if num_processes == 1:
        subprocess.run([sys.executable, *arguments], check=True, timeout=300)
    else:
        assert launch(arguments, num_processes) == 0
    rows = JsonLines(folder / "metrics.jsonl").read()
    return [row["loss"] for row in rows if "event" not in row]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children import the package and the tests from here."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY / 'src'}:{REPOSITORY}")


@pytest.mark.parametrize("code", [6, 75])
def test_the_exit_code_of_the_first_to_fail_is_returned(code: int) -> None:
    script = (
        f"import os, sys, time; sys.exit({code}) if os.environ['RANK'] == '1' else time.sleep(60)"
    )
    assert launch(["-c", script], 2) == code


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
