"""Which steps run, in which order, and what a gate does to them; stand-ins do the steps."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import (
    BadDataError,
    GateRefusedError,
    SevenfoldError,
    StoppedError,
    UsageError,
)
from sevenfold.base.records import GATED_STAGES, Run
from sevenfold.verify import report
from sevenfold.workflow import clean, cli, pipeline, steps

ALL = [
    "download", "clean", "tokenize_and_pack", "initialize",
    "pretrain", "evaluate_stage pretrain", "check_stage pretrain",
    "prepare_sft", "sft", "evaluate_stage sft", "check_stage sft",
    "prepare_dpo", "dpo", "evaluate_stage dpo", "check_stage dpo",
    "lora", "evaluate_stage lora", "check_stage lora",
]  # fmt: skip


class Workshop:
    """Takes the place of every step; notes what was done, and refuses where it is told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.refusing: set[str] = set()
        self.forced: dict[str, str | None] = {}
        self.failing: dict[str, Exception] = {}
        self.talked: list[str] = []
        self.workers: dict[str, int | None] = {}
        self.reported: list[str] = []
        self.report_failing: Exception | None = None

    def write_report(self, run: Run, *, error: str = "") -> Path:
        self.reported.append(error)
        if self.report_failing is not None:
            raise self.report_failing
        return run.folder / "report.html"

    def call(self, module: str, function: str) -> Callable[..., Any]:
        if function == "require_packages":
            return clean.require_packages

        def perform(run: Run, recipe: Any, *rest: Any, num_workers: int | None = None) -> None:
            self.workers[function] = rest[0].count if function == "clean" else num_workers
            judged = module == "evaluation"
            self.done.append(f"{function} {rest[0]}" if judged else function)
            if function in self.failing:
                raise self.failing[function]
            if function in GATED_STAGES:
                self.forced[function] = rest[0].force
                run.write_record(function, {"stage": function})
            if function == "check_stage":
                self.judge(run, rest[0])

        return perform if module != "planning" else lambda *everything: None

    def judge(self, run: Run, stage: str) -> None:
        promoted = stage not in self.refusing
        result = "pass" if promoted else "fail"
        verdict = {"promoted": promoted, "checks": [{"metric": "x", "result": result}]}
        storage.write_json(run.stage(stage) / "verdict.json", verdict)
        if not promoted:
            raise GateRefusedError(f"{stage} is not promoted: x fail")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    made = Workshop()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "call", made.call)
    monkeypatch.setattr(pipeline, "release_models", lambda: None)
    monkeypatch.setattr(report, "write_report", made.write_report)

    def print_conversations(run: Run, stage: str) -> None:
        made.talked.append(stage)

    monkeypatch.setattr(pipeline, "_print_conversations", print_conversations)
    return made


def test_all_steps_in_order(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["run"]) == 0
    assert workshop.done == ALL
    assert workshop.talked == ["lora"]
    printed = capsys.readouterr().out
    assert "[1/10] 01 download\n" in printed
    assert "[10/10] 10 lora\n" in printed
    assert printed.count("promoted") == 4
    assert f"report  {Path('runs/demo/report.html')}" in printed
    assert "talk    sevenfold chat runs/demo" in printed
    assert (Path("runs/demo/run.json")).is_file()


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ("--from sft", ALL[8:]),
        ("--from 7", ALL[8:]),
        ("--until 03", ALL[:3]),
        ("--until init", ALL[:4]),
        ("--from pretrain --until pretrain", ALL[4:7]),
        ("--until check", ALL),
        ("--from lora --until 12", ALL[15:]),
    ],
)
def test_a_part_of_the_steps(workshop: Workshop, span: str, expected: list[str]) -> None:
    assert cli.execute(["run", *span.split()]) == 0
    assert workshop.done == expected


def test_a_span_that_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="--until clean: no such|--until clean comes before"):
        pipeline.select("sft", "clean")
    with pytest.raises(UsageError, match="--from pretrian: no such step; did you mean 'pretrain'"):
        pipeline.select("pretrian", None)


