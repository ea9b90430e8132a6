"""Steps 11 and 12: measure the model of a stage, and judge what was measured."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sevenfold.base import storage
from sevenfold.base.config import fingerprint, to_plain
from sevenfold.base.console import print_line, print_table, working
from sevenfold.base.errors import BadDataError, GateRefusedError, SevenfoldError, UsageError
from sevenfold.base.hardware import training_device
from sevenfold.base.records import EVIDENCE, Run, code_version, package_versions
from sevenfold.data.clean import read_shards
from sevenfold.data.tokenizer import encode_texts, load_tokenizer
from sevenfold.model.llama import TOKENIZER_FILES, load_model
from sevenfold.verify import gates, harness, model_card
from sevenfold.verify.adapters import adapter_metrics
from sevenfold.verify.config import EvaluateConfig, TaskConfig
from sevenfold.verify.evaluate import Evaluation, evaluate_model
from sevenfold.verify.judge import JUDGED
from sevenfold.verify.likelihood import token_counts
from sevenfold.verify.tasks import Task, read_task
from sevenfold.workflow import contamination, judging
from sevenfold.workflow.contamination import items_sha256, task_file, task_paths
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.thresholds import require_known_gates
from sevenfold.workflow.training import other_tokenizer_file

log = logging.getLogger(__name__)

EVALUATION, ITEMS = EVIDENCE
VERDICT = "verdict.json"
UNIGRAM = "unigram"
ADAPTER_ROWS = 8
# More text moves the unigram model's bits per byte no further.
COUNTED_CHARACTERS = 20_000_000
ADAPTER_ROW_TOKENS = 128


# ---- step 11 -------------------------------------------------------------------------------------


def evaluate_stage(run: Run, recipe: Recipe, stage: str) -> dict[str, Any]:
    """Measure the model of ``stage`` and return what ``evaluation.json`` then holds.

    Nothing is measured again where model, tokenizer, items and settings are what they were; if
    another version of the code measured them, that is said.

    Errors:
        UsageError: the stage has not finished, or a task has no file.
        BadDataError: bytes of the model, or an item, are not what they should be.
    """
    record = run.record(stage)
    judging.require_key(recipe.evaluate)
    manifest = storage.verify_folder(run.model(stage), exact=True)
    identity = _identity(run, recipe.evaluate, stage, manifest)
    known = _known_evaluation(run, stage)
    if known is not None and all(known.get(name) == value for name, value in identity.items()):
        print_line(f"{stage}: already measured, {len(known['metrics'])} metrics{_by(run, known)}")
        judging.judge_stage(run, recipe.evaluate, stage)
        return known
    started_at_s = time.monotonic()
    with working(f"{stage}: measuring {len(identity['data'])} tasks"):
        found = _measure(run, recipe.evaluate, stage)
    evaluation = {
        **identity,
        "code": code_version(),
        "versions": package_versions(),
        "metrics": found.metrics,
        "samples": found.samples,
        "elapsed_s": round(time.monotonic() - started_at_s, 3),
    }
    lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in found.items]
    folder = run.stage(stage)
    storage.write_text(folder / ITEMS, "".join(f"{line}\n" for line in lines))
    storage.write_json(folder / EVALUATION, evaluation)
    storage.remove_file(folder / JUDGED)  # it speaks of other answers, or is asked anew
    evidence = {key: storage.sha256_file(folder / name) for name, key in EVIDENCE.items()}
    run.write_record(stage, {**record, "evidence": evidence})
    columns = ("metric", "value", "low", "high", "n")
    rows = [[name, *(m[key] for key in columns[1:])] for name, m in found.metrics.items()]
    print_table(f"{stage}: measured in {evaluation['elapsed_s']} s", columns, rows)
    judging.judge_stage(run, recipe.evaluate, stage)
    return evaluation


def _identity(
    run: Run, config: EvaluateConfig, stage: str, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that, unchanged, leaves the evaluation unchanged."""
    data = {task.name: items_sha256(run, task) for task in config.tasks_of(stage)}
    if not data:
        raise UsageError(f"evaluate.tasks holds no task for stage {stage}; add one to the recipe")
    settings = to_plain(config) | {"tasks": to_plain(config.tasks_of(stage)), "batch_tokens": None}
    settings.pop("judge")  # whose opinion is no part of the evaluation
    return {
        "stage": stage,
        "fingerprint": manifest["fingerprint"],
        "tokenizer_fingerprint": tokenizer_fingerprint(manifest),
        "adapter_fingerprint": _adapter_fingerprint(run, stage),
        "data": data,
        "config_fingerprint": fingerprint(settings),
        UNIGRAM: _counted_fingerprint(run, run.model(stage)),
    }


