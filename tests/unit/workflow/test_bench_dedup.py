from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevenfold.base.errors import UsageError
from sevenfold.workflow import bench_dedup
from sevenfold.workflow.cli import execute

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]


def texts(count: int) -> list[str]:
    random = np.random.default_rng(3)
    return [" ".join(random.choice(WORDS, 120)) + "." for _ in range(count)]


def test_what_is_planted_is_found_again_where_it_is_little_changed() -> None:
    planted = bench_dedup.plant(texts(400), seed=1)
    assert len(planted.texts) == 440
    assert len(planted.pairs) == 40
    assert bench_dedup.plant(texts(400), seed=1) == planted
    assert bench_dedup.plant(texts(400), seed=2) != planted
    for original, copy, edit in planted.pairs:
        found = bench_dedup.jaccard(planted.texts[original], planted.texts[copy])
        assert found > 0.95 if edit == 0 else found < 1
        assert (found < 0.6) == (edit >= 0.1)
    found = bench_dedup.quality_of(planted, bench_dedup._ours(planted.texts))
    assert found["recall"]["0"] == found["recall"]["0.01"] == 1
    assert found["recall"]["0.2"] == 0
    assert found["precision"] == 1


def test_wrong_joins_and_missed_ones_are_counted() -> None:
    given = texts(4)
    planted = bench_dedup.Planted([*given, given[0]], [(0, 4, 0.0)])
    right = bench_dedup.quality_of(planted, [0, 1, 2, 3, 0])
    assert (right["recall"], right["precision"], right["joined"]) == ({"0": 1.0}, 1.0, 1)
    wrong = bench_dedup.quality_of(planted, [0, 1, 1, 1, 4])
    assert (wrong["recall"], wrong["precision"], wrong["joined"]) == ({"0": 0.0}, 0.0, 2)


def test_the_bench_measures_all_three_on_the_same_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(60)), encoding="utf-8")
    assert execute(["dedup", "--source", str(path)], verb="bench") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    methods = [case["method"] for case in found]
    assert methods[:3] == ["sevenfold (rensa)", "datatrove", "datasketch"]
    assert all(case["mb_s_per_core"] > 0 for case in found)
    assert len({(case["documents"], case["megabytes"]) for case in found[:3]}) == 1
    assert found[1]["ours_is_faster_by"] > 1
    assert found[3]["dropped"] == {"near_duplicate": found[0]["joined"]}
    assert found[0]["joined"] >= 1


def test_it_needs_texts_and_what_it_compares_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"in which texts\? give --source PATH, repeatable"):
        list(bench_dedup.dedup([], 1))
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "datasketch" else found(n)
    )
    with pytest.raises(UsageError, match="bench dedup needs the package 'datasketch'"):
        list(bench_dedup.dedup([Path("x")], 1))


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["dedup", "--steps", "3"], "--steps means nothing to bench dedup, which reads texts"),
        (["dedup", "--length", "64"], "bench dedup takes it 0 times"),
        (["pretrain", "--source", "x"], "--source means nothing to bench pretrain"),
        (["pretrain", "--gigabytes", "1"], "--gigabytes means nothing to bench pretrain; leave it"),
        (["dedup", "--workers", "2"], "--workers means nothing to bench dedup; leave it out"),
        (["tokenize", "--gigabytes", "nan"], "'nan' is not a number above 0"),
        (["tokenize", "--gigabytes", "-1"], "'-1' is not a number above 0"),
    ],
)
def test_flags_without_effect_are_refused(
    given: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(given, verb="bench") == 2
    assert advice in " ".join(capsys.readouterr().err.split())
