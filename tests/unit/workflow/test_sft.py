"""What the recipe says about SFT and its like reaches rows and model."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch

from sevenfold.base.errors import UsageError
from sevenfold.data.best_fit import best_fit
from sevenfold.objective.next_token import Scorer
from sevenfold.workflow import dpo, lora, sft, trial
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.training import StageOptions

PIECE = ["input_ids", "loss_mask"]


class ReadyError(Exception):
    """Raised where the scorer is about to be placed."""


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_the_noise_reaches_the_scorer(
    alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = recipes.resolve(
        overrides=[f"sft.neftune_noise_alpha={alpha}"], run_folder=tmp_path
    )
    scorer = Scorer(torch.nn.Linear(1, 1), kernel="plain")

    def place(placed: Any, *_: Any) -> None:
        assert placed is scorer
        raise ReadyError

    job = types.SimpleNamespace(recipe=None, stage="sft", config=None, processes=None)
    monkeypatch.setattr(sft.training, "open_source", lambda *_: None)
    monkeypatch.setattr(sft.training, "open_rows", lambda *_: "")
    monkeypatch.setattr(sft.training, "open_job", lambda *_, **__: job)
    monkeypatch.setattr(sft, "conversation_rows", lambda *_: (None, None))
    monkeypatch.setattr(sft.workbench, "load_scorer", lambda _: scorer)
    monkeypatch.setattr(sft.workbench, "place", place)
    with pytest.raises(ReadyError):
        sft.sft(run, recipe, StageOptions())
    assert scorer.neftune_noise_alpha == alpha


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
@pytest.mark.parametrize("packing", ["drawn", "tight"])
def test_rows_are_packed_as_the_stages_recipe_says(
    stage: str, packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of other stages are not; what is rehearsed and benchmarked is packed so, too."""
    others = {"sft", "lora", "dpo"} - {stage}
    other = "drawn" if packing == "tight" else "tight"
    overrides = [f"{stage}.packing={packing}", *(f"{name}.packing={other}" for name in others)]
    run, recipe = recipes.resolve(overrides=overrides, run_folder=tmp_path)
    config = getattr(recipe, stage).train
    asked: list[str] = []

    def noting(lengths: Any, capacity: int, *, packing: str, seed: int) -> Any:
        asked.append(packing)
        return best_fit(lengths, capacity, seed=seed)

    monkeypatch.setattr("sevenfold.data.packing.packs_of", noting)
    monkeypatch.setattr(
        sft.llama, "load_tokenizer", lambda _: types.SimpleNamespace(pad_token_id=0)
    )
    names = ["prompt_ids", "chosen_ids", "rejected_ids"] if stage == "dpo" else PIECE
    table = datasets.Dataset.from_list([{name: [1, 1] for name in names}])
    for part in ("rows", "validation"):
        table.save_to_disk(str(run.data(stage) / part))
    job = types.SimpleNamespace(
        run=run, recipe=recipe, config=config, source=types.SimpleNamespace(folder=tmp_path)
    )
    if stage == "dpo":
        dpo.preference_rows(cast(Any, job))
    else:
        monkeypatch.setattr(sft.training, "open_source", lambda *_: job.source)
        monkeypatch.setattr(sft.training, "open_rows", lambda *_: "")
        monkeypatch.setattr(sft.training, "open_job", lambda *_, **__: job)
        monkeypatch.setattr(sft.workbench, "load_scorer", ready)
        with pytest.raises(ReadyError):
            {"sft": sft.sft, "lora": lora.lora}[stage](run, recipe, StageOptions())
    trial.random_rows(recipe, stage, config, length=0, num_steps=1)
    assert asked == [packing] * 3


def ready(*_: Any) -> None:
    """Stop here."""
    raise ReadyError


def test_noise_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sft\.neftune_noise_alpha.*greater than or equal to 0"):
        recipes.resolve(overrides=["sft.neftune_noise_alpha=-1"])
