"""Where a run stands, how long it takes, and how that is shown while it trains."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from sevenfold.base import console, storage
from sevenfold.base.config import to_plain
from sevenfold.base.records import Run, write_run
from sevenfold.workflow import cli, pipeline, watching
from sevenfold.workflow.recipe import resolve
from sevenfold.workflow.remaining import progress, seconds_left, steps_after


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A demo whose pretraining is done and whose SFT is at step 200 of 800."""
    recipe = to_plain(resolve("demo", run_folder=tmp_path / "none")[1])
    made = write_run(tmp_path / "run", preset="demo", recipe=recipe)
    log(made, "pretrain", steps=1800, seconds_per_step=0.05)
    made.write_record("pretrain", {"stage": "pretrain"})
    storage.write_json(made.stage("pretrain") / "verdict.json", {"promoted": True})
    log(made, "sft", steps=200, seconds_per_step=0.1)
    return made


def log(run: Run, stage: str, *, steps: int, seconds_per_step: float) -> None:
    lines = storage.JsonLines(run.stage(stage) / "metrics.jsonl")
    lines.append({"step": 0, "event": "resume"})
    for step in range(20, steps + 1, 20):
        row: dict[str, Any] = {"step": step, "tokens": step * 768, "loss": 2.0 - step / 1000}
        lines.append({**row, "elapsed_s": step * seconds_per_step, "tok_s": 7_680.0, "lr": 1e-3})


def test_the_time_left_is_that_of_all_stages_each_at_its_own_rate(run: Run) -> None:
    stages = progress(run)
    assert [(s.stage, s.step, s.num_steps, s.is_done, s.gate) for s in stages] == [
        ("pretrain", 1800, 1800, True, "promoted"),
        ("sft", 200, 800, False, None),
        ("dpo", 0, 300, False, None),
        ("lora", 0, 700, False, None),
    ]
    # 600 steps more of SFT, and what has not begun at SFT's rate: 0.1 s a step.
    assert seconds_left(stages) == pytest.approx((600 + 300 + 700) * 0.1)
    assert seconds_left(stages[:1]) == 0
    assert seconds_left(stages[2:]) is None  # neither has shown how fast it is
    assert watching.current(stages) is stages[1]


def test_what_comes_after_a_stage_is_told_in_its_own_steps(run: Run) -> None:
    stages = progress(run)
    assert steps_after(stages, "sft", 768) == 300 + 700
    assert steps_after(stages, "sft", 1536) == (300 + 700) / 2
    assert steps_after(stages, "lora", 768) == 0
    unknown = [*stages[:3], dataclasses.replace(stages[3], num_steps=None)]
    assert steps_after(unknown, "sft", 768) is None
    strip = watching.stage_strip(stages, "dpo").plain
    assert strip == " ✓ pretrain  ▸ sft 200/800  ▸ dpo  · lora ".replace(" 200/800", "")


def test_a_length_that_the_data_decide_is_unknown_until_they_are_there(run: Run) -> None:
    recipe = run.recipe
    recipe["lora"]["train"]["duration"] = {"steps": None, "epochs": 1.0, "tokens": None}
    again = write_run(run.folder, preset="demo", recipe=recipe)
    assert seconds_left(progress(again)) is None
    train = recipe["lora"]["train"]
    row_length, rows_a_step = train["contexts"][-1]["length"], train["tokens_per_batch"]
    rows_a_step //= row_length
    _prepare_conversations(run, [row_length] * 10 * rows_a_step)
    assert seconds_left(progress(again)) == pytest.approx((600 + 300 + 10) * 0.1)
    _prepare_conversations(run, [row_length])
    assert seconds_left(progress(again)) is None  # less than a batch: the stage will say so


def _prepare_conversations(run: Run, lengths: list[int]) -> None:
    rows = {"input_ids": [[1] * n for n in lengths], "loss_mask": [[1] * n for n in lengths]}
    with storage.new_folder(run.data("lora"), kind="lora", tokens=sum(lengths)) as folder:
        datasets.Dataset.from_dict(rows).save_to_disk(str(folder / "rows"))


def test_plain_lines_tell_it_too(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["watch", str(run.folder), "--once"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sft step 200/800  loss 1.8000")
    assert printed.endswith("about 2:40 of training left\n")
    pipeline._say_what_is_left(run, ["sft", "dpo"])
    assert capsys.readouterr().out == "about 1:30 of training left\n"
    pipeline._say_what_is_left(run, ["dpo"])
    assert capsys.readouterr().out == ""


def test_the_picture_has_a_strip_and_curves(run: Run) -> None:
    storage.write_json(run.stage("pretrain") / "verdict.json", {"promoted": False})
    page = Console(record=True, width=100, file=io.StringIO())
    page.print(watching._picture(run))
    lines = page.export_text().splitlines()
    assert lines[0].split() == ["✗", "pretrain", "▸", "sft", "200/800", "·", "dpo", "·", "lora"]
    assert lines[1].split() == ["loss", "██▇▆▅▄▃▂▁▁", "1.8000"]
    assert any(line.startswith("lr") for line in lines)
    assert "about 2:40 of training left" in " ".join(lines)


def test_a_sparkline_is_the_mean_of_each_share() -> None:
    assert console.sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert console.sparkline([5.0] * 100) == "▁" * 48
    assert console.sparkline([0.0, 2.0, 7.0, 7.0], width=2) == "▁█"


def test_it_follows_until_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = iter([None, KeyboardInterrupt])

    def sleep(seconds: float) -> None:
        log(run, "dpo", steps=20, seconds_per_step=0.1)
        if (then := next(waits)) is not None:
            raise then

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert cli.execute(["watch", str(run.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["sft", "dpo"]
