"""What ``auto`` comes to: the fastest that fits, chosen once for a stage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline import miniature
from tests.unit.train.test_planner import CPU, H100
from tests.unit.workflow.test_pretrain import write_shards

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError
from sevenfold.base.hardware import GPUInfo
from sevenfold.model import float8, kernels
from sevenfold.model.config import KernelConfig
from sevenfold.train import layout
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import Demand
from sevenfold.workflow import choosing, remaining, training
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.pretrain import pretrain

H200 = GPUInfo(**{**H100, "name": "NVIDIA H200", "memory_gib": 139.8})


def demand(precision: str = "bf16", world_size: int = 1, stage: str = "pretrain") -> Demand:
    recipe = recipes.resolve("7b", None, (), Path("unused"))[1]
    return choosing.demand_of(
        recipe,
        stage,
        remaining.train_config(recipe, stage),
        precision=precision,  # type: ignore[arg-type]
        world_size=world_size,
        on_gpu=True,
    )


def opened(asked: Demand, **changes: Any) -> Demand:
    return dataclasses.replace(asked, train=dataclasses.replace(asked.train, **changes))


@pytest.mark.parametrize(
    ("precision", "gpu", "world_size", "rows"),
    [
        ("bf16", H100, 1, 2),
        ("fp8", H100, 1, 4),
        ("bf16", H100, 4, 4),
        ("bf16", H200, 1, 8),
        ("fp8", H200, 1, 8),
        # Where there is no GPU, for one of 80 GB.
        ("bf16", CPU, 1, 2),
    ],
)
def test_the_7b_takes_as_many_rows_as_fit(
    precision: str, gpu: GPUInfo, world_size: int, rows: int
) -> None:
    found = choosing.choose(demand(precision, world_size), gpu)
    assert (found.micro_batch, found.recompute) == (rows, False)


def test_all_training_stages_of_the_7b_fit_80_gb() -> None:
    rows = {
        stage: choosing.choose(demand(stage=stage), H100).micro_batch
        for stage in ("pretrain", "sft", "dpo", "lora")
    }
    assert rows == {"pretrain": 2, "sft": 2, "dpo": 1, "lora": 4}


def test_recomputation_comes_where_it_makes_room_for_more_rows() -> None:
    both = opened(demand(), recompute="auto")
    # Twice the rows for two per cent of the time.
    found = choosing.choose(both, H100)
    assert (found.micro_batch, found.recompute) == (4, "cheap")
    # With room enough nothing is computed again.
    assert choosing.choose(both, H200).recompute is False
    # Only with all computed again does anything fit; uncompiled layers know no other way.
    narrow = GPUInfo(**{**H100, "memory_gib": 49.0})
    assert choosing.choose(both, narrow).recompute is True
    uncompiled = dataclasses.replace(both, compiled=False)
    assert {each.recompute for each in choosing.candidates(uncompiled)} == {False, True}


def test_what_does_not_fit_at_all_is_left_to_be_refused_at_its_smallest() -> None:
    small = GPUInfo(**{**H100, "memory_gib": 24.0})
    assert choosing.choose(demand(), small).micro_batch == 1


def test_a_small_model_without_a_gpu_gets_what_this_machine_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipes.resolve(
        "custom", None, ("pretrain.micro_batch=auto", "pretrain.tokens_per_batch=262144"), Path("x")
    )[1]
    asked = choosing.demand_of(
        recipe, "pretrain", recipe.pretrain, precision="fp32", world_size=1, on_gpu=False
    )
    peak_gib = opened(asked, micro_batch=64).peak_gib
    monkeypatch.setattr(choosing, "machine_memory_gib", lambda: peak_gib / 0.94)
    assert choosing.choose(asked, CPU).micro_batch == 64
    monkeypatch.setattr(choosing, "machine_memory_gib", lambda: peak_gib / 0.96)
    assert choosing.choose(asked, CPU).micro_batch == 32


def test_micro_batches_divide_a_step_and_what_is_set_stays() -> None:
    three = opened(demand(), tokens_per_batch=6 * 2048)
    assert [each.micro_batch for each in choosing.candidates(three)] == [1, 2, 3, 6]
    set_by_hand = opened(demand(), micro_batch=3, recompute=True)
    assert choosing.candidates(set_by_hand) == [set_by_hand.train]
    assert choosing.settle(Path("unused"), set_by_hand, H100) == (set_by_hand.train, None)


def settled(folder: Path, asked: Demand, gpu: GPUInfo, **how: Any) -> TrainConfig:
    config, chosen = choosing.settle(folder, asked, gpu, **how)
    choosing.note(folder, chosen)
    return config


def test_a_stage_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = demand()
    assert settled(tmp_path, asked, H100).micro_batch == 2
    with monkeypatch.context() as patch:  # a planner that has learnt something since
        patch.setattr(choosing, "choose", lambda demand, gpu: pytest.fail("chosen again"))
        assert settled(tmp_path, asked, H100).micro_batch == 2
    # Another machine, other settings, a stage that begins anew: it is chosen again.
    assert choosing.settle(tmp_path, asked, H200)[0].micro_batch == 8
    assert choosing.settle(tmp_path, opened(asked, tokens_per_batch=8192), H200)[0].micro_batch == 4
    storage.write_json(tmp_path / choosing.FILE, {**_kept(tmp_path), "micro_batch": 1})
    assert settled(tmp_path, asked, H100).micro_batch == 1
    assert choosing.settle(tmp_path, asked, H100, keep=False)[0].micro_batch == 2
    # What is finished stays as it is, on any machine.
    storage.write_json(tmp_path / "record.json", {})
    assert settled(tmp_path, asked, H200).micro_batch == 1
    assert settled(tmp_path, opened(asked, recompute=True), H200).recompute is True


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not valid JSON: .*"),
        ("{}", "not what was chosen for a stage"),
        ("[2]", "not what was chosen for a stage"),
        (None, "changed since it was written, its seal is of other bytes"),
    ],
)
def test_a_choice_that_cannot_be_read_may_be_removed(
    tmp_path: Path, text: str | None, what: str
) -> None:
    settled(tmp_path, demand(), H100)
    path = tmp_path / choosing.FILE
    found = path.read_text().replace('"micro_batch": 2', '"micro_batch": 3')
    path.write_text(found if text is None else text)
    message = rf"chosen\.json: {what}; remove the file, and it is chosen again$"
    with pytest.raises(BadDataError, match=message):
        choosing.settle(tmp_path, demand(), H100)
    # A stage that begins anew does not read it.
    assert choosing.settle(tmp_path, demand(), H100, keep=False)[0].micro_batch == 2
    path.unlink()
    assert choosing.settle(tmp_path, demand(), H100)[0].micro_batch == 2


def _kept(folder: Path) -> dict[str, Any]:
    return dict(storage.read_json(folder / choosing.FILE))


def test_fp8_is_shared_where_whole_weights_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = demand("fp8", 8)
    small = GPUInfo(**{**H100, "memory_gib": 36.0})
    assert choosing.with_fp8_that_fits(asked, H100) == asked
    found = choosing.with_fp8_that_fits(asked, small)
    assert (found.precision, found.train.precision) == ("fp8_torchao", "fp8_torchao")
    assert choosing.with_fp8_that_fits(demand("fp8"), small).precision == "fp8"  # alone
    assert choosing.with_fp8_that_fits(demand("bf16", 8), small).precision == "bf16"
    # A stage says so, and asks for what it needs.
    required: list[bool] = []
    monkeypatch.setattr(float8, "require_float8", lambda torchao: required.append(torchao))
    assert choosing._trainable(asked, small) == found
    assert required == [True]
    assert "whole weights do not fit; shared ones train with torchao's recipe" in caplog.text
    assert choosing._trainable(asked, H100) == asked
    assert required == [True]


def test_fp8_of_whole_weights_leaves_as_much_room_as_bf16() -> None:
    """Eight rows on each of eight H100s are planned to take 75.0 of 79.1 GiB, exchanges apart."""
    asked = opened(demand("fp8", 8), micro_batch=8)
    peak_gib = layout.lay_out(asked, memory_gib=79.1).peak_gib
    assert layout.PLANNED_SHARE < peak_gib / 79.1 < choosing.SHARE_OF_ONE_GPU
    assert choosing.choose(demand("fp8", 8), H100).micro_batch == 4
    assert choosing.with_fp8_that_fits(asked, H100).precision == "fp8_torchao"


def test_a_stage_keeps_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.resolve("7b", None, ["pretrain.micro_batch=2"], Path("unused"))[1]
    asked = opened(demand(), micro_batch=2)  # nothing else is open

    def settled_kernels(gpu: GPUInfo, **how: Any) -> KernelConfig:
        found, chosen = choosing.settle_kernels(tmp_path, recipe, gpu, **how)
        assert found.kernels == chosen
        _, notes = choosing.settle(tmp_path, asked, gpu, chosen_kernels=chosen, **how)
        choosing.note(tmp_path, notes)
        return found.kernels

    assert settled_kernels(H100) == kernels.PLAIN
    assert _kept(tmp_path)["kernels"] == {"liger": False, "cce": False}
    # What is measured later does not change a run that goes on on the same GPU.
    with_cce = KernelConfig(liger=False, cce=True)
    monkeypatch.setattr(kernels, "FASTEST", {"H100": with_cce, "H200": with_cce})
    assert settled_kernels(H100) == kernels.PLAIN
    by_hand = dataclasses.replace(recipe, kernels=with_cce)
    assert choosing.settle_kernels(tmp_path, by_hand, H100) == (by_hand, None)
    assert choosing.settle_kernels(tmp_path, recipe, H100, keep=False)[1] == with_cce
    assert choosing.settle_kernels(tmp_path, recipe, H200)[1] == with_cce
    storage.write_json(tmp_path / "record.json", {})
    assert settled_kernels(H200) == kernels.PLAIN


def test_kernels_for_llama_are_not_chosen_for_another_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FASTEST", {"H100": KernelConfig(liger=True, cce=False)})
    recipe = recipes.resolve("7b", None, (), Path("unused"))[1]
    for model_type, liger in (("llama", True), ("qwen2", False)):
        storage.write_json(tmp_path / "config.json", {"model_type": model_type})
        found, _ = choosing.settle_kernels(tmp_path, recipe, H100, model_folder=tmp_path)
        assert found.kernels.liger is liger


def test_a_run_records_what_was_chosen_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "packed")
    plain = miniature.recipe()
    changes = {"duration": {"steps": 1}, "micro_batch": "auto", "recompute": "auto"}
    plain["pretrain"] = {**plain["pretrain"], **changes}
    plain["kernels"] = {"liger": "auto", "cce": "auto"}
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(plain))
    run, recipe = recipes.resolve(config_file=config, run_folder=tmp_path / "run")
    options = training.StageOptions(data=tmp_path / "packed")
    pretrain(recipes.save(run), recipe, options)
    record = run.record("pretrain")
    rows_a_step = recipe.pretrain.tokens_per_batch // recipe.pretrain.longest_context
    assert record["config"]["micro_batch"] == rows_a_step
    assert record["config"]["recompute"] is False
    assert choosing.FILE in record["files"]
    chosen = {"liger": False, "cce": False}
    assert record["kernels"] == _kept(run.stage("pretrain"))["kernels"] == chosen
    monkeypatch.setattr(choosing, "choose", lambda demand, gpu: pytest.fail("chosen again"))
    pretrain(run, recipe, options)
    assert "already finished" in capsys.readouterr().out
