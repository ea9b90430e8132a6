"""What a stage does before it trains."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from sevenfold.train import parallel
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import workbench


class Layer:
    """A layer that notes when it is compiled."""

    def __init__(self, notes: list[str]):
        self.notes = notes

    def compile(self, **options: Any) -> None:
        self.notes.append(f"compile {options}")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", []),
        ("default", ["reset", *["compile {'mode': None, 'dynamic': False}"] * 2]),
    ],
)
def test_a_stage_compiles_afresh(
    mode: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four stages in one process have more variants of a layer than PyTorch keeps."""
    notes: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: notes.append("reset"))
    decoder = types.SimpleNamespace(layers=[Layer(notes), Layer(notes)])
    model = types.SimpleNamespace(get_decoder=lambda: decoder)
    scorer: Any = types.SimpleNamespace(causal_model=model)
    _, recipe = recipes.resolve(overrides=[f"pretrain.compile={mode}"])
    workbench.place(scorer, recipe.pretrain, parallel.join())
    assert notes == expected
