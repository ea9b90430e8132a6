"""What `verify` finds in runs made by hand; a whole run, file by file, is in tests/pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sevenfold.base import records, storage
from sevenfold.base.records import Run, write_run
from sevenfold.train.recovery import Decisions
from sevenfold.verify.integrity import examine
from sevenfold.workflow import cli

STAGE = "sft"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})
    with storage.new_folder(made.model(STAGE), kind="model") as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
    with storage.new_folder(made.stage(STAGE) / "checkpoints" / "step-1", kind="c") as folder:
        (folder / "state.json").write_text("{}")
    storage.JsonLines(made.stage(STAGE) / "metrics.jsonl").append({"step": 1})
    decisions = Decisions(made.stage(STAGE) / "recovery.json")
    decisions.save()
    files = records.own_files(made.stage(STAGE))
    assert list(files) == ["metrics.jsonl", "model/manifest.json", "recovery.json"]
    made.write_record(STAGE, {"stage": STAGE, "files": files})
    return made


def problems(run: Run) -> list[str]:
    return [str(problem) for problem in examine(run.folder).problems.values()]


def test_a_run_as_written(run: Run) -> None:
    found = examine(run.folder)
    assert not found.problems
    assert found.num_folders == 2
    # Two in folders; two manifests, run.json, record.json, recovery.json, metrics.jsonl.
    assert found.num_files == 8


def test_only_checkpoints_damaged_is_told_from_the_rest(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run.stage(STAGE) / "checkpoints" / "step-1" / "state.json"
    state.write_text("[]")
    assert cli.execute(["verify", str(run.folder)]) == 5
    assert f"first {state}: its SHA-256 is not the manifest's" in capsys.readouterr().err
    (run.model(STAGE) / "model.safetensors").write_bytes(b"weirdos")
    assert cli.execute(["verify", str(run.folder)]) == 4
    assert "2 not as written, first " in capsys.readouterr().err


def test_what_the_record_lists_and_is_gone(run: Run) -> None:
    (run.stage(STAGE) / "recovery.json").unlink()
    [problem] = problems(run)
    assert problem.endswith("record.json lists it")


@pytest.mark.parametrize("name", ["verdict", "judge", "evaluation"])
def test_evidence_that_the_record_does_not_know(run: Run, name: str) -> None:
    path = run.stage(STAGE) / f"{name}.json"
    storage.write_json(path, {"promoted": True})
    [problem] = problems(run)
    assert "record.json does not list it; run step 11, then 12, again" in problem
    evidence = {f"{name}_sha256": storage.sha256_file(path)}
    run.write_record(STAGE, {**run.record(STAGE), "evidence": evidence})
    assert problems(run) == []


def test_a_file_replaced_by_another_that_is_sealed_as_well(run: Run) -> None:
    path = run.stage(STAGE) / "recovery.json"
    storage.write_json(path, {"micro_batches": [], "detours": [[1, 2]]})
    [problem] = problems(run)
    assert problem.startswith(f"{path}: not the file that ")


def test_a_model_without_a_record(run: Run) -> None:
    (run.stage(STAGE) / "record.json").unlink()
    [problem] = problems(run)
    assert "record.json: missing, though there is model; run the step again" in problem


def test_a_stage_that_was_set_aside_is_looked_at_too(run: Run) -> None:
    run.stage(STAGE).rename(run.folder / f"{STAGE}.old-1")
    assert problems(run) == []
    lines = run.folder / f"{STAGE}.old-1" / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b"1", b"7", 1))
    [problem] = problems(run)
    assert "metrics.jsonl:1: not as written" in problem


def test_a_folder_that_is_gone_and_something_was_made_from_it(run: Run) -> None:
    made = {run.tokenizer: {}, run.data("packed"): {"tokenizer": "a"}, run.data("sft"): {}}
    for folder, inputs in made.items():
        with storage.new_folder(folder, kind="any", inputs=inputs) as new:
            (new / "rows.npy").write_bytes(b"rows")
    record = {**run.record(STAGE), "inputs": {"model": "a", "data": "a"}}
    run.write_record(STAGE, {**record, "external": True})
    assert problems(run) == []
    shutil.rmtree(run.data("sft"))
    shutil.rmtree(run.tokenizer)
    assert problems(run) == [
        f"{run.tokenizer}: missing, though data/packed was made from it; put it back",
        f"{run.data('sft')}: missing, though sft was made from it; put it back",
    ]
    run.write_record(STAGE, record | {"data_sources": []})
    assert problems(run) == [
        f"{run.tokenizer}: missing, though data/packed was made from it; put it back",
        f"{run.model('pretrain')}: missing, though sft was made from it; put it back",
    ]


def test_a_folder_on_another_disk_is_looked_at_through_its_link(run: Run, tmp_path: Path) -> None:
    run.model(STAGE).rename(tmp_path / "elsewhere")
    run.model(STAGE).symlink_to(tmp_path / "elsewhere")
    assert problems(run) == []
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"weirdos")
    [problem] = problems(run)
    assert "model.safetensors: its SHA-256 is not the manifest's" in problem


@pytest.mark.parametrize("target", ["nowhere", "..", "/etc"])
@pytest.mark.parametrize("place", [".", "sft", "sft/model"])
def test_a_link_that_nothing_lists(run: Run, target: str, place: str) -> None:
    link = run.folder / place / "link"
    link.symlink_to(target)
    found = problems(run)
    assert found
    assert all(str(link) in problem for problem in found)


def test_a_seal_that_was_taken_off(run: Run) -> None:
    path = run.folder / "run.json"
    path.write_text(json.dumps(storage.read_json(path)))
    [problem] = problems(run)
    assert problem.startswith(f"{path}: its seal is damaged or missing")


def test_an_empty_file_for_the_run_itself(run: Run) -> None:
    (run.folder / "run.json").write_bytes(b"")
    assert problems(run)


def test_a_run_of_a_version_before_seals(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is called damaged that could not be checked, and it is said what that is."""
    for path in run.folder.rglob("*.json"):
        kept = storage.read_json(path)
        kept.pop("sealed", None)
        path.write_text(json.dumps(kept))
    lines = run.stage(STAGE) / "metrics.jsonl"
    lines.write_text('{"step": 1}\n')
    record = storage.read_json(run.stage(STAGE) / "record.json")
    del record["files"]
    (run.stage(STAGE) / "record.json").write_text(json.dumps(record))
    assert cli.execute(["verify", str(run.folder)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "begun before files that stand alone had a seal, so 6 of them could not" in printed
    assert "manifest.json, metrics.jsonl, record.json, recovery.json, run.json" in printed
    assert "2 folders, 2 files, all as written" in printed
    # This version goes on with it, and seals what it writes.
    write_run(run.folder, preset="demo", recipe={"seed": 2})
    storage.write_sealed_text(run.folder / "report.html", "<html></html>")
    assert cli.execute(["verify", str(run.folder)]) == 0
    assert "so 5 of them could not" in " ".join(capsys.readouterr().out.split())
    (run.model(STAGE) / "model.safetensors").write_bytes(b"weirdos")
    assert cli.execute(["verify", str(run.folder)]) == 4
