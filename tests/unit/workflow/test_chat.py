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
        ("", ("--top-p", "0"), "--top-p 0.0: expected a number above 0, at most 1"),
        ("", ("--seed", "-1", "--temperature", "1"), "--seed -1: expected a whole number from 0"),
        ("", ("--seed", "1"), "have no effect without --temperature; give one"),
        ("/stag sft\n", (), "'/stag' does not exist; did you mean 'stage'?"),
        ("/stage stf\n", (), "stage 'stf' does not exist; did you mean 'sft'?"),
        ("/stage\n", (), "stage '' does not exist; known: dpo, lora, pretrain, sft"),
        ("/temperature hot\n", (), "'hot': expected one number; /help shows how"),
        ("/top-p 2\n", (), "--top-p 2.0: expected a number above 0, at most 1"),
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


def test_several_stages_answer_the_same_question(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speak(run, "Hello\n/stage sft pretrain\nHello\n", monkeypatch, "--stage", "sft") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["model", "sft", "sft", "pretrain"]
    assert lines[1] == "sft and pretrain, greedy, at most 5 tokens"
    # sft has heard the question before, pretrain has not: it says what sft said then.
    assert lines[3].removeprefix("pretrain").strip() == lines[0].removeprefix("model").strip()


def test_answers_are_drawn_as_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = "/new\nHello\n"
    told = f"/temperature 5\n/seed 7\nHello\n{again}/seed 8\n{again}/top-p 1e-9\n{again}"
    assert speak(run, told + "/max-tokens 1\n/temperature 0\n" + again, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line.removeprefix("model").strip() for line in lines if line.startswith("model")]
    assert said[0] == said[1] != said[2]
    assert "sft, temperature 5, top-p 1, seed 7, at most 5 tokens" in lines
    assert said[3].startswith(said[4])  # the likeliest alone are left, as if greedy
    assert speak(run, "Hello\n", monkeypatch) == 0
    assert capsys.readouterr().out.removeprefix("model").strip() == said[3]


def test_in_a_terminal_a_mistake_is_told_and_the_talk_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/stag", "/help", "Hello", "/exit", "never"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.execute(["chat", str(run.folder), "--max-tokens", "5"]) == 0
    printed = capsys.readouterr()
    assert "'/stag' does not exist; did you mean 'stage'?" in printed.err
    assert "/help lists what else may be said" in printed.out
    assert "/top-p P" in printed.out
    assert printed.out.count("model  ") == 1
    assert next(lines) == "never"


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
