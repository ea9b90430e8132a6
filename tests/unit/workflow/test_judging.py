"""What a judge model said of a stage: written apart, bound to the answers, read by no gate."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import UsageError
from sevenfold.base.records import Run, write_run
from sevenfold.verify.config import EvaluateConfig, JudgeConfig, TaskConfig, metrics_of_stage
from sevenfold.verify.report import write_report
from sevenfold.workflow import judging

KEY = "CANARY-key-91c2"
ANSWERS = (("u0", True, "No, I won't."), ("u1", True, "Sure: light it."), ("s0", False, "Use oil."))


def config(**changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "address": "https://judge.example/v1", "model": "a-judge", "key_variable": "JUDGE_KEY",
        "timeout_s": 1.0, "attempts": 1, "allow_cleartext": False,
    }  # fmt: skip
    tasks = (TaskConfig(name="safe", kind="safety"), TaskConfig(name="facts", kind="exact"))
    judge = JudgeConfig(**(settings | changes))
    return EvaluateConfig(tasks=tasks, confidence=0.95, seed=1, max_new_tokens=6, judge=judge)


def write_items(run: Run, more: str = "") -> None:
    rows = [
        {"task": "safe", "id": name, "unsafe": unsafe, "answer": answer + more, "prompt": "SECRET"}
        for name, unsafe, answer in ANSWERS
    ]
    rows.append({"task": "facts", "id": "f0", "answer": "I can't say."})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_text(run.stage("sft") / "evaluation_items.jsonl", lines)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})
    made.write_record("sft", {"stage": "sft", "evidence": {"verdict_sha256": "0"}})
    write_items(made)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The answers shown to a judge who hears a refusal in every "No", and nothing in "Sure"."""
    shown: list[list[str]] = []

    def judge(judge: JudgeConfig, answers: Sequence[str], key: str | None) -> list[bool | str]:
        assert key == KEY
        shown.append(list(answers))
        return ["status 500" if a.startswith("Sure") else a.startswith("No") for a in answers]

    monkeypatch.setattr(judging, "judge_answers", judge)
    return shown


def test_its_opinion_is_written_apart_with_what_was_missing(
    run: Run,
    asked: list[list[str]],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.WARNING, "sevenfold")
    judging.judge_stage(run, config(), "sft")
    assert asked == [[answer for _, _, answer in ANSWERS]]
    found = storage.read_json(run.stage("sft") / "judge.json")
    assert found["tasks"]["safe"]["refusal_rate"]["value"] == 1.0  # of the one that was judged
    assert found["tasks"]["safe"]["refusal_rate"]["n"] == 1
    assert found["tasks"]["safe"]["over_refusal_rate"]["value"] == 0.0
    assert found["tasks"]["safe"]["agreement"]["n"] == 2
    assert (found["num_asked"], found["problems"]) == (3, {"status 500": 1})
    assert "gave no opinion of 1 of 3 answers (status 500: 1); the evaluation stands" in caplog.text
    assert "no gate reads this" in capsys.readouterr().out
    assert run.record("sft")["evidence"]["verdict_sha256"] == "0"
    assert judging.read_judged(run, "sft") == found
    assert not [name for name in metrics_of_stage(config(), "sft") if "judge" in name]


@pytest.mark.fault("L06")
def test_the_key_is_nowhere_in_the_run(run: Run, asked: list[list[str]]) -> None:
    judging.judge_stage(run, config(), "sft")
    write_report(run)
    kept = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(kept) >= 4
    assert [path for path in kept if KEY.encode() in path.read_bytes()] == []


@pytest.mark.fault("K07")
def test_an_opinion_of_other_answers_or_an_edited_one_does_not_count(
    run: Run, asked: list[list[str]]
) -> None:
    judging.judge_stage(run, config(), "sft")
    path = run.stage("sft") / "judge.json"
    written = path.read_bytes()
    path.write_bytes(written.replace(b'"value": 1.0', b'"value": 0.0'))
    assert judging.read_judged(run, "sft") is None
    path.write_bytes(written)
    write_items(run, more="!")
    assert judging.read_judged(run, "sft") is None


def test_a_judge_that_was_heard_out_is_not_asked_again(
    run: Run, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    judging.judge_stage(run, config(), "sft")
    judging.judge_stage(run, config(), "sft")
    assert len(asked) == 2  # one answer had no opinion
    monkeypatch.setattr(judging, "judge_answers", lambda c, answers, key: [True] * len(answers))
    judging.judge_stage(run, config(), "sft")
    monkeypatch.setattr(judging, "judge_answers", lambda *_: pytest.fail("asked again"))
    judging.judge_stage(run, config(timeout_s=2.0), "sft")
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        judging.judge_stage(run, config(model="another"), "sft")


def test_the_report_shows_it_apart(run: Run, asked: list[list[str]]) -> None:
    judging.judge_stage(run, config(), "sft")
    page = write_report(run).read_text("utf-8")
    assert "A judge model&#39;s opinion" in page or "A judge model's opinion" in page
    assert "a-judge" in page
    assert "status 500" in page


def test_a_missing_key_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UsageError, match="export JUDGE_KEY, or set evaluate.judge=null"):
        judging.require_key(config())
