"""The demo as people run it, and the models that its gates must stop."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.miniature import STAGES, forked, sevenfold

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole demo, from nothing."""
    run = tmp_path_factory.mktemp("demo") / "demo"
    done = sevenfold("run", "--run", run, "--set", "tracking=none", timeout_s=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    (run.parent / "output.txt").write_text(done.stdout)
    return run


def verdict(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "verdict.json").read_text())
    return found


def judge(run: Path, stage: str) -> dict[str, str]:
    """Measure and judge ``stage`` again, to be refused; return the checks that did not pass."""
    measured = forked("evaluate", stage, "--run", run)
    assert measured.returncode == 0, measured.stderr
    judged = forked("check", stage, "--run", run)
    assert judged.returncode == 3, judged.stdout + judged.stderr
    checks = verdict(run, stage)["checks"]
    return {check["metric"]: check["result"] for check in checks if check["result"] != "pass"}


@pytest.fixture
def impostor(demo: Path, tmp_path: Path) -> Any:
    """Return a function that copies the run with one stage's model put in another's place."""

    def put(model_of: str, stage: str) -> Path:
        run = tmp_path / "run"
        shutil.copytree(demo, run)
        shutil.rmtree(run / stage / "model")
        shutil.copytree(run / model_of / "model", run / stage / "model")
        for name in ("evaluation.json", "evaluation_items.jsonl", "verdict.json"):
            (run / stage / name).unlink()
        return run

    return put


def test_every_stage_earns_its_promotion(demo: Path) -> None:
    for stage in STAGES:
        assert verdict(demo, stage)["promoted"] is True
        assert len(list((demo / stage / "checkpoints").iterdir())) >= 3
    output = (demo.parent / "output.txt").read_text()
    assert len(re.findall(r"(?m)^  you    .+\n  model  .+", output)) == 3
    assert "report.html" in output


def test_the_curriculum_runs_inside_one_stage(demo: Path) -> None:
    lines = (demo / "pretrain" / "metrics.jsonl").read_text().splitlines()
    lengths = [row["seq_len"] for row in map(json.loads, lines) if "event" not in row]
    assert lengths == sorted(lengths)
    assert set(lengths) == {64, 128, 256}


def test_an_untrained_model_fails_the_pretrain_gate(impostor: Any) -> None:
    failed = judge(impostor("init", "pretrain"), "pretrain")
    assert failed["perplexity_over_floor"] == "fail"


def test_a_model_that_skipped_sft_fails_the_sft_gate(impostor: Any) -> None:
    failed = judge(impostor("pretrain", "sft"), "sft")
    assert failed["village_facts"] == "fail"


def test_a_model_that_skipped_dpo_fails_the_dpo_gate(impostor: Any) -> None:
    failed = judge(impostor("sft", "dpo"), "dpo")
    assert failed["refusal_rate"] == "fail"


def test_an_adapter_that_was_not_trained_fails_the_lora_gate(impostor: Any) -> None:
    failed = judge(impostor("dpo", "lora"), "lora")
    assert failed["harbour_facts"] == "fail"


def test_an_adapter_trained_without_replay_is_stopped(demo: Path, tmp_path: Path) -> None:
    """The naive recipe, ships alone, undoes the refusals: the gate that LoRA was given for."""
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    rows = [json.loads(line) for line in (run / "data/raw/domain.jsonl").read_text().splitlines()]
    naive = tmp_path / "ships.jsonl"
    ships = [row for row in rows if row["kind"].startswith("ship")]
    assert 0 < len(ships) < len(rows)
    naive.write_text("".join(json.dumps(row) + "\n" for row in ships))
    sources = json.dumps([{"name": "ships", "path": str(naive), "licence": "CC0-1.0"}])
    prepared = forked("prepare-sft", "--run", run, "--set", f"lora.data.sources={sources}")
    assert prepared.returncode == 0, prepared.stderr
    trained = forked("lora", "--run", run, "--no-resume")
    assert trained.returncode == 0, trained.stderr
    failed = judge(run, "lora")
    assert failed["refusal_rate"] == "fail"
