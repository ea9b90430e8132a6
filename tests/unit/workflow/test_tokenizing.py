"""Step 03 on several shards: the same rows from any engine and any number of processes."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.unit.workflow.forked import kill_everywhere
from tests.unit.workflow.test_prepare import facts, make_recipe, own_texts

from sevenfold.base import faults, storage
from sevenfold.base.errors import SevenfoldError, UsageError
from sevenfold.base.records import Run
from sevenfold.data import clean, encoders
from sevenfold.data.encoders import Tokeniser
from sevenfold.data.shards import PackConfig, open_shards
from sevenfold.data.sources import source_from_path
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.workflow import evaluation, prepare, remaining, tokenizing

BEST_FIT = PackConfig(row_length=32, dtype="uint16", strategy="best_fit")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path / "run", facts={})


@pytest.fixture
def recipe(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the recipe of a run whose clean texts lie in several shards."""
    monkeypatch.setattr(clean, "SHARD_BYTES", 2_000)
    (tmp_path / "more").mkdir()
    more = source_from_path(own_texts(tmp_path / "more", 20))
    sources = (source_from_path(own_texts(tmp_path)), dataclasses.replace(more, name="more"))
    made = make_recipe(sources=sources, village=None)
    made.tokenizer = dataclasses.replace(made.tokenizer, vocab_size=320)
    made.clean = dataclasses.replace(made.clean, deduplicate="none")
    prepare.download(run, made)
    prepare.clean(run, made)
    assert len(list(run.data("clean").glob("train-*"))) > 3
    return made


def pack(run: Run, recipe: Any, num_workers: int = 1) -> dict[str, Any]:
    """Pack anew and return the manifest."""
    storage.remove_folder(run.data("packed"))
    prepare.tokenize_and_pack(run, recipe, num_workers=num_workers)
    assert not run.data("tokens").exists()
    return facts(run.data("packed"))


@pytest.mark.parametrize("strategy", ["concatenate", "best_fit"])
def test_one_process_and_four_make_the_same_shards(run: Run, recipe: Any, strategy: str) -> None:
    recipe.pack = dataclasses.replace(BEST_FIT, strategy=strategy)
    alone, shared = pack(run, recipe), pack(run, recipe, 4)
    assert alone == shared
    counts = alone["counts"]
    by_source = alone["tokens_by_source"]
    assert sorted(by_source) == ["more", "texts"]
    for split in ("train", "validation"):
        assert sum(found[split] for found in by_source.values()) == counts[split]["tokens"]
    assert alone["tokeniser"]["engine"] == "tokenizers"
    texts = [d["text"].encode() for d in clean.read_shards(run.data("clean"), "train")]
    assert alone["bytes_per_token"] == sum(map(len, texts)) / counts["train"]["tokens"]


def test_best_fit_pads_and_training_leaves_the_padding_out(run: Run, recipe: Any) -> None:
    plain = pack(run, recipe)
    assert plain["pad_id"] is None
    recipe.pack = BEST_FIT
    manifest = pack(run, recipe)
    pad_id, counts = manifest["pad_id"], manifest["counts"]["train"]
    found = open_shards(run.data("packed"), vocab_size=320, min_length=32)
    rows = found.train.rows(np.arange(found.train.num_rows))
    assert found.pad_id == pad_id == 2
    assert 0 < (rows == pad_id).sum() < rows.size / 2
    assert counts["tokens"] == plain["counts"]["train"]["tokens"] == (rows != pad_id).sum()
    assert (counts["documents"], counts["documents_cut"]) == (
        facts(run.data("clean"))["documents"]["train"],
        0,
    )
    # No text holds the padding, so the baseline of a gate must not count it.
    unigram = evaluation._unigram_counts(run, run.tokenizer, load_tokenizer(run.tokenizer))
    assert unigram is not None
    assert unigram[pad_id] == 0
    assert unigram.sum() == counts["tokens"]
    # It takes its time in training.
    epochs = SimpleNamespace(
        duration=SimpleNamespace(epochs=1), num_steps=lambda num_rows, row_length: num_rows
    )
    recipe: Any = SimpleNamespace(pretrain=epochs)
    assert remaining.num_steps(run, recipe, "pretrain") == len(rows)


