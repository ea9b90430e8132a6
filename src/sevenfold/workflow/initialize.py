"""Stage init: draw the initial model, check it, and save it."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from sevenfold.base import storage
from sevenfold.base.config import to_plain
from sevenfold.base.console import print_line
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import detect_gpu_type, training_device
from sevenfold.base.records import Run, code_version, own_files, package_versions
from sevenfold.model import llama

if TYPE_CHECKING:
    from sevenfold.workflow.recipe import Recipe

STAGE = "init"


def initialize(run: Run, recipe: Recipe, *, ids_only: bool = False) -> dict[str, Any]:
    """Make the run's initial model and return its record; nothing is done where it is there.

    With ``ids_only`` there need be no tokenizer: the model is to be trained on packed ids.

    Errors:
        UsageError: there is no tokenizer yet, or the untrained model's loss is not that of
            one that knows nothing.
        BadDataError: the tokenizer has another number of entries than the model has rows.
    """
    asked = {"seed": recipe.seed, "model": to_plain(recipe.model), "init": to_plain(recipe.init)}
    inputs = {}
    if not ids_only or run.tokenizer.is_dir():
        manifest = storage.read_manifest(run.tokenizer, made_by="scripts/03_tokenize_and_pack.py")
        inputs = {"tokenizer": manifest["fingerprint"]}
    if (record := _finished(run, inputs, asked)) is not None:
        print_line(f"init: {run.model(STAGE)} is up to date")
        return record
    started_s = time.perf_counter()
    dtype = llama.DTYPES[recipe.init.dtype]
    if inputs:
        tokenizer = llama.load_tokenizer(run.tokenizer)
        llama.check_vocabulary(tokenizer, run.tokenizer, recipe.model.vocab_size)
    model = llama.initialize(recipe.model, recipe.init, recipe.seed, dtype, training_device())
    start = llama.check_start(model, recipe.seed)
    saved = llama.save_model(
        model, run.tokenizer, run.model(STAGE), dtype, inputs=inputs, config=asked
    )
    record = {
        "stage": STAGE,
        "inputs": inputs,
        "config": asked,
        "fingerprint": saved["fingerprint"],
        "metrics": dataclasses.asdict(start),
        "elapsed_s": time.perf_counter() - started_s,
        "finished_at_s": time.time(),
        "gpu": detect_gpu_type()["name"],
        "cost": None,
        "seed": recipe.seed,
        "code": code_version(),
        "versions": package_versions(),
        "files": own_files(run.stage(STAGE)),
    }
    run.write_record(STAGE, record)
    print_line(
        f"init: {start.num_parameters:,} parameters, loss {start.loss:.3f} on random tokens, "
        f"model in {run.model(STAGE)}"
    )
    return record


def _finished(run: Run, inputs: dict[str, str], asked: dict[str, Any]) -> dict[str, Any] | None:
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
