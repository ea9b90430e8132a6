"""Commands that look at a run, on a small run made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sevenfold.base import storage
from sevenfold.base.records import Run, write_run
from sevenfold.workflow import cli


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})
    with storage.new_folder(made.data("raw"), kind="raw", inputs={"village": "0" * 64}) as folder:
        (folder / "documents.jsonl").write_text('{"text": "a"}\n')
    raw = storage.read_manifest(made.data("raw"))["fingerprint"]
    with storage.new_folder(made.data("clean"), kind="clean", inputs={"raw": raw}) as folder:
        (folder / "train.jsonl").write_text('{"text": "a"}\n')
    with storage.new_folder(made.model("sft"), kind="model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    made.write_record("sft", {"stage": "sft", "inputs": {}})
    lines = storage.JsonLines(made.stage("sft") / "metrics.jsonl")
    lines.append({"step": 10, "loss": 2.5, "tok_s": 1000.0})
    lines.append({"step": 20, "loss": 1.25, "tok_s": 2000.0})
    return made


def test_verify_counts_what_it_checked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["verify", str(run.folder)]) == 0
    assert "3 folders, 10 files, all as written" in capsys.readouterr().out


def test_verify_names_what_is_damaged(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.model("sft") / "model.safetensors").write_bytes(b"weirdos")
    assert cli.execute(["verify", str(run.folder)]) == 4
    printed = capsys.readouterr().err
    assert "1 not as written, first " in printed
    assert "model.safetensors: its SHA-256 is not the manifest's" in printed


def test_lineage_follows_fingerprints(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["lineage", str(run.folder)]) == 0
    printed = capsys.readouterr().out
    raw = storage.read_manifest(run.data("raw"))["fingerprint"][:12]
    assert f"data/raw (here, {raw})" in printed
    assert "outside" in printed


def test_lineage_says_how_by_what_and_from_whose_texts_a_model_was_made(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with storage.new_folder(
        run.data("sft"), kind="sft", sources=[{"name": "dolly", "licence": "CC-BY-SA-3.0"}]
    ) as folder:
        (folder / "rows").write_text("")
    record = {
        "stage": "sft",
        "config_fingerprint": "c" * 64,
        "seed": 4711,
        "code": "0.1.0+abc",
        "gpu": "NVIDIA H100",
        "num_gpus": 8,
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
    }
    run.write_record("sft", record)
    storage.write_json(run.stage("sft") / "evaluation.json", {"data": {"hats": "1" * 64}})
    assert cli.execute(["lineage", str(run.folder)]) == 0
    printed = capsys.readouterr().out
    assert f"recipe {run.facts['fingerprint'][:12]}" in printed
    [line] = [line for line in printed.splitlines() if "4711" in line]
    for part in (
        "cccccccccccc ",
        "0.1.0+abc",
        "8 \N{MULTIPLICATION SIGN} NVIDIA H100",
        "torch 2.13.0",
        "1 task, ",
    ):
        assert part in line
    assert line.split("│")[-2].strip() == "not judged"
    [source] = [line for line in printed.splitlines() if "dolly" in line]
    assert "SFT rows" in source
    assert "CC-BY-SA-3.0" in source


@pytest.mark.fault("K13")
def test_lineage_tells_which_gates_were_gone_past(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    past = [{"stage": "pretrain", "reason": "a trial"}]
    run.write_record("sft", {**run.record("sft"), "forced_promotions": past})
    assert cli.execute(["lineage", str(run.folder)]) == 0
    said = "sft rests on pretrain, whose gate was gone past: a trial"
    assert said in capsys.readouterr().out


def test_watch_shows_the_newest_step(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["watch", str(run.folder), "--once"]) == 0
    assert capsys.readouterr().out == "sft step 20  loss 1.2500  2,000 tok/s\n"


def test_watch_of_a_run_that_has_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "new", preset="demo", recipe={})
    assert cli.execute(["watch", str(tmp_path / "new"), "--once"]) == 0
    assert "nothing has trained yet" in capsys.readouterr().out


def test_doctor_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    installed = metadata.version

    def version(name: str) -> str:
        if name == "liger-kernel":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    assert cli.execute(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "pip install -e '.[kernels]'" in printed
    assert "transformers" in printed
    assert "free disk" in printed


def test_report_is_written(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["report", str(run.folder)]) == 0
    assert capsys.readouterr().out == f"{run.folder / 'report.html'}\n"
    assert (run.folder / "report.html").is_file()
