"""How much metrics move between trainings, on runs written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench.noise_floor import main, spreads, table

from sevenfold.base import storage
from sevenfold.base.errors import UsageError
from sevenfold.base.records import write_run


def run(folder: Path, value: float, *, seed: int, items: str = "1", lr: float = 0.1) -> Path:
    recipe = {"seed": seed, "data": {"village": {"seed": seed}}, "sft": {"lr": lr}}
    made = write_run(folder, preset="demo", recipe=recipe)
    facts: dict[str, Any] = {"task": "facts", "n": 100, "confidence": 0.95, "kind": "proportion"}
    measured = {"value": value, "low": value - 0.098, "high": value + 0.098}
    metrics = {
        "facts": {**facts, **measured},
        "unmeasured": {**facts, "value": None, "low": None, "high": None},
        "merge_error": {**facts, "kind": "measured", "value": 1.0, "low": 1.0, "high": 1.0},
    }
    evaluation = {"data": {"facts": items}, "metrics": metrics}
    storage.write_json(made.stage("sft") / "evaluation.json", evaluation)
    return folder


def test_the_spread_stands_beside_what_items_alone_would_give(tmp_path: Path) -> None:
    folders = [run(tmp_path / str(i), 0.8 + 0.1 * i, seed=i) for i in (0, 1, 2)]
    found = {one.metric: one for one in spreads(folders)}
    assert list(found) == ["facts", "merge_error"]
    facts = found["facts"]
    assert (facts.stage, facts.same_items) == ("sft", True)
    assert facts.between == pytest.approx(0.1)
    assert facts.by_items == pytest.approx(0.05, rel=1e-3)  # half of 0.196 by 1.96
    assert facts.by_chance == pytest.approx(1.96 * 2**0.5 * 0.1, rel=1e-3)
    assert found["merge_error"].by_items is None
    line = "| sft | facts | 0.8, 0.9, 1 | 0.1 | 0.05 | 2.0 | 0.28 | the same |"
    assert line in table(list(found.values()))


def test_it_says_where_the_items_differ_too(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, 0.8, seed=1, items=name) for name in "ab"]
    assert not spreads(folders)[0].same_items


def test_other_recipes_and_single_runs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = run(tmp_path / "a", 0.8, seed=1), run(tmp_path / "b", 0.8, seed=2, lr=0.2)
    with pytest.raises(UsageError, match=r"recipe\.sft\.lr: found 0\.2, .* differ in their seeds"):
        spreads([one, two])
    monkeypatch.setattr("sys.argv", ["noise_floor.py", str(one)])
    with pytest.raises(SystemExit, match="name two at least, of one recipe and other seeds"):
        main()
