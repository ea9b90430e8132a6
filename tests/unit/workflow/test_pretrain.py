"""Pretraining goes on with the very files it began with, and says which of them is another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.pipeline import miniature

from sevenfold.base import storage
from sevenfold.base.errors import CheckpointError, UsageError
from sevenfold.base.records import Run, Source
from sevenfold.data import shards
from sevenfold.data.tokenizer import TokenizerConfig, adopt_tokenizer, train_tokenizer
from sevenfold.model import llama
from sevenfold.verify import data_card
from sevenfold.workflow import prepared, training
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.pretrain import pretrain, require_same_ids

CONFIG = TokenizerConfig(vocab_size=320, path=None, max_digits=1, sample_characters=1000)
SHARDS = ("a.npy", "b.npy", "validation.npy")


def write_shards(folder: Path) -> None:
    folder.mkdir()
    for seed, name in enumerate(SHARDS):
        np.save(folder / name, np.random.default_rng(seed).integers(0, 512, (8, 128)))


def flip_token(folder: Path) -> None:
    rows = np.load(folder / "b.npy")
    rows[3, 5] = (rows[3, 5] + 1) % 512
    np.save(folder / "b.npy", rows)


def flip_back(folder: Path) -> None:
    np.save(folder / "b.npy", np.random.default_rng(1).integers(0, 512, (8, 128)))


def add(folder: Path) -> None:
    np.save(folder / "c.npy", np.random.default_rng(9).integers(0, 512, (8, 128)))


def exchange(folder: Path) -> None:
    (folder / "a.npy").rename(folder / "other")
    (folder / "b.npy").rename(folder / "a.npy")
    (folder / "other").rename(folder / "b.npy")


CHANGES: dict[str, tuple[Any, str]] = {
    "changed": (flip_token, r"b\.npy: changed"),
    "added": (add, r"c\.npy: added"),
    "removed": (lambda folder: (folder / "b.npy").unlink(), r"b\.npy: removed"),
    "renamed": (
        lambda folder: (folder / "a.npy").rename(folder / "z.npy"),
        r"a\.npy: renamed to z\.npy",
    ),
    "reordered": (exchange, r"a\.npy: changed"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three shards and a run that was pretrained on them for a step."""
    folder = tmp_path_factory.mktemp("trained")
    write_shards(folder / "packed")
    train(folder)
    return folder


def train(folder: Path, *, resume: bool = True, force: str | None = None) -> None:
    plain = miniature.recipe()
    plain["pretrain"] = {**plain["pretrain"], "duration": {"steps": 1}}
    config = folder / "recipe.yaml"
    config.write_text(json.dumps(plain))
    run, recipe = recipes.resolve(config_file=config, run_folder=folder / "run")
    options = training.StageOptions(data=folder / "packed", resume=resume, force=force)
    pretrain(recipes.save(run), recipe, options)


@pytest.mark.fault("C12")
@pytest.mark.parametrize("change", CHANGES)
def test_other_shards_than_before_are_refused_by_name(
    trained: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    make, message = CHANGES[change]
    make(tmp_path / "copy" / "packed")
    message += r" since pretrain began to train on it; put it back as it was, or start the stage"
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path / "copy")