def test_both_engines_make_the_same_shards(
    run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")
    recipe.tokenizer = dataclasses.replace(recipe.tokenizer, max_digits=3)
    slow = pack(run, recipe)
    monkeypatch.setattr(tokenizing, "WORTH_COMPARING_BYTES", 0)
    fast = pack(run, recipe)
    assert fast["tokeniser"]["engine"] == "gigatoken"
    num_documents = facts(run.data("clean"))["documents"]["train"]
    assert fast["tokeniser"]["checked_documents"] >= num_documents
    assert fast["fingerprint"] == slow["fingerprint"]


def test_why_the_slow_engine_is_used_is_said_once(
    run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Tokeniser(engine="tokenizers", version="1", checked_documents=7, why="because of it")
    monkeypatch.setattr(tokenizing, "WORTH_COMPARING_BYTES", 0)
    monkeypatch.setattr(encoders, "choose", lambda *_: slow)
    with caplog.at_level(logging.WARNING):
        manifest = pack(run, recipe)
    assert [record.message for record in caplog.records] == [
        "because of it; tokenizers 1 is used instead"
    ]
    assert manifest["tokeniser"] == slow.facts()


def test_padding_needs_a_token_of_its_own() -> None:
    made = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=1, added_tokens_decoder={})
    with pytest.raises(UsageError, match=r"no token to pad with .*raise tokenizer\.vocab_size and"):
        tokenizing.padding_id(made)
    made.added_tokens_decoder = {9: SimpleNamespace(content="<|reserved_0|>")}
    assert tokenizing.padding_id(made) == 9
    made.pad_token_id = 5
    assert tokenizing.padding_id(made) == 5


@pytest.mark.fault("A04")
def test_killed_at_any_file_operation_the_shards_are_the_same(run: Run, recipe: Any) -> None:
    """With several shards and best fit; test_prepare.py does the same to one shard."""
    recipe.pack = BEST_FIT
    wanted = pack(run, recipe)

    def start() -> None:
        shutil.rmtree(run.data("packed"))

    def check() -> None:
        prepare.tokenize_and_pack(run, recipe, num_workers=1)
        assert facts(run.data("packed")) == wanted
        assert sorted(path.name for path in run.data("x").parent.iterdir()) == [
            "clean",
            "packed",
            "raw",
        ]

    assert kill_everywhere(start, check) >= 40


@pytest.mark.fault("A04")
def test_a_killed_worker_ends_the_step_and_the_next_run_ends_it_well(
    run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pack(run, recipe)
    storage.remove_folder(run.data("packed"))
    monkeypatch.setattr(faults, "_operations_done", 10**6)  # so that only workers are hit
    monkeypatch.setenv(faults.VARIABLE, "kill@fs:13")
    with pytest.raises(SevenfoldError, match=r"worker process \d+ ended by SIGKILL before its wor"):
        prepare.tokenize_and_pack(run, recipe, num_workers=2)
    monkeypatch.delenv(faults.VARIABLE)
    kept = {path.name for path in run.data("tokens").glob("train-*.json")}
    assert kept
    assert not run.data("packed").exists()
    prepare.tokenize_and_pack(run, recipe, num_workers=2)
    assert facts(run.data("packed")) == wanted


def test_the_flag_reaches_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sevenfold.workflow import cli

    asked: list[Any] = []
    monkeypatch.setattr(
        prepare, "tokenize_and_pack", lambda run, recipe, **more: asked.append(more)
    )
    folder = str(tmp_path / "run")
    assert cli.execute(["tokenize", "--run", folder, "--workers", "3"]) == 0
    assert cli.execute(["tokenize", "--run", folder]) == 0
    assert cli.execute(["tokenize", "--run", folder, "--workers", "0"]) == 2
    assert asked == [{"num_workers": 3}, {"num_workers": None}]
