"""What a training stage checks before it starts: that model and rows speak one tokenizer."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
from tests.unit.train.test_loop import CONFIG

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.hardware import GPUInfo, detect_gpu_type
from sevenfold.base.records import Run, Source
from sevenfold.model import float8
from sevenfold.workflow import contamination, prepare, prepared, training
from sevenfold.workflow.recipe import resolve

RECIPE: Any = types.SimpleNamespace()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with a tokenizer, rows made with it, and a stage trained with it."""
    monkeypatch.setattr(prepared, "settings", lambda recipe, name: {})
    monkeypatch.setattr(prepared, "require_context", lambda folder, recipe, stage: None)
    monkeypatch.setattr(contamination, "require_searched", lambda run, recipe, name: None)
    made = Run(folder=tmp_path / "run", facts={"preset": "demo"})
    write_tokenizer(made, "first")
    known = storage.read_manifest(made.tokenizer)["fingerprint"]
    with storage.new_folder(made.data("sft"), kind="sft", inputs={"tokenizer": known}) as folder:
        (folder / "rows").write_text("rows")
    for stage in ("init", "pretrain"):
        storage.write_text(made.model(stage) / "tokenizer.json", "first")
    made.write_record("pretrain", {"external": False})
    return made


def write_tokenizer(run: Run, text: str) -> None:
    with storage.new_folder(run.tokenizer, kind="tokenizer") as folder:
        (folder / "tokenizer.json").write_text(text)


def source(run: Run, stage: str) -> Source:
    return Source(folder=run.model(stage), fingerprint="x", stage=stage)


def test_rows_and_model_of_one_tokenizer_are_opened(run: Run) -> None:
    found = training.open_rows(run, RECIPE, "sft", source(run, "pretrain"))
    assert found == storage.read_manifest(run.data("sft"))["fingerprint"]


def test_rows_that_were_not_searched_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Run, recipe: Any, name: str) -> None:
        raise UsageError(f"{name}: not searched")

    monkeypatch.setattr(contamination, "require_searched", refuse)
    with pytest.raises(UsageError, match="sft: not searched"):
        training.open_rows(run, RECIPE, "sft", source(run, "pretrain"))


@pytest.mark.fault("C12")
def test_rows_that_were_changed_are_refused_by_name(run: Run) -> None:
    (run.data("sft") / "rows").write_text("rowz")
    with pytest.raises(BadDataError, match=r"data/sft/rows: its SHA-256 is not the manifest's"):
        training.open_rows(run, RECIPE, "sft", source(run, "pretrain"))


def test_a_tokenizer_made_anew_after_the_model_is_refused(run: Run) -> None:
    write_tokenizer(run, "second")
    with pytest.raises(
        UsageError,
        match=r"pretrain/model/tokenizer\.json: not the one in .*04_init_model\.py, then "
        r"scripts/05_pretrain\.py --no-resume and what follows it, again",
    ):
        training.open_rows(run, RECIPE, "sft", source(run, "pretrain"))
    with pytest.raises(UsageError, match=r"run scripts/04_init_model\.py again$"):
        training.require_same_tokenizer(run, source(run, "init"))
    storage.write_text(run.model("init") / "tokenizer.json", "second")
    training.require_same_tokenizer(run, source(run, "init"))


def test_what_descends_from_outside_gets_rows_of_its_own_tokenizer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr(prepare, "prepare_rows", lambda _, __, *what: asked.append(what))
    storage.write_text(run.model("pretrain") / "tokenizer.json", "another")
    run.write_record("pretrain", {"external": True})
    training.open_rows(run, RECIPE, "sft", source(run, "pretrain"))
    assert asked == [("sft", run.model("pretrain"))]


def test_a_later_stage_holds_a_model_from_outside_to_its_context_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was measured against the rows of the stage that took it in."""
    monkeypatch.undo()
    _, recipe = resolve(overrides=["dpo.data.max_length=200"])
    folder = run.model("pretrain")
    dataclasses.replace(recipe.model, max_seq_len=100).to_hf().save_pretrained(folder)
    with pytest.raises(UsageError, match=r"reads 100 tokens, but dpo\.data\.max_length is 200;"):
        training.open_rows(run, recipe, "dpo", source(run, "pretrain"))


@pytest.mark.parametrize("resume", [True, False])
def test_force_is_refused_where_it_has_no_effect(run: Run, tmp_path: Path, resume: bool) -> None:
    storage.write_text(tmp_path / "outside" / "config.json", "{}")
    options = training.StageOptions(start_from=tmp_path / "outside", force="why", resume=resume)
    with pytest.raises(
        UsageError, match=r"no effect with --start-from.*before pretr.*leave it out"
    ):
        training.open_source(run, "init", options)
    (run.stage("pretrain") / "checkpoints").mkdir(parents=True)
    if resume:
        assert training.open_source(run, "init", options).external
    else:
        with pytest.raises(UsageError, match="no effect"):
            training.open_source(run, "init", options)


@pytest.mark.parametrize(("weights", "decided"), [("bf16", "fp8"), ("fp32", "fp8_torchao")])
def test_gpus_that_keep_whole_weights_train_our_fp8(
    weights: Any, decided: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GPUInfo(**{**detect_gpu_type(), "num_gpus": 4, "supports_fp8": True})  # type: ignore[typeddict-item]
    monkeypatch.setattr(training, "detect_gpu_type", lambda: gpu)
    monkeypatch.setattr(float8, "require_float8", lambda *, torchao: None)
    config = dataclasses.replace(CONFIG, precision="fp8", weights=weights)
    assert training.decide(config, stage="pretrain").precision == decided


@pytest.mark.parametrize(
    ("stage", "asked", "num_gpus", "decided"),
    [
        ("sft", "auto", 1, "fp8"),
        ("sft", "fp8", 1, "fp8"),
        ("sft", "auto", 4, "fp8_torchao"),
        ("sft", "fp8", 4, "fp8_torchao"),
        ("sft", "fp8_torchao", 1, "fp8_torchao"),
        ("sft", "bf16", 4, "bf16"),
        # Its reference and it would round differently.
        ("dpo", "auto", 4, "bf16"),
        ("dpo", "fp8", 4, "fp8_torchao"),
        ("dpo", "auto", 1, "fp8"),
    ],
)
def test_several_gpus_train_fp8_by_the_recipe_that_can_be_sharded(
    stage: str,
    asked: Any,
    num_gpus: int,
    decided: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is decided goes into the stage's record; plans agree with it.

    Its settings, which a checkpoint is held against, are the same for one GPU and for several.
    """
    gpu = GPUInfo(
        **{**detect_gpu_type(), "name": "H100", "num_gpus": num_gpus, "supports_fp8": True}  # type: ignore[typeddict-item]
    )
    monkeypatch.setattr(training, "detect_gpu_type", lambda: gpu)
    required: list[bool] = []
    monkeypatch.setattr(float8, "require_float8", lambda *, torchao: required.append(torchao))
    config = dataclasses.replace(CONFIG, precision=asked)
    found = training.decide(config, stage=stage)
    assert found.precision == decided
    settings = training._settings({"train": CONFIG, "beta": 1}, config, found)
    stored = decided if asked == decided else decided.removesuffix("_torchao")
    assert settings["precision"] == stored
    assert (settings["beta"], settings["micro_batch"]) == (1, config.micro_batch)
    assert required == ([decided == "fp8_torchao"] if "fp8" in decided else [])
    assert ("torchao's recipe" in caplog.text) is (num_gpus > 1 and "fp8" in decided)
