"""A run on disk, and the door that opens promoted models only."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import records, storage
from sevenfold.base.errors import BadDataError, GateRefusedError, UsageError


@pytest.fixture
def run(tmp_path: Path) -> records.Run:
    return records.write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})


def finish(run: records.Run, stage: str, weights: str = "weights") -> str:
    with storage.new_folder(run.model(stage), kind="model") as folder:
        (folder / "model.safetensors").write_text(weights)
    found = str(storage.read_manifest(run.model(stage))["fingerprint"])
    run.write_record(stage, {"stage": stage, "fingerprint": found})
    return found


def judge(run: records.Run, stage: str, verdict: dict[str, Any]) -> None:
    path = run.stage(stage) / "verdict.json"
    storage.write_json(path, verdict)
    evidence = {"verdict_sha256": storage.sha256_file(path)}
    for name, key in records.EVIDENCE.items():
        storage.write_text(run.stage(stage) / name, "measured")
        evidence[key] = storage.sha256_file(run.stage(stage) / name)
    run.write_record(stage, {**run.record(stage), "evidence": evidence})


def test_a_run_is_written_and_opened(run: records.Run) -> None:
    opened = records.open_run(run.folder)
    assert (opened.preset, opened.recipe) == ("demo", {"seed": 1})
    assert opened.facts["versions"]["torch"]
    assert opened.facts["code"].startswith("0.")
    assert opened.data("clean") == run.folder / "data" / "clean"
    assert opened.tokenizer == run.folder / "tokenizer"


@pytest.mark.fault("L11", "K12")
@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torch", "2.9.1+cu128", r"torch 2\.9\.1\+cu128 .* 2\.10 is needed \(CVE-2026-24747"),
        ("torch", "1.13", "at least 2.10 is needed"),
        ("jinja2", "3.1.5", r"pip install --upgrade 'jinja2>=3\.1\.6'"),
        ("transformers", "4.57.3", r"at least 5\.0 is needed \(CVE-2026-1839"),
        ("transformers", None, r"is not installed; pip install --upgrade 'transformers>=5\.0'"),
    ],
)
def test_a_package_with_a_known_hole_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, message: str
) -> None:
    records.require_packages()
    installed = importlib.metadata.version

    def look(asked: str) -> str:
        if asked == name and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(version) if asked == name else installed(asked)

    monkeypatch.setattr(importlib.metadata, "version", look)
    with pytest.raises(UsageError, match=message):
        records.require_packages()


@pytest.mark.fault("L11")
def test_the_project_asks_for_nothing_older_than_the_floors() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups()  # type: ignore[union-attr]
        for line in tomllib.loads(text)["project"]["dependencies"]
    )
    wanted = {"torch": [2, 10], "jinja2": [3, 1, 6], "transformers": [5]}
    assert set(wanted) == set(records.FLOORS)
    for name, floor in wanted.items():
        assert records._numbers(asked[name]) >= records._numbers(records.FLOORS[name][0]) >= floor


def test_changed_settings_keep_the_birthday(run: records.Run) -> None:
    again = records.write_run(run.folder, preset="demo", recipe={"seed": 2})
    assert again.facts["created_at_s"] == run.facts["created_at_s"]
    assert again.facts["fingerprint"] != run.facts["fingerprint"]


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run here; name an existing one with --run"):
        records.open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"preset": "demo"}')
    with pytest.raises(UsageError, match="field 'recipe' is missing; this is not a run"):
        records.open_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BadDataError, match="not valid JSON"):
        records.open_run(tmp_path)


def test_an_unknown_stage_is_refused(run: records.Run) -> None:
    with pytest.raises(
        UsageError, match="stage 'pretrian' does not exist; did you mean 'pretrain'"
    ):
        run.stage("pretrian")


def test_a_stage_that_has_not_finished_names_its_script(run: records.Run) -> None:
    with pytest.raises(UsageError, match=r"sft has not finished yet; run scripts/07_sft\.py first"):
        run.record("sft")
    with pytest.raises(UsageError, match=r"run scripts/04_init_model\.py first"):
        records.open_promoted(run, "init")


def test_the_initial_model_needs_no_verdict(run: records.Run) -> None:
    found = finish(run, "init")
    source = records.open_promoted(run, "init")
    assert (source.fingerprint, source.forced) == (found, None)


@pytest.mark.fault("A13")
def test_a_model_that_its_record_is_not_about_is_refused(run: records.Run) -> None:
    """As after a kill between the model and its record, or with another model put in its place."""
    found = finish(run, "init")
    before = run.record("init")
    assert finish(run, "init", "drawn again") != found
    run.write_record("init", before)
    with pytest.raises(
        BadDataError, match=r"not the model that .*record\.json is about; run scripts/04_init_model"
    ):
        records.open_promoted(run, "init")


@pytest.mark.fault("K07")
def test_only_a_pass_for_these_bytes_opens(run: records.Run) -> None:
    found = finish(run, "pretrain")
    with pytest.raises(GateRefusedError, match=r"has not been judged; run scripts/11_evaluate\.py"):
        records.open_promoted(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": "other", "promoted": True, "checks": []})
    with pytest.raises(GateRefusedError, match=r"another model .*12_check_gates\.py pretrain"):
        records.open_promoted(run, "pretrain")
    checks = [{"metric": "perplexity", "result": "fail"}, {"metric": "x", "result": "pass"}]
    judge(run, "pretrain", {"fingerprint": found, "promoted": False, "checks": checks})
    with pytest.raises(GateRefusedError, match=r"not promoted \(perplexity fail\).*--force"):
        records.open_promoted(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    assert records.open_promoted(run, "pretrain").forced is None


@pytest.mark.fault("K07")
def test_an_edited_verdict_is_refused(run: records.Run) -> None:
    found = finish(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": False, "checks": []})
    path = run.stage("pretrain") / "verdict.json"
    verdict = json.loads(path.read_text()) | {"promoted": True}
    path.write_text(json.dumps(verdict))
    with pytest.raises(GateRefusedError, match="verdict was changed after the gate wrote it; run"):
        records.open_promoted(run, "pretrain")


@pytest.mark.fault("K07")
@pytest.mark.parametrize("name", records.EVIDENCE)
def test_edited_evidence_of_a_verdict_is_refused(run: records.Run, name: str) -> None:
    found = finish(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    path = run.stage("pretrain") / name
    assert records.open_promoted(run, "pretrain").forced is None
    path.write_text("improved")
    message = f"{name}: not the evidence that the gate judged; run scripts/11_evaluate"
    with pytest.raises(GateRefusedError, match=message):
        records.open_promoted(run, "pretrain")
    path.unlink()
    with pytest.raises(GateRefusedError, match=message):
        records.open_promoted(run, "pretrain")
    record = run.record("pretrain")
    del record["evidence"][records.EVIDENCE[name]]
    run.write_record("pretrain", record)
    with pytest.raises(GateRefusedError, match=message):
        records.open_promoted(run, "pretrain")


@pytest.mark.fault("K07")
def test_a_record_whose_seal_was_taken_off_opens_nothing(run: records.Run) -> None:
    found = finish(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    path = run.stage("pretrain") / "record.json"
    path.write_text(json.dumps(run.record("pretrain")))
    with pytest.raises(BadDataError, match=r"seal is missing; .* away and run scripts/05_pretrain"):
        records.open_promoted(run, "pretrain")
    begun_before_seals = records.Run(folder=run.folder, facts={**run.facts, "sealed": False})
    assert records.open_promoted(begun_before_seals, "pretrain").forced is None


def test_a_verdict_from_before_the_record_is_refused(run: records.Run) -> None:
    found = finish(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    assert finish(run, "pretrain") == found
    with pytest.raises(GateRefusedError, match=r"older than .*record\.json; run scripts/11_eval"):
        records.open_promoted(run, "pretrain")


def test_a_file_that_was_put_beside_a_promoted_model_is_refused(run: records.Run) -> None:
    found = finish(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    (run.model("pretrain") / "chat_template.jinja").write_text("of another model")
    with pytest.raises(
        BadDataError, match=r"chat_template\.jinja: not one of the files.*remove it"
    ):
        records.open_promoted(run, "pretrain")


def test_a_changed_weight_is_noticed(run: records.Run) -> None:
    found = finish(run, "pretrain")
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    (run.model("pretrain") / "model.safetensors").write_text("weirdos")
    with pytest.raises(BadDataError, match="SHA-256 is not the manifest's"):
        records.open_promoted(run, "pretrain")


@pytest.mark.fault("K13")
def test_force_is_kept_where_it_was_needed_only(run: records.Run) -> None:
    found = finish(run, "pretrain")
    assert records.open_promoted(run, "pretrain", force="a test").forced == "a test"
    judge(run, "pretrain", {"fingerprint": found, "promoted": True, "checks": []})
    assert records.open_promoted(run, "pretrain", force="a test").forced is None


def test_a_model_whose_ancestor_was_trained_again_is_refused(run: records.Run) -> None:
    old = finish(run, "pretrain")
    finish(run, "sft", "tuned")
    run.write_record("sft", {**run.record("sft"), "inputs": {"model": old}})
    finish(run, "dpo", "aligned")
    with pytest.raises(GateRefusedError):
        records.open_promoted(run, "dpo")
    finish(run, "pretrain", "trained again")
    with pytest.raises(UsageError, match=r"earlier pretrain model .*07_sft.py --no-resume"):
        records.open_promoted(run, "dpo")
