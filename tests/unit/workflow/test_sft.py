"""What the recipe says about SFT reaches the model that is trained."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.base.errors import UsageError
from sevenfold.objective.next_token import Scorer
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import sft
from sevenfold.workflow.training import StageOptions


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

    job = types.SimpleNamespace(config=None, processes=None)
    monkeypatch.setattr(sft.training, "open_source", lambda *_: None)
    monkeypatch.setattr(sft.training, "open_rows", lambda *_: "")
    monkeypatch.setattr(sft.training, "open_job", lambda *_, **__: job)
    monkeypatch.setattr(sft, "conversation_rows", lambda *_: (None, None))
    monkeypatch.setattr(sft.workbench, "load_scorer", lambda _: scorer)
    monkeypatch.setattr(sft.workbench, "place", place)
    with pytest.raises(ReadyError):
        sft.sft(run, recipe, StageOptions())
    assert scorer.neftune_noise_alpha == alpha


def test_noise_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sft\.neftune_noise_alpha.*greater than or equal to 0"):
        recipes.resolve(overrides=["sft.neftune_noise_alpha=-1"])