def test_a_refusing_gate_stops_with_3_and_the_report(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.refusing = {"sft"}
    assert cli.execute(["run"]) == 3
    assert workshop.done == ALL[:11]
    assert workshop.talked == []
    assert workshop.reported == [""]
    printed = capsys.readouterr()
    assert "refused" in printed.out
    assert "report  runs/demo/report.html" in printed.out
    assert printed.err == "error: sft is not promoted: x fail\n"


def test_force_goes_on_and_is_handed_to_every_stage(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.refusing = {"sft", "lora"}
    assert cli.execute(["run", "--force", "a trial"]) == 0
    assert workshop.done == ALL
    assert workshop.forced == dict.fromkeys(GATED_STAGES, "a trial")
    assert capsys.readouterr().out.count("going on past the gate, forced: a trial") == 2


def test_an_error_is_not_forced(workshop: Workshop) -> None:
    workshop.failing = {"prepare_dpo": BadDataError("row 7")}
    assert cli.execute(["run", "--force", "a trial"]) == 4
    assert workshop.done == ALL[:12]
    assert Path("runs/demo/run.json").is_file()


def test_an_error_is_named_in_the_report_and_keeps_its_exit_code(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.failing = {"prepare_dpo": BadDataError("row 7")}
    assert cli.execute(["run"]) == 4
    assert workshop.reported == ["row 7"]
    assert workshop.talked == []
    printed = capsys.readouterr()
    assert "report  runs/demo/report.html" in printed.out
    assert printed.err == "error: row 7\n"


def test_a_report_that_fails_does_not_hide_the_error(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.failing = {"prepare_dpo": BadDataError("row 7")}
    workshop.report_failing = SevenfoldError("the disk is full")
    assert cli.execute(["run"]) == 4
    said = "warning: the report could not be written: the disk is full\nerror: row 7\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("step", "error"),
    [("download", BadDataError("row 7")), ("sft", StoppedError("stopped by a signal"))],
)
def test_no_report_of_nothing_and_none_that_delays_a_stop(
    workshop: Workshop, step: str, error: SevenfoldError
) -> None:
    workshop.failing = {step: error}
    assert cli.execute(["run"]) == error.exit_code
    assert workshop.reported == []
    assert Path("runs/demo/run.json").is_file() is (step != "download")


@pytest.mark.fault("K06")
def test_a_gate_file_without_a_chosen_stage_stops_before_anything_is_done(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "confidence: 0.95\ndemo: {sft: [{metric: village_facts, min: 0.5, min_samples: 9}]}\n"
    )
    assert cli.execute(["run", "--gates", str(gates)]) == 2
    assert "no checks for stage 'pretrain'; write at least one" in capsys.readouterr().err
    assert workshop.done == []
    assert cli.execute(["run", "--gates", str(gates), "--from", "sft", "--until", "sft"]) == 0


def test_a_dry_run_only_plans(workshop: Workshop, tmp_path: Path) -> None:
    assert cli.execute(["run", "--dry-run"]) == 0
    assert cli.execute(["run", "--dry-run", "--until", "clean"]) == 0
    assert workshop.done == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("K04")
def test_a_misspelt_gate_stops_before_anything_is_done(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "confidence: 0.95\ndemo: {sft: [{metric: vilage_facts, min: 0.5, min_samples: 9}]}\n"
    )
    assert cli.execute(["run", "--gates", str(gates)]) == 2
    assert "did you mean 'village_facts'" in capsys.readouterr().err
    assert workshop.done == []


def test_a_missing_package_stops_before_anything_is_done(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts are cleaned after they were fetched, which may take days."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "rensa" else found(n))
    asked = ["run", "--set", "clean.deduplicate=minhash"]
    assert cli.execute(asked) == 2
    said = capsys.readouterr().err
    assert "clean.deduplicate needs the package 'rensa', which is not installed; pip" in said
    assert workshop.done == []
    assert cli.execute([*asked, "--from", "tokenize", "--until", "tokenize"]) == 0


def test_missing_items_stop_before_anything_is_done(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are needed after hours of training, and data are searched for those of all stages.

    What no chosen stage measures may be missing where nothing is searched.
    """
    tasks = (
        'evaluate.tasks=[{name: x, kind: pair, path: "~/no/pairs.jsonl", stages: [dpo]},'
        " {name: y, kind: pair, stages: [sft]}]"
    )
    rest = "min: 0.5, min_samples: 9}]"
    gates = Path("gates.yaml")
    gates.write_text(
        f"confidence: 0.95\ndemo: {{sft: [{{metric: y, {rest}, dpo: [{{metric: x, {rest}}}\n"
    )
    asked = ["run", "--gates", str(gates), "--set", tasks]
    for span in (["sft", "dpo"], ["download", "clean"], ["prepare-sft", "sft"]):
        assert cli.execute([*asked, "--from", span[0], "--until", span[1]]) == 2
        said = capsys.readouterr().err
        assert "no/pairs.jsonl: no such file; task 'x' needs its items: docs/DATA_FORMATS" in said
    assert workshop.done == []
    assert cli.execute([*asked, "--from", "sft", "--until", "sft"]) == 0


def test_workers_are_handed_to_the_steps_that_share_work(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process would clean the 7B's text for days."""
    span = ["run", "--until", "tokenize"]
    assert cli.execute(span) == 0
    assert workshop.workers == {"download": None, "clean": 1, "tokenize_and_pack": None}
    assert cli.execute([*span, "--workers", "3"]) == 0
    assert workshop.workers == {"download": None, "clean": 3, "tokenize_and_pack": 3}
    workshop.done.clear()
    found = importlib.util.find_spec
    missing = "datatrove"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else found(n))
    assert cli.execute([*span, "--workers", "3"]) == 2
    assert "--workers 3 --executor local needs the package 'datatrove'" in capsys.readouterr().err
    assert workshop.done == []


def test_rules_for_rows_are_tried_before_anything_is_done(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = (
        "{min_answer_characters: 1, max_characters: null, languages: null, unique_prompts: true}"
    )
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert cli.execute(["run", "--set", f"dpo.data.rules={rules}"]) == 2
    assert "rules.unique_prompts needs rensa, not installed; pip" in capsys.readouterr().err
    assert workshop.done == []
    assert cli.execute(["run", "--until", "prepare-sft"]) == 0


def test_the_strip_shows_where_the_run_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    chosen = pipeline.select("sft", None)
    pipeline._announce(chosen[1], chosen, 1)
    assert "✓ 07 sft  ▸ 08 prepare-dpo  · 09 dpo  · 10 lora" in capsys.readouterr().out
