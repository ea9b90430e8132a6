"""Stage init: draw the initial model, check it, and save it."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sevenfold.base import storage
from sevenfold.base.config import to_plain
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import detect_gpu_type, training_device
from sevenfold.base.records import Run, code_version, package_versions
from sevenfold.model.config import ModelConfig, read_model_file
from sevenfold.model.llama import (
    DTYPES,
    check_start,
    check_vocabulary,
    initialize as draw_model,
    load_tokenizer,
    save_model,
)

if TYPE_CHECKING:
    from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)
STAGE = "init"


def initialize(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Make the run's initial model and return its record; nothing is done where it is there.

    Errors:
        UsageError: there is no tokenizer yet, the model file is wrong, or the untrained model's
            loss is not that of one that knows nothing.
        BadDataError: the tokenizer has another number of entries than the model has rows.
    """
    config = read_model_file(Path(recipe.model))
    asked = {"seed": recipe.seed, "model": to_plain(config), "init": to_plain(recipe.init)}
    manifest = storage.read_manifest(run.tokenizer, made_by="scripts/03_tokenize_and_pack.py")
    inputs = {"tokenizer": manifest["fingerprint"]}
    if (record := _finished(run, inputs, asked)) is not None:
        log.info("init: %s is up to date", run.model(STAGE))
        return record
    started_at_s = time.time()
    dtype = DTYPES[recipe.init.dtype]
    check_vocabulary(load_tokenizer(run.tokenizer), run.tokenizer, config.vocab_size)
    model = draw_model(config, recipe.init, recipe.seed, dtype, training_device())
    start = check_start(model, recipe.seed)
    saved = save_model(model, run.tokenizer, run.model(STAGE), dtype, inputs=inputs, config=asked)
    record = {
        "stage": STAGE,
        "inputs": inputs,
        "config": asked,
        "fingerprint": saved["fingerprint"],
        "metrics": dataclasses.asdict(start),
        "started_at_s": started_at_s,
        "elapsed_s": time.time() - started_at_s,
        "gpu": detect_gpu_type()["name"],
        "cost": None,
        "code": code_version(),
        "versions": package_versions(),
    }
    run.write_record(STAGE, record)
    return record


def _finished(
    run: Run, inputs: dict[str, str], asked: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the record of a finished stage if it was made from the same things, or None."""
    try:
        record, manifest = run.record(STAGE), storage.read_manifest(run.model(STAGE))
    except UsageError:
        return None
    same = (
        record.get("inputs") == inputs
        and record.get("config") == asked
        and record.get("fingerprint") == manifest["fingerprint"]
    )
    return record if same else None


def read_model(recipe: Recipe) -> ModelConfig:
    """Return the architecture that the recipe names."""
    return read_model_file(Path(recipe.model))
