"""`sevenfold bench mmlu`: how long a multiple-choice task takes at step 11; one JSON line a case.

Random weights in the type that step 11 loads, `evaluate_model` on the items of ``--source`` or on
as many random ones, of MMLU's lengths; then the same items as a task of lm-evaluation-harness,
where that is installed. The clock runs from the items in memory to the metrics with their
intervals; loading a model is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from sevenfold.base import console, records, storage
from sevenfold.base.errors import UsageError
from sevenfold.base.gpu_clock import power_limit_w
from sevenfold.base.hardware import (
    detect_gpu_type,
    peak_memory_gib,
    reset_peak_memory,
    setup_torch_backends,
    training_device,
    wait_for_gpu,
)
from sevenfold.data import random_texts, tokenizer
from sevenfold.verify import harness
from sevenfold.verify.config import TaskConfig
from sevenfold.verify.evaluate import evaluate_model
from sevenfold.verify.tasks import ChoiceItem, Task, read_task
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import trial
from sevenfold.workflow.recipe import Recipe

FOLDER = ".bench-mmlu"
SEED = 0
NUM_ITEMS = 14_042
ITEMS = "items.jsonl"
CONFIG = TaskConfig(name="mmlu", kind="choice")
_AS_HARNESS_TASK = f"""
task: mmlu
dataset_path: json
dataset_kwargs: {{data_files: {{test: {ITEMS}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def bench(options: argparse.Namespace) -> None:
    """Measure our own task and the harness's, and print one JSON line each.

    Errors:
        UsageError: more than one source.
        BadDataError: an item that is no multiple-choice question.
    """
    if len(options.source) > 1:
        raise UsageError("bench mmlu reads one file; leave the other --source out")
    folder = options.folder / FOLDER
    storage.remove_folder(folder)  # of a benchmark that was killed
    run, recipe = recipes.resolve(options.preset, options.config, options.set, folder)
    try:
        for case in _cases(folder, recipe, options.source):
            facts = {"case": "mmlu", "preset": run.preset, **case}
            facts |= {"gpu": detect_gpu_type()["name"], "power_limit_w": power_limit_w()}
            facts |= {"code": records.code_version(), "versions": records.package_versions()}
            console.print_raw(json.dumps(facts) + "\n")
    finally:
        storage.remove_folder(folder)


def _cases(folder: Path, recipe: Recipe, source: list[Path]) -> Iterator[dict[str, Any]]:
    if not source:
        rows = random_texts.random_questions(NUM_ITEMS, seed=SEED)
        _write(folder / "random.jsonl", rows)
    task = read_task(CONFIG, source or [folder / "random.jsonl"], seed=SEED)
    items = cast("tuple[ChoiceItem, ...]", task.items)
    if recipe.tokenizer.path is not None:
        made = tokenizer.adopt_tokenizer(recipe.tokenizer)
    else:
        made = tokenizer.train_tokenizer((item.prompt for item in items), recipe.tokenizer)
    device = training_device()
    setup_torch_backends(deterministic=False)
    torch.manual_seed(SEED)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as step 11 loads it
    model = trial.random_model(recipe, dtype, device, attn_implementation="sdpa")
    yield {"what": "step 11", **_measured(model, made, task, recipe, len(items))}
    if harness.is_installed():
        _write(folder / ITEMS, (dataclasses.asdict(item) for item in items))
        file = folder / "mmlu.yaml"
        storage.write_text(file, _AS_HARNESS_TASK)
        task = harness.open_task(TaskConfig(name="mmlu", kind="harness", path=str(file)), file)
        yield {"what": "step 11, harness", **_measured(model, made, task, recipe, len(items))}


def _write(file: Path, rows: Any) -> None:
    storage.write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))


def _measured(model: Any, made: Any, task: Task, recipe: Recipe, num_items: int) -> dict[str, Any]:
    reset_peak_memory()
    config = dataclasses.replace(recipe.evaluate, tasks=(task.config,))
    with _counted(model) as count:
        started = time.perf_counter()
        metrics = evaluate_model(model, made, [task], config, unigram_counts=None).metrics
        elapsed_s = time.perf_counter() - started
    name = "mmlu_acc" if task.config.kind == "harness" else "mmlu"
    layers = recipe.model.num_layers * recipe.model.num_layer_matmul_parameters
    peak = detect_gpu_type()["peak_bf16_tflops"] * 1e12
    return {
        "items": num_items,
        "accuracy": metrics[name]["value"],
        "elapsed_s": elapsed_s,
        "items_s": num_items / elapsed_s,
        "forward_s": count["seconds"],
        "forward_passes": count["passes"],
        "forward_tokens": count["tokens"],
        "tokens_s": count["tokens"] / elapsed_s,
        "mfu_forward": 2 * layers * count["tokens"] / count["seconds"] / peak if peak else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "peak_gib": peak_memory_gib(),
    }


@contextlib.contextmanager
def _counted(model: Any) -> Iterator[dict[str, float]]:
    """Count forward passes of the layers, the tokens in them with their padding, and seconds."""
    count: dict[str, float] = {"passes": 0, "tokens": 0, "seconds": 0.0}
    since = 0.0

    def begin(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        nonlocal since
        wait_for_gpu()
        since = time.perf_counter()

    def end(module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        wait_for_gpu()
        count["seconds"] += time.perf_counter() - since
        count["passes"] += 1
        count["tokens"] += options["input_ids"].numel()

    decoder = model.get_decoder()
    handles = [
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
