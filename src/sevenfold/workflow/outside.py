"""A model from outside takes the place of the stage before, and that stage's gate judges it."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from sevenfold.base import records, storage
from sevenfold.base.console import print_line
from sevenfold.base.errors import BadDataError, GateRefusedError, SevenfoldError, UsageError
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.model import llama
from sevenfold.model.config import describe_folder
from sevenfold.workflow import evaluation, prepared, training
from sevenfold.workflow.recipe import Recipe, gates_file

log = logging.getLogger(__name__)

FILES = ("config.json", "generation_config.json", *llama.TOKENIZER_FILES)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def take_in(run: records.Run, recipe: Recipe, stage: str, folder: Path, force: str | None) -> None:
    """Copy the model in ``folder`` to where ``stage`` is to start from, and judge it there.

    Its gate is that of the stage whose place it takes, without comparisons with stages before that.
    A refusal is left to the stage that opens it; with ``force`` so is what cannot be measured.

    Errors:
        UsageError: it is no complete Hugging Face folder, its rows are longer than the model
            reads, or the run has another model in that place.
        BadDataError: its tokenizer has more entries than the model has rows, or a file of its
            weights is missing or cut short.
    """
    before = records.STAGES[records.STAGES.index(stage) - 1]
    if before == "init":
        return
    folder = folder.resolve()
    config = describe_folder(folder)
    prepared.require_context(folder, recipe, stage)
    _require_whole(folder)
    llama.check_vocabulary(load_tokenizer(folder), folder, config.vocab_size, exact=False)
    _copy(run, before, folder, training.outside_fingerprint(folder))
    try:
        _judge(run, recipe, before)
    except GateRefusedError as refusal:
        log.warning("%s", refusal)
    except SevenfoldError as problem:
        if force is None:
            raise
        log.warning("%s; gone on by force", problem)


def _require_whole(folder: Path) -> None:
    """Refuse a folder whose download did not finish, before it takes a stage's place."""
    from safetensors import SafetensorError, safe_open

    llama.require_safetensors(folder)
    paths = set(folder.glob(WEIGHTS[0]))
    for index in folder.glob(WEIGHTS[1]):
        paths |= {folder / name for name in storage.read_json(index).get("weight_map", {}).values()}
    for path in sorted(paths):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise BadDataError(f"{path}: not whole ({error}); download the model again") from error


def _copy(run: records.Run, stage: str, folder: Path, identity: str) -> None:
    """Put the files of a model in the place of ``stage``; nothing where they are there already."""
    if (run.stage(stage) / "record.json").is_file():
        if run.record(stage).get("outside", {}).get("fingerprint") == identity:
            return
        raise UsageError(
            f"{run.stage(stage)}: this run has another {stage} model than {folder}; name a new run "
            "with --run, or leave --start-from out"
        )
    paths = [folder / name for name in FILES if (folder / name).is_file()]
    paths += [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    size = sum(path.stat().st_size for path in paths)
    started_s = time.perf_counter()
    with storage.new_folder(run.model(stage), kind="model", needed_bytes=size) as new:
        for path in paths:
            shutil.copyfile(path, new / path.name)
    record: dict[str, Any] = {
        "stage": stage,
        "fingerprint": storage.read_manifest(run.model(stage))["fingerprint"],
        "inputs": {"model": identity},
        "config": {},
        "metrics": {},
        "external": True,
        "outside": {"name": folder.name, "fingerprint": identity},
        "files": records.own_files(run.stage(stage)),
        "elapsed_s": time.perf_counter() - started_s,
        "finished_at_s": time.time(),
        "cost": None,
        "code": records.code_version(),
        "versions": records.package_versions(),
    }
    run.write_record(stage, record)
    print_line(f"{stage}: {folder} taken in, in the place of a model of this run's own")


def _judge(run: records.Run, recipe: Recipe, stage: str) -> None:
    """Measure and judge, where that has not been done for these bytes."""
    path = run.stage(stage) / evaluation.VERDICT
    found = run.record(stage)["fingerprint"]
    if path.is_file() and storage.read_json(path).get("fingerprint") == found:
        return
    evaluation.evaluate_stage(run, recipe, stage)
    evaluation.check_stage(run, recipe, stage, gates_file())