def tokenizer_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return what identifies the tokenizer inside a model folder."""
    files = {file["path"]: file["sha256"] for file in manifest["files"]}
    return fingerprint({name: files[name] for name in TOKENIZER_FILES if name in files})


def _adapter_fingerprint(run: Run, stage: str) -> str | None:
    """Return the fingerprint of a stage's adapter after checking every byte; None without one."""
    folder = run.stage(stage) / "adapter"
    if not folder.is_dir():
        return None
    return str(storage.verify_folder(folder, exact=True)["fingerprint"])


def _counted_fingerprint(run: Run, model: Path) -> str | None:
    """Identify what the unigram model's tokens are counted in."""
    folder = run.data("clean" if other_tokenizer_file(run, model) else "packed")
    if not (folder / storage.MANIFEST).is_file():
        return None
    return str(storage.read_manifest(folder)["fingerprint"])


def _known_evaluation(run: Run, stage: str) -> dict[str, Any] | None:
    """Return the evaluation that is there, if it is what step 11 wrote."""
    if not (run.stage(stage) / EVALUATION).is_file() or _edited(run, stage):
        return None
    evaluation: dict[str, Any] = storage.read_json(run.stage(stage) / EVALUATION)
    return evaluation


def _by(run: Run, evaluation: Mapping[str, Any]) -> str:
    """Return which version of the code measured ``evaluation``, if it was not this one."""
    known, here = evaluation.get("code"), code_version()
    if known == here:
        return ""
    path = run.stage(evaluation["stage"]) / EVALUATION
    return f", with version {known}, not this one, {here}; remove {path} to measure them again"


def _open_task(run: Run, task: TaskConfig, seed: int) -> Task:
    if task.kind == "harness":
        return harness.open_task(task, task_file(task))
    return read_task(task, task_paths(run, task), seed=seed)


def _measure(run: Run, config: EvaluateConfig, stage: str) -> Evaluation:
    tasks = [_open_task(run, task, config.seed) for task in config.tasks_of(stage)]
    device, folder = training_device(), run.model(stage)
    dtype = _dtype(folder, device)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype, device)
    found = evaluate_model(
        model, tokenizer, tasks, config, unigram_counts=_unigram_counts(run, folder, tokenizer)
    )
    adapter = run.stage(stage) / "adapter"
    if stage == "lora" and adapter.is_dir():
        del model
        texts = [f"{sample['prompt']} {sample['answer']}" for sample in found.samples]
        rows = [
            ids[:ADAPTER_ROW_TOKENS]
            for ids in encode_texts(tokenizer, texts[:ADAPTER_ROWS] or ["."])
            if ids
        ]
        metrics = adapter_metrics(
            run.model("dpo"), adapter, folder, rows, dtype=dtype, device=device
        )
        found.metrics.update(metrics)
    return found


def _dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Return the type to evaluate in: the stored one on a GPU, fp32 on a CPU."""
    config = storage.read_json(folder / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if stored == "bfloat16" and device.type == "cuda" else torch.float32


def _unigram_counts(run: Run, model: Path, tokenizer: Any) -> NDArray[np.int64] | None:
    """Count the training text's tokens: the packed ones, or the model's own of the clean text."""
    if other_tokenizer_file(run, model):
        return _counted_anew(run, tokenizer)
    files = sorted(run.data("packed").glob("train-*.npy"))
    if not files:
        return None
    counts = token_counts(files, len(tokenizer))
    pad_id = storage.read_manifest(run.data("packed")).get("pad_id")
    if pad_id is not None:  # which no text holds
        counts[pad_id] = 0
    return counts


def _counted_anew(run: Run, tokenizer: Any) -> NDArray[np.int64] | None:
    if not (run.data("clean") / storage.MANIFEST).is_file():
        return None
    counts, left = np.zeros(len(tokenizer), dtype=np.int64), COUNTED_CHARACTERS
    for document in read_shards(run.data("clean"), "train"):
        ids = encode_texts(tokenizer, [document["text"]])[0]
        counts += np.bincount(ids, minlength=len(tokenizer))
        left -= len(document["text"])
        if left <= 0:
            break
    return counts


# ---- step 12 -------------------------------------------------------------------------------------


def check_stage(run: Run, recipe: Recipe, stage: str, gates_file: Path) -> dict[str, Any]:
    """Judge the model of ``stage``, write ``verdict.json`` and return it.

    Errors:
        UsageError: the stage has not finished, or the gate file is wrong.
        GateRefusedError: not every check passes; the message names those that do not.
    """
    run.record(stage)
    found = require_known_gates(run, recipe, gates_file)
    checks = _applicable(run, stage, found.checks(run.preset, stage))
    model = storage.verify_folder(run.model(stage), exact=True)["fingerprint"]
    earlier = {check.not_worse_than for check in checks if check.not_worse_than}
    verdict = gates.judge(
        checks,
        stage=stage,
        confidence=found.confidence,
        fingerprint=model,
        evidence=read_evidence(run, recipe.evaluate, stage),
        earlier={name: read_evidence(run, recipe.evaluate, name) for name in sorted(earlier)},
        decontamination=contamination.judge(run, recipe, stage, {c.metric for c in checks}),
    )
    path = run.stage(stage) / VERDICT
    storage.write_json(path, verdict)
    record = run.record(stage)
    hashes = {**record.get("evidence", {}), "verdict_sha256": storage.sha256_file(path)}
    run.write_record(stage, {**record, "evidence": hashes})
    _write_card(run, stage)
    _print_verdict(verdict)
    if not verdict["promoted"]:
        refused = [check for check in verdict["checks"] if check["result"] != "pass"]
        named = "; ".join(f"{c['metric']} {c['result']} ({c['why']})" for c in refused)
        if problem := verdict["decontamination"]["problem"]:
            named = f"{problem}; {named}".removesuffix("; ")
        raise GateRefusedError(f"{path}: {stage} is not promoted: {named}")
    return verdict


def _applicable(run: Run, stage: str, checks: Sequence[gates.Check]) -> Sequence[gates.Check]:
    """Leave out comparisons with an earlier stage for a model from outside, which has none.

    Errors:
        GateRefusedError: nothing is left to judge it by.
    """
    if "outside" not in run.record(stage):
        return checks
    left = [check for check in checks if check.not_worse_than is None]
    if not left:
        raise GateRefusedError(
            f"{run.model(stage)}: from outside, and every check of {run.preset}.{stage} compares "
            "with an earlier stage, which it does not have; add a check with min or max to the "
            "gate file"
        )
    return left


def _write_card(run: Run, stage: str) -> None:
    """Write the card into the stage's model; what keeps it from being written stops nothing."""
    try:
        model_card.write_card(run, stage, run.model(stage))
    except SevenfoldError as error:
        log.warning("%s: no model card: %s", run.model(stage), error)


