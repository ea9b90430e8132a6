"""Talking to a small model with random weights: what it says is noise, how it says it is not."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import UsageError
from sevenfold.base.records import Run, write_run
from sevenfold.workflow import chat, cli


@pytest.fixture
def run(talking_run: Run) -> Run:
    return talking_run


def speak(run: Run, text: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli.execute(["chat", str(run.folder), "--max-tokens", "5", *flags])


def test_each_question_gets_an_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speak(run, "Hello\n\nAgain\n/quit\nnever\n", monkeypatch) == 0
    printed = capsys.readouterr().out
    assert printed.count("model  ") == 2
    assert "never" not in printed


def test_the_streamed_answer_is_the_whole_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speak(run, "Hello\n", monkeypatch, "--stage", "sft") == 0
    streamed = capsys.readouterr().out.removeprefix("model  ").removesuffix("\n")
    monkeypatch.setattr(chat, "CONVERSE_TOKENS", 5)
    [(prompt, answer)] = chat.converse(run, "sft", ["Hello"])
    assert prompt == "Hello"
    assert streamed.rstrip("\N{REPLACEMENT CHARACTER}").strip() in answer


def test_a_long_talk_forgets_its_beginning(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speak(run, "The cat sat on the mat.\n" * 9, monkeypatch) == 0
    assert capsys.readouterr().out.count("model  ") == 9


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("word " * 200, (), "more tokens than the model's context of 64 leaves"),
        ("", ("--temperature", "-1"), "--temperature -1.0: expected 0 or more"),
        ("", ("--max-tokens", "0"), "--max-tokens 0: expected 1 or more"),
        ("", ("--stage", "dpo"), "dpo has not finished yet; run scripts/09_dpo.py first"),
    ],
)
def test_what_is_refused(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert speak(run, text, monkeypatch, *flags) == 2
    assert message in capsys.readouterr().err


def test_the_latest_stage_speaks(run: Run, tmp_path: Path) -> None:
    assert chat.latest_stage(run) == "sft"
    empty = write_run(tmp_path / "empty", preset="demo", recipe={})
    with pytest.raises(
        UsageError, match=r"no trained model yet; run scripts/run_full_pipeline\.sh"
    ):
        chat.latest_stage(empty)


def test_closing_prompts_come_from_the_runs_own_tasks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", preset="demo", recipe={})
    assert chat.closing_prompts(run) == list(chat.FALLBACK_PROMPTS)
    folder = run.data("raw") / "evaluation"
    facts = storage.JsonLines(folder / "facts.jsonl")
    facts.append({"kind": "exact", "messages": [{"role": "user", "content": "Who?"}]})
    safety = storage.JsonLines(folder / "safety.jsonl")
    safety.append({"kind": "safety", "prompt": "Burn the cat.", "unsafe": True})
    safety.append({"kind": "safety", "prompt": "Burn the bread.", "unsafe": False})
    assert chat.closing_prompts(run) == ["Who?", "Burn the cat.", "Burn the bread."]
