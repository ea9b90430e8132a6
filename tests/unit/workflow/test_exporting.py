"""Exported folders: copies byte for byte, GGUF compared with the model, nothing left otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sevenfold.base import storage
from sevenfold.base.records import Run, write_run
from sevenfold.workflow import cli


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})
    with storage.new_folder(made.model("sft"), kind="model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    made.write_record("sft", {"stage": "sft", "inputs": {}})
    return made


def test_export_copies_checked_bytes_and_says_what_the_gate_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "elsewhere" / "model"
    assert cli.execute(["export", str(run.folder), "sft", str(target)]) == 0
    assert "NOT promoted by its gate" in capsys.readouterr().out
    assert (target / "model.safetensors").read_bytes() == b"weights"
    original = storage.read_manifest(run.model("sft"))
    copied = storage.verify_folder(target)
    assert copied["fingerprint"] == original["fingerprint"]
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "**Not promoted by its gate**: not judged (there is no verdict)" in card
    assert str(run.folder.parent) not in card
    # No path of this machine goes with it.
    assert copied["exported_from"] == "run/sft"
    assert cli.execute(["export", str(run.folder), "sft", str(target)]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert cli.execute(["export", str(run.folder), "dpo", str(tmp_path / "x")]) == 2
    assert "run scripts/09_dpo.py first" in capsys.readouterr().err


def test_a_damaged_model_is_not_exported(run: Run, tmp_path: Path) -> None:
    (run.model("sft") / "config.json").write_text("[]")
    assert cli.execute(["export", str(run.folder), "sft", str(tmp_path / "x")]) == 4
    assert not (tmp_path / "x").exists()


def test_a_copy_that_differs_is_not_left(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "copyfile", lambda source, copy: copy.write_bytes(b"other"))
    assert cli.execute(["export", str(run.folder), "sft", str(tmp_path / "x")]) == 4
    assert "the copy differed from" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_adapter_is_exported_where_there_is_one(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run.folder), "sft", str(tmp_path / "x"), "--format", "adapter"]
    assert cli.execute(command) == 2
    assert "stage sft has no adapter; stage lora has one" in capsys.readouterr().err
    with storage.new_folder(run.stage("sft") / "adapter", kind="adapter") as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"few")
    assert cli.execute(command) == 0
    assert "adapter of stage sft" in capsys.readouterr().out
    assert (tmp_path / "x" / "adapter_model.safetensors").read_bytes() == b"few"
    assert cli.execute([*command[:-1], "model", "--type", "f16"]) == 2


def test_a_type_without_effect_is_an_error(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run.folder), "sft", str(tmp_path / "x"), "--type", "f16"]
    assert cli.execute(command) == 2
    assert "--type has no effect on --format model; leave it out" in capsys.readouterr().err


def test_a_gguf_file_is_exported_with_a_card_and_what_was_compared(
    talking_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    target = tmp_path / "x"
    command = ["export", str(talking_run.folder), "sft", str(target), "--format", "gguf"]
    assert cli.execute(command) == 0
    printed = capsys.readouterr().out
    name = f"{talking_run.folder.name}-sft-f32.gguf"
    assert f"{name}, 11 tensors read back and compared, logits at most 0 off" in printed
    manifest = storage.verify_folder(target, exact=True)
    assert [file["path"] for file in manifest["files"]] == ["README.md", name]
    model = storage.read_manifest(talking_run.model("sft"))["fingerprint"]
    assert (manifest["model_fingerprint"], manifest["weight_type"]) == (model, "f32")
    assert f'from_pretrained(folder, gguf_file="{name}")' in (target / "README.md").read_text()


def test_a_gguf_file_that_reads_back_otherwise_is_not_left(
    talking_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gguf")
    from sevenfold.model import gguf_file

    monkeypatch.setattr(gguf_file, "interleave", lambda name, values, config: values)
    command = ["export", str(talking_run.folder), "sft", str(tmp_path / "x"), "--format", "gguf"]
    assert cli.execute(command) == 4
    printed = capsys.readouterr().err
    assert "tensor 'blk.0.attn_k.weight' is not the model's" in printed
    assert ".partial" not in printed
    assert list(tmp_path.iterdir()) == []