@pytest.mark.fault("C12")
def test_the_same_shards_are_gone_on_with_and_others_when_starting_again(
    trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    train(folder)
    flip_token(folder / "packed")
    train(folder, resume=False)
    train(folder)
    noted = storage.read_json(folder / "run" / "pretrain" / prepared.DATA_FILES)
    assert noted["b.npy"] == storage.sha256_file(folder / "packed" / "b.npy")


def test_where_a_checkpoint_fills_all_weights_in_those_to_start_from_are_not_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    stage = folder / "run" / "pretrain"
    (stage / "record.json").unlink()
    shutil.rmtree(stage / "model")
    read: list[Path] = []
    load = llama.load_model

    def noted(source: Path, *asked: Any, **how: Any) -> Any:
        read.append(source)
        return load(source, *asked, **how)

    monkeypatch.setattr(llama, "load_model", noted)
    train(folder)
    assert read == []
    whole = storage.read_manifest(trained / "run" / "pretrain" / "model")
    assert storage.read_manifest(stage / "model")["fingerprint"] == whole["fingerprint"]
    train(folder, resume=False)
    assert read == [folder / "run" / "init" / "model"]


def test_ids_are_looked_at_once_for_a_stage(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it goes on, with the bytes that it began with, it is enough that they are the same."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    looked: list[str] = []
    monkeypatch.setattr(shards, "_check_ids", lambda name, *_: looked.append(Path(name).name))
    monkeypatch.setattr(shards, "_check_repeats", lambda *_, **how: looked.append("repeats"))
    hash_files, hashed = storage.sha256_files, []

    def noted(where: Path, files: Any) -> dict[str, str]:
        hashed.append(where)
        return hash_files(where, files)

    monkeypatch.setattr(storage, "sha256_files", noted)
    train(folder)
    assert looked == []
    assert hashed.count(folder / "packed") == 1
    everything = ["a.npy", "b.npy", "validation.npy", "repeats"]
    train(folder, force="another model, perhaps")
    assert looked == everything * 2  # for the initial model's sake and for training's
    flip_token(folder / "packed")
    looked.clear()
    with pytest.raises(CheckpointError, match=r"b\.npy: changed"):
        train(folder)
    assert looked == everything
    flip_back(folder / "packed")
    shutil.rmtree(folder / "run" / "pretrain" / "checkpoints" / "step-00000001")
    looked.clear()
    train(folder)
    assert looked == everything * 2


def test_what_an_earlier_version_trained_cannot_be_set_back_to(
    trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    path = folder / "run" / "pretrain" / "record.json"
    record = storage.read_json(path)
    del record["config"]["keep_best"]
    storage.write_json(path, record)
    message = r"a version that had no config\.keep_best, now it is False; .*--no-resume, or go on"
    with pytest.raises(UsageError, match=message):
        train(folder)


@pytest.mark.fault("L08")
def test_packed_rows_from_outside_stand_in_the_data_card(trained: Path, tmp_path: Path) -> None:
    run = Run(folder=trained / "run", facts={})
    (shown,) = data_card.sources(run)
    assert (shown.name, shown.licence, shown.amount, shown.unit) == ("packed", "", 24, "rows")
    assert run.record("pretrain")["data_sources"][0]["licence"] == "unknown (given with --data)"
    known = [{"name": "books", "location": "texts", "licence": "CC0-1.0", "documents": 3}]
    with storage.new_folder(tmp_path / "ours", kind="packed", sources=known):
        pass
    assert prepared.packed_sources(tmp_path / "ours", 24) == known


def make_tokenizer(text: str, size: int) -> Any:
    return train_tokenizer([text] * 9, dataclasses.replace(CONFIG, vocab_size=size))


@pytest.mark.fault("G08")
def test_a_model_from_outside_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Its ids would stand for other words than those in the packed rows."""
    run = Run(folder=tmp_path / "run", facts={})
    theirs = make_tokenizer("The red lamp is on the table.", 300)
    theirs.save_pretrained(str(tmp_path / "outside"))
    taken_over = dataclasses.replace(CONFIG, path=str(tmp_path / "outside"))
    adopt_tokenizer(taken_over).save_pretrained(str(run.tokenizer))
    source = Source(folder=tmp_path / "outside", fingerprint="x", stage="external", external=True)
    require_same_ids(run, source, theirs)
    make_tokenizer("A big ship sails to the harbour.", 320).save_pretrained(str(run.tokenizer))
    with pytest.raises(
        UsageError,
        match=r"outside: another tokenizer than the run's, for which id \d+ is not .*; set "
        r"tokenizer\.path to this folder and run scripts/03_tokenize_and_pack\.py again, or give",
    ):
        require_same_ids(run, source, theirs)
