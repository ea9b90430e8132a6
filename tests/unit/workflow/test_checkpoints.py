"""``sevenfold checkpoints``: what is listed, checked, deleted, and what never is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sevenfold.base import storage
from sevenfold.base.records import Run, write_run
from sevenfold.train.checkpoint import Checkpoints, Snapshot
from sevenfold.workflow import cli


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})
    kept = Checkpoints(made.stage("sft") / "checkpoints", keep=9)
    for step, loss in ((10, 2.5), (20, 1.5), (30, 1.75)):
        kept.save(
            Snapshot(
                step=step,
                model={"weight": torch.zeros(2**16)},
                optimizer={},
                random={},
                state={"validation_loss": loss},
            )
        )
    kept.finish()
    return made


def folder(run: Run, step: int) -> Path:
    return run.stage("sft") / "checkpoints" / f"step-{step:08d}"


def spoil(run: Run, step: int) -> None:
    path = folder(run, step) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def names(run: Run) -> list[str]:
    return sorted(path.name[-2:] for path in (run.stage("sft") / "checkpoints").iterdir())


def test_they_are_listed_with_size_and_held_out_loss(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(run, 10).rename(folder(run, 10).with_name("damaged-step-00000010"))
    assert cli.execute(["checkpoints", str(run.folder)]) == 0
    lines = capsys.readouterr().out.split("\n")
    (best,) = (line for line in lines if "best" in line)
    assert "step 20" in best
    assert "1.5000" in best
    assert any("step 10" in line and "damaged, set aside" in line for line in lines)
    assert any("step 30" in line and "1.7500" in line for line in lines)


def test_verify_names_what_is_damaged(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["checkpoints", str(run.folder), "--verify"]) == 0
    assert "3 checkpoints, every byte as written" in capsys.readouterr().out
    spoil(run, 20)
    assert cli.execute(["checkpoints", str(run.folder), "--verify"]) == 5
    told = capsys.readouterr().err
    assert "1 damaged: " in told
    assert "step-00000020/model.safetensors" in told
    assert "--prune N deletes the damaged" in told
    assert names(run) == ["10", "20", "30"]


@pytest.mark.fault("B11")
def test_prune_counts_good_ones_only(run: Run) -> None:
    spoil(run, 30)
    assert cli.execute(["checkpoints", str(run.folder), "--prune", "1"]) == 0
    assert names(run) == ["20"]


@pytest.mark.fault("B11")
def test_where_none_is_good_nothing_is_deleted(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20, 30):
        spoil(run, step)
    (folder(run, 10) / storage.MANIFEST).unlink()
    assert cli.execute(["checkpoints", str(run.folder), "--prune", "1"]) == 5
    assert "not one good checkpoint; nothing was deleted" in capsys.readouterr().err
    assert names(run) == ["10", "20", "30"]


@pytest.mark.fault("B11")
@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_at_least_one_is_kept(run: Run, capsys: pytest.CaptureFixture[str], number: str) -> None:
    assert cli.execute(["checkpoints", str(run.folder), "--prune", number]) == 2
    assert "is not a whole number above 0" in capsys.readouterr().err


def test_nothing_is_deleted_under_a_run_that_is_being_worked_on(run: Run) -> None:
    with storage.lock_run(run.folder):
        assert cli.execute(["checkpoints", str(run.folder), "--prune", "1"]) == 8
        assert cli.execute(["checkpoints", str(run.folder)]) == 0
    assert names(run) == ["10", "20", "30"]
