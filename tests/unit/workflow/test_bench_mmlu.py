"""`bench mmlu` on a model of a few thousand weights: our own task and the harness's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold.data import random_texts
from sevenfold.verify import harness
from sevenfold.verify.tasks import ChoiceItem, read_task
from sevenfold.workflow import bench_mmlu, cli, toy

SETTINGS: dict[str, Any] = {**toy.SETTINGS, "model.max_seq_len": 8192}
ASSIGNMENTS = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
ITEMS = 30


def run(
    folder: Path, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0
) -> list[dict[str, Any]] | str:
    chosen = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
    folder.mkdir(exist_ok=True)
    assert cli.execute(["bench", "mmlu", "--folder", str(folder), *chosen, *flags]) == code
    assert list(folder.iterdir()) == []
    printed = capsys.readouterr()
    return printed.err if code else [json.loads(line) for line in printed.out.splitlines()]


def write(file: Path, count: int) -> Path:
    rows = random_texts.random_questions(count, seed=0)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_each_question_is_read_once_and_both_ways_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_mmlu, "NUM_ITEMS", ITEMS)
    cases = run(tmp_path / "b", capsys)
    assert isinstance(cases, list)
    assert [case["what"] for case in cases] == ["step 11", "step 11, harness"][: len(cases)]
    assert len(cases) == 1 + harness.is_installed()
    items = read_task(bench_mmlu.CONFIG, [write(tmp_path / "random.jsonl", ITEMS)], seed=0).items
    size = sum(len(item.prompt) for item in items if isinstance(item, ChoiceItem))
    for case in cases:
        assert case["case"] == "mmlu"
        assert case["items"] == ITEMS
        assert case["accuracy"] == cases[0]["accuracy"]
        assert 0 < case["forward_s"] < case["elapsed_s"]
        assert case["items_s"] == pytest.approx(ITEMS / case["elapsed_s"])
        assert case["mfu_forward"] is None  # no peak is known of a CPU
        # Four letters after one question: the question goes through the model once, not four
        # times, and questions of about one length go together. A byte is a token here.
        assert size <= case["forward_tokens"] < 1.6 * size
        assert 1 <= case["forward_passes"] <= 4
    assert cases[0]["forward_tokens"] == cases[-1]["forward_tokens"]


def test_items_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "mmlu.jsonl", 4)
    killed = tmp_path / "b" / bench_mmlu.FOLDER / bench_mmlu.ITEMS
    killed.parent.mkdir(parents=True)
    killed.write_text("left by one that was killed")
    cases = run(tmp_path / "b", capsys, "--source", str(file))
    assert isinstance(cases, list)
    assert cases[0]["items"] == 4
    file.write_text('{"question": "Who?", "subject": "hats", "choices": ["Tom"], "answer": 0}\n')
    printed = run(tmp_path / "b", capsys, "--source", str(file), code=4)
    assert "expected two texts or more" in printed
    assert "leave the other --source out" in run(
        tmp_path / "b", capsys, "--source", str(file), "--source", str(file), code=2
    )


def test_random_questions_are_as_long_as_those_of_mmlu(tmp_path: Path) -> None:
    rows = list(random_texts.random_questions(2000, seed=0))
    assert rows == list(random_texts.random_questions(2000, seed=0))
    sizes = sorted(len(row["question"]) + sum(map(len, row["choices"])) for row in rows)
    assert sum(sizes) / 2000 == pytest.approx(442, rel=0.1)  # characters; of the test set
    assert sizes[1000] == pytest.approx(283, rel=0.2)
    file = write(tmp_path / "random.jsonl", 2000)
    assert len(read_task(bench_mmlu.CONFIG, [file], seed=0).items) == 2000
