"""What `plan` says of a stage: for which machine, what was chosen, and the stage's own choice."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train.test_planner import CPU, H100

from sevenfold.base import hardware, storage
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model import float8
from sevenfold.model.config import read_model_file
from sevenfold.train import layout, parallel
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Demand
from sevenfold.workflow import choosing, cli, planning, rehearsal, row_counts, training
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


def test_a_plan_says_for_which_machine_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = printed(plan_on(NO_GPU, "pretrain"), capsys)
    assert "planned for │ bf16, 1 x GPU of 80 GB (here is none)" in there
    assert "micro-batches a step │ 32 │" in there
    four = GPUInfo(**{**H100, "num_gpus": 4})
    there = printed(plan_on(four, "pretrain"), capsys)
    assert "planned for │ fp8, 4 x NVIDIA H100" in there
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

    def settle(folder: Path, demand: Demand, gpu: GPUInfo, *, keep: bool) -> tuple[object, None]:
        asked.append(demand)
        return choosing.choose(demand, gpu), None

    monkeypatch.setattr(choosing, "settle", settle)
    planned = plan_on(H100, "sft")
    assert [each.scored_share for each in asked] == [1.0]
    # What is planned to be needed is for the rows that there are.
    assert planned.plan.memory[0].loss_gib < 0.8


def test_what_is_planned_is_what_is_rehearsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a run goes on with what another planner, or another machine, chose for it."""
    changes = ("pretrain.precision=bf16", "pretrain.recompute=auto")
    planned = plan_on(H100, "pretrain", "7b", *changes)
    chosen = dataclasses.replace(planned.config, micro_batch=1, recompute=True)
    seen: list[TrainConfig] = []

    def rehearse(recipe: recipes.Recipe, stage: str, config: TrainConfig) -> list[Any]:
        seen.append(config)
        rates = {512: 10_000.0, 1024: 5_000.0, 2048: 20_000.0}
        return [{"seq_len": k, "peak_gib": 70.0, "tok_s": v} for k, v in rates.items()]

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    recipe = recipes.resolve("7b", None, changes, Path("unused"))[1]
    planning._rehearse(recipe, dataclasses.replace(planned, config=chosen))
    assert [(each.micro_batch, each.recompute) for each in seen] == [(1, True)]
    # 512 tokens to 30 % of the run, 1,024 to 70, 2,048 to the end: what each length takes, summed.
    assert [phase.until for phase in chosen.contexts] == [0.3, 0.7, 1.0]
    hours = planned.plan.tokens * (0.3 / 10_000 + 0.4 / 5_000 + 0.3 / 20_000) / 3600
    out = capsys.readouterr().out
    assert f"at the measured rate pretrain takes {hours:,.1f} h (planned: " in out
    assert "10,000" in out


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


