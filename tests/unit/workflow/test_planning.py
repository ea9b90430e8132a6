"""What `plan` says of a stage: for which machine, what was chosen, and the stage's own choice."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from tests.unit.train.test_planner import CPU, H100

from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model.config import read_model_file
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Demand
from sevenfold.workflow import choosing, planning, rehearsal, row_counts
from sevenfold.workflow import recipe as recipes

NO_GPU = GPUInfo(**{**CPU, "supports_fp8": False, "peak_bf16_tflops": 0.0})


def plan_on(gpu: GPUInfo, stage: str, preset: str = "7b", *changes: str) -> planning.StagePlan:
    run, recipe = recipes.resolve(preset, None, changes, Path("unused"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "detect_gpu_type", lambda: gpu)
        return planning.plan_stage(run, recipe, stage)


def printed(planned: planning.StagePlan, capsys: pytest.CaptureFixture[str]) -> str:
    planning.print_plan(planned)
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_plan_says_for_which_machine_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    there = printed(plan_on(NO_GPU, "pretrain"), capsys)
    assert "planned for │ bf16, one GPU of 80 GB (here is none)" in there
    assert "micro-batches a step │ 32 │" in there
    four = GPUInfo(**{**H100, "num_gpus": 4})
    there = printed(plan_on(four, "pretrain"), capsys)
    assert "planned for │ fp8_torchao, 4 x NVIDIA H100" in there
    assert re.search(r"micro-batches a step │ \d+ on each of 4 GPUs │", there)
    assert "planned for │ fp32, this machine's CPU" in printed(
        plan_on(NO_GPU, "sft", "demo"), capsys
    )


def test_a_plan_says_which_of_two_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan_on(H100, "pretrain", "7b", "pretrain.precision=bf16")
    assert "2 (chosen) of 2048 tokens; recomputed: nothing │" in printed(rows, capsys)
    way = plan_on(H100, "pretrain", "7b", "pretrain.micro_batch=3", "pretrain.recompute=auto")
    assert "│ 3 of 2048 tokens; recomputed: nothing (chosen) │" in printed(way, capsys)


def test_a_plan_shows_what_the_stage_will_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage chooses before it knows its rows, of which little may carry loss."""
    found = row_counts.RowCount(rows=640, scored_share=0.01)
    monkeypatch.setattr(row_counts, "count_rows", lambda run, recipe, stage: found)
    asked: list[Demand] = []

    def settle(folder: Path, demand: Demand, gpu: GPUInfo) -> tuple[object, None]:
        asked.append(demand)
        return choosing.choose(demand, gpu), None

    monkeypatch.setattr(choosing, "settle", settle)
    planned = plan_on(H100, "sft")
    assert [each.scored_share for each in asked] == [1.0]
    # What is planned to be needed is for the rows that there are.
    assert planned.plan.memory[0].loss_gib < 0.8


def test_what_is_planned_is_what_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run goes on with what another planner, or another machine, chose for it."""
    changes = ("pretrain.precision=bf16", "pretrain.recompute=auto")
    planned = plan_on(H100, "pretrain", "7b", *changes)
    chosen = dataclasses.replace(planned.config, micro_batch=1, recompute=True)
    seen: list[TrainConfig] = []

    def rehearse(recipe: recipes.Recipe, stage: str, config: TrainConfig) -> list[Any]:
        seen.append(config)
        return []

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    recipe = recipes.resolve("7b", None, changes, Path("unused"))[1]
    planning._rehearse(recipe, dataclasses.replace(planned, config=chosen))
    assert [(each.micro_batch, each.recompute) for each in seen] == [(1, True)]


def test_a_run_that_began_with_a_model_from_outside_is_planned_by_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recipe = recipes.resolve("7b", None, (), tmp_path / "run")
    assert planning._model_from_outside(run) is None
    taken_in = read_model_file(recipes.configs_folder() / "model_demo.py")
    taken_in.to_hf().save_pretrained(run.model("pretrain"))
    for stage, external in (("pretrain", True), ("sft", False)):
        run.write_record(stage, {"stage": stage, "external": external})
    monkeypatch.setattr(planning, "detect_gpu_type", lambda: H100)
    planning.plan_all(run, recipe)
    parameters = f"{taken_in.num_parameters / 1e6:,.2f} M"
    assert capsys.readouterr().out.count(parameters) == 4
    # A later stage needs room for it, not for the recipe's 7B.
    monkeypatch.setattr(planning, "_require_computable", lambda recipe, stage: None)
    small = GPUInfo(**{**H100, "memory_gib": 12.0})
    monkeypatch.setattr(planning, "detect_gpu_type", lambda: small)
    planning.require_room(run, recipe, "dpo")
    run.write_record("pretrain", {"stage": "pretrain", "external": False})
    with pytest.raises(UsageError, match=r"GiB are needed on one GPU .* has 12\.0 GiB; set a"):
        planning.require_room(run, recipe, "dpo")
