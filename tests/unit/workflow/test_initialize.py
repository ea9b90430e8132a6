"""Stage init: made once, made anew when something changed, refused before anything is written."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, cast

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.records import Run, open_promoted
from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.workflow.initialize import initialize
from sevenfold.workflow.recipe import Recipe

VOCAB = 320


def recipe(*, seed: int = 0, std: float = 0.06, vocab_size: int = VOCAB) -> Recipe:
    """The three parts of a recipe that this stage reads."""
    model = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        max_seq_len=32,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    init = InitConfig(std=std, scale_residual=True, dtype="bfloat16")
    return cast("Recipe", types.SimpleNamespace(seed=seed, model=model, init=init))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(folder=tmp_path / "run", facts={"preset": "demo", "recipe": {}, "fingerprint": ""})
    config = TokenizerConfig(vocab_size=VOCAB, path=None, max_digits=1, sample_characters=1000)
    with storage.new_folder(run.tokenizer, kind="tokenizer") as folder:
        train_tokenizer(["The red lamp is red."] * 3, config).save_pretrained(folder)
    return run


def files(run: Run) -> dict[Path, tuple[int, bytes]]:
    paths = (path for path in run.stage("init").rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_the_record_says_what_was_made_of_what(run: Run) -> None:
    record: dict[str, Any] = initialize(run, recipe())
    assert run.record("init") == record
    assert record["stage"] == "init"
    tokenizer = storage.read_manifest(run.tokenizer)["fingerprint"]
    assert record["inputs"] == {"tokenizer": tokenizer}
    assert record["fingerprint"] == storage.verify_folder(run.model("init"))["fingerprint"]
    assert record["config"]["init"]["std"] == 0.06
    assert record["metrics"]["loss"] == pytest.approx(record["metrics"]["expected_loss"], rel=0.05)
    assert record["metrics"]["num_parameters"] == recipe().model.num_parameters
    assert {"elapsed_s", "gpu", "cost", "seed", "code", "versions"} <= set(record)
    assert storage.read_json(run.model("init") / "config.json")["dtype"] == "bfloat16"
    assert open_promoted(run, "init").fingerprint == record["fingerprint"]


def test_unchanged_is_left_alone_and_changed_is_made_anew(run: Run) -> None:
    first = initialize(run, recipe())
    before = files(run)
    assert initialize(run, recipe()) == first
    assert files(run) == before
    other = initialize(run, recipe(seed=1))
    assert other["fingerprint"] != first["fingerprint"]
    assert initialize(run, recipe())["fingerprint"] == first["fingerprint"]


def test_a_model_without_its_record_is_made_again(run: Run) -> None:
    """As after a kill between the two writes."""
    first = initialize(run, recipe())
    (run.stage("init") / "record.json").unlink()
    assert initialize(run, recipe())["fingerprint"] == first["fingerprint"]


def test_refusals_write_nothing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="320 entries, but the model has 512 vocabulary rows"):
        initialize(run, recipe(vocab_size=512))
    with pytest.raises(UsageError, match=r"set a smaller init\.std"):
        initialize(run, recipe(std=3.0))
    assert not run.stage("init").exists()
    empty = Run(folder=tmp_path / "empty", facts=run.facts)
    with pytest.raises(UsageError, match=r"run scripts/03_tokenize_and_pack\.py first"):
        initialize(empty, recipe())