def plan_for(gpus: tuple[str | None, int], *changes: str, here: GPUInfo = NO_GPU) -> Any:
    run, recipe = recipes.resolve("7b", None, changes, Path("unused"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "detect_gpu_type", lambda: here)
        return planning.plan_stage(run, recipe, "pretrain", gpus=gpus)


@pytest.mark.parametrize(
    ("gpus", "here", "where"),
    [
        (
            (None, 8),
            NO_GPU,
            "bf16, 8 x GPU of 80 GB (here is none); weights: whole weights on each",
        ),
        (("h100", 8), H100, "fp8, 8 x NVIDIA H100 80GB HBM3; weights: whole weights on each"),
        (("H200", 1), H100, "fp8, 1 x NVIDIA H200"),
        (("A100-40GB", 4), H100, "bf16, 4 x NVIDIA A100-SXM4-40GB; weights: shared by all"),
        (("H200", 16), H100, "fp8_torchao, 16 x NVIDIA H200 in nodes of 8; weights: one c"),
        (("A100", 4), NO_GPU, "bf16, 4 x NVIDIA A100-SXM4-80GB; weights: whole weights on"),
    ],
)
def test_a_plan_may_be_for_other_gpus(
    gpus: tuple[str | None, int],
    here: GPUInfo,
    where: str,
) -> None:
    found = plan_for(gpus, here=here)
    assert found.where.startswith(where)
    assert found.plan.world_size == gpus[1]


def test_other_gpus_are_not_planned_with_what_a_finished_stage_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = recipes.resolve("7b", None, ["pretrain.precision=bf16"], tmp_path / "run")
    monkeypatch.setattr(planning, "detect_gpu_type", lambda: H100)
    folder = run.stage("pretrain")
    storage.write_json(folder / "record.json", {})
    chosen = {"asked": {}, "micro_batch": 32, "recompute": False}
    storage.write_json(folder / choosing.FILE, chosen)
    here, there = (
        planning.plan_stage(run, recipe, "pretrain", gpus=gpus) for gpus in (None, ("H100", 1))
    )
    assert (here.config.micro_batch, there.config.micro_batch) == (32, 2)
    assert there.plan.peak_gib < H100["memory_gib"]


def test_time_and_cost_are_for_all_gpus() -> None:
    one, eight = (
        plan_for(("H100", number), "gpu_hour_price=2.5", "pretrain.precision=bf16").plan
        for number in (1, 8)
    )
    assert eight.elapsed_s == pytest.approx(one.elapsed_s / 8)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    assert eight.cost == pytest.approx(2.5 * eight.gpu_hours)
    assert eight.tokens == one.tokens
    assert eight.peak_gib < 79.1
    # Nobody has measured eight.
    assert one.rate_source == "assumed: 60% of 989 TFLOP/s"
    assert eight.rate_source.endswith("TFLOP/s, as measured on up to two")


def test_gpus_that_cannot_be_planned_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"B200: no such kind; name one of A100-40GB, A100, H100"):
        plan_for(("B200", 8))
    with pytest.raises(UsageError, match=r"pretrain\.tokens_per_batch: 64 rows .* by 128 proc"):
        plan_for(("H100", 128))
    for word in ("0", "H100", "H100:x"):
        assert cli.execute(["plan", "--gpus", word]) == 2
        assert "is not a whole number above 0" in capsys.readouterr().err
    assert cli.execute(["plan", "--help"]) == 0
    assert set(hardware.KINDS) <= set(re.findall(r"[\w-]+", capsys.readouterr().out))


def test_all_stages_are_planned_for_the_gpus_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.execute(["plan", "--preset", "7b", "--gpus", "H200:2"]) == 0
    there = capsys.readouterr().out
    assert there.count("2 x NVIDIA H200; weights") == 4
    assert not list(tmp_path.iterdir())


class Agreeing(parallel.Processes):
    """Processes of one opinion."""

    def sum(self, values: list[float]) -> list[float]:
        return [value * self.world for value in values]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_is_planned_is_what_is_trained(
    whole: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two GPUs: the same precision, micro-batch and way to hold the model, so the same peak."""
    if not whole:
        monkeypatch.setattr(layout, "_may_keep_whole", lambda *_: False)
    two = GPUInfo(**{**H100, "num_gpus": 2})
    planned = plan_on(two, "pretrain", "7b", f"pretrain.precision={precision}")
    processes = Agreeing(rank=0, world=2, device=torch.device("cuda"), per_node=2)
    for module in (hardware, training):
        monkeypatch.setattr(module, "detect_gpu_type", lambda: two)
    monkeypatch.setattr(parallel, "join", lambda: processes)
    monkeypatch.setattr(float8, "require_float8", lambda torchao: None)
    recipe = recipes.resolve("7b", None, [f"pretrain.precision={precision}"], Path("unused"))[1]
    config = choosing.for_trial(
        recipe, "pretrain", training.decide(recipe.pretrain, stage="pretrain")
    )
    held = choosing.laid_out(recipe, "pretrain", config, recipe.model, processes)
    assert held.replicated is whole
    assert (config.micro_batch, config.recompute) == (planned.config.micro_batch, False)
    assert planned.where.startswith(f"{config.precision}, 2 x")
    assert layout.in_words(held) in planned.where
    assert held.peak_gib == pytest.approx(planned.plan.peak_gib)


def test_nodes_of_different_sizes_hold_no_copies_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "detect_gpu_type", lambda: H100)
    recipe = recipes.resolve("7b", None, ["pretrain.precision=bf16"], Path("unused"))[1]
    config = dataclasses.replace(recipe.pretrain, micro_batch=2, compile="default")
    for kind, copies in ((Agreeing, 4), (Uneven, 1)):
        processes = kind(rank=0, world=16, device=torch.device("cuda"), per_node=4)
        held = choosing.laid_out(recipe, "pretrain", config, recipe.model, processes)
        assert (held.copies, held.replicated) == (copies, False)


class Uneven(parallel.Processes):
    """A process of a node of four among nodes of other sizes."""

    def sum(self, values: list[float]) -> list[float]:
        return [value * self.world - (value == self.per_node) for value in values]