def _print_verdict(verdict: Mapping[str, Any]) -> None:
    rows = [
        [
            check["metric"],
            check["value"],
            check["low"],
            check["high"],
            check["n"],
            f"{check['direction'].split(':')[0]} {check['threshold']:g}",
            check["result"],
        ]
        for check in verdict["checks"]
    ]
    word = "promoted" if verdict["promoted"] else "not promoted"
    columns = ("metric", "value", "low", "high", "n", "gate", "result")
    print_table(f"{verdict['stage']}: {word}", columns, rows)


def read_evidence(run: Run, config: EvaluateConfig, stage: str) -> gates.Evidence:
    """Return what was measured of a stage's present model, or why that cannot be used."""
    folder, again = run.stage(stage), f"run scripts/11_evaluate.py {stage}"
    if not (folder / EVALUATION).is_file() or not (folder / ITEMS).is_file():
        return gates.Evidence(problem=f"missing: {stage} has not been measured; {again}")
    try:
        edited = _edited(run, stage)
        evaluation = storage.read_json(folder / EVALUATION)
        items = [json.loads(line) for line in (folder / ITEMS).read_bytes().splitlines()]
        manifest = storage.read_manifest(run.model(stage))
        adapter = _adapter_fingerprint(run, stage)
    except (BadDataError, UsageError, ValueError) as error:
        return gates.Evidence(problem=f"not readable: {error}; {again} again")
    if edited:
        return gates.Evidence(problem=f"{edited}; {again} again")
    found = {
        "fingerprint": manifest["fingerprint"],
        "tokenizer_fingerprint": tokenizer_fingerprint(manifest),
        "adapter_fingerprint": adapter,
    }
    for name, value in found.items():
        if evaluation.get(name) != value:
            return gates.Evidence(
                problem=f"stale: {EVALUATION} was measured with another {name}; {again} again"
            )
    stale = _stale_tasks(run, config.tasks_of(stage), evaluation.get("data", {}), again)
    return gates.Evidence(evaluation=evaluation, items=items, stale_tasks=stale)


def _edited(run: Run, stage: str) -> str | None:
    """Return which file is not the one that step 11 wrote, or None."""
    evidence = run.record(stage).get("evidence", {})
    for name, key in EVIDENCE.items():
        path = run.stage(stage) / name
        if not path.is_file() or evidence.get(key) != storage.sha256_file(path):
            return f"edited: {name} is not the file whose SHA-256 is in record.json"
    return None


def _stale_tasks(
    run: Run, tasks: Sequence[TaskConfig], measured: Mapping[str, str], again: str
) -> dict[str, str]:
    """Return why each task's results are stale, for those whose items have changed since."""
    stale = {}
    for task in tasks:
        try:
            current: str | None = items_sha256(run, task)
        except UsageError:
            current = None
        if measured.get(task.name) != current:
            stale[task.name] = f"stale: the items of {task.name} have changed; {again} again"
    return stale
