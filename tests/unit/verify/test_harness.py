"""Tasks of lm-evaluation-harness: our numbers are its own, and gates can judge them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.model.llama import load_model, load_tokenizer, save_model
from sevenfold.verify import harness
from sevenfold.verify.config import EvaluateConfig, TaskConfig
from sevenfold.verify.evaluate import Evaluation, evaluate_model
from sevenfold.verify.tasks import read_task

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

CHOICES = """
task: hats
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: multiple_choice
doc_to_text: "Who has a hat? {{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
SPOKEN = """
task: spoken
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
WORDS = ("red", "hat", "lamp", "Tom", "table", "has", "the")


@pytest.fixture(scope="module")
def exported(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with storage.new_folder(folder / "tokenizer", kind="tokenizer") as new:
        tokenizer.save_pretrained(new)
    save_model(model, folder / "tokenizer", folder / "model", torch.float32)
    return folder / "model"


def task_file(folder: Path, text: str, *, where: str = "items.jsonl") -> Path:
    rows = [
        {
            "question": f"{word} on {other}",
            "choices": [other, f"{word} {other}", "lamp on the table"],
            "gold": index % 3,
            "text": f"Tom has a {word}. The {other} is on the table. " * (1 + 4 * (index % 5)),
        }
        for index, (word, other) in enumerate((a, b) for a in WORDS for b in WORDS)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "task.yaml"
    file.write_text(text.replace("ITEMS", where))
    return file


def ours(exported: Path, task: TaskConfig, file: Path) -> Evaluation:
    config = EvaluateConfig(tasks=(task,), confidence=0.95, seed=1, max_new_tokens=4)
    opened = harness.open_task(task, file)
    return evaluate_model(
        load_model(exported), load_tokenizer(exported), [opened], config, unigram_counts=None
    )


def alone(exported: Path, file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the harness says by itself of the exported folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "dtype": "float32"},
        tasks=[str(file)],
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    [name] = found["results"]
    return found["results"][name], found["samples"][name]


@pytest.mark.parametrize(
    ("text", "metrics"),
    [
        (CHOICES, ("acc", "acc_norm")),
        (LAST_WORD, ("perplexity", "acc")),
        (TEXTS, ("word_perplexity", "byte_perplexity", "bits_per_byte")),
        (SPOKEN, ("exact_match",)),
    ],
    ids=["choices", "last word", "texts", "spoken"],
)
def test_the_numbers_are_those_of_the_harness_alone(
    exported: Path, tmp_path: Path, text: str, metrics: tuple[str, ...]
) -> None:
    # By itself the harness looks for items from the working directory, ours beside the file.
    absolute = task_file(tmp_path, text, where=str(tmp_path / "items.jsonl"))
    expected, samples = alone(exported, absolute)
    task = TaskConfig(name="mine", kind="harness", path=str(tmp_path / "task.yaml"))
    found = ours(exported, task, task_file(tmp_path, text))
    for metric in metrics:
        mine = found.metrics[f"mine_{metric}"]
        assert mine["value"] == pytest.approx(expected[f"{metric},none"], rel=1e-5)
        assert mine["n"] == len(samples) == len(WORDS) ** 2
        assert mine["low"] <= mine["value"] <= mine["high"]
    assert [item["id"] for item in found.items] == [str(s["doc_id"]) for s in samples]
    if metrics[0] in ("acc", "exact_match"):
        by_item = [item["scores"][f"mine_{metrics[0]}"] for item in found.items]
        assert by_item == [float(sample[metrics[0]]) for sample in samples]
        assert metrics[0] != "acc" or 0 < sum(by_item) < len(by_item)
    assert found.items[3]["prompt"] == samples[3]["arguments"][0][0]


def test_our_own_choices_score_what_the_harness_scores(exported: Path, tmp_path: Path) -> None:
    """The same items in a public layout, as a task of kind ``choice``."""
    expected, _ = alone(exported, task_file(tmp_path, CHOICES, where=str(tmp_path / "items.jsonl")))
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    own = [{**row, "question": f"Who has a hat? {row['question']}"} for row in rows]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    task = TaskConfig(name="own", kind="choice")
    found = evaluate_model(
        load_model(exported),
        load_tokenizer(exported),
        [read_task(task, [tmp_path / "own.jsonl"], seed=1)],
        EvaluateConfig(tasks=(task,), confidence=0.95, seed=1, max_new_tokens=4),
        unigram_counts=None,
    ).metrics
    assert found["own"]["value"] == expected["acc,none"]
    assert found["own_normalised"]["value"] == expected["acc_norm,none"]
    assert 0 < found["own"]["value"] < 1


def test_a_sample_of_the_items_is_drawn_by_the_seed(exported: Path, tmp_path: Path) -> None:
    file = task_file(tmp_path, CHOICES)
    task = TaskConfig(name="mine", kind="harness", path=str(file), max_items=10)
    ids = [int(item["id"]) for item in ours(exported, task, file).items]
    assert len(set(ids)) == 10
    assert ids == sorted(ids) != list(range(10))


def test_weights_that_are_not_finite_score_nothing(exported: Path, tmp_path: Path) -> None:
    """Of choices that are all NaN the harness takes the first."""
    file = task_file(tmp_path, CHOICES)
    task = TaskConfig(name="mine", kind="harness", path=str(file))
    config = EvaluateConfig(tasks=(task,), confidence=0.95, seed=1, max_new_tokens=4)
    model = load_model(exported)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    opened = harness.open_task(task, file)
    found = evaluate_model(model, load_tokenizer(exported), [opened], config, unigram_counts=None)
    assert found.metrics["mine_acc"]["value"] is None


def test_what_identifies_a_task_is_its_bytes_and_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = task_file(tmp_path, CHOICES)
    task = TaskConfig(name="mine", kind="harness", path=str(file))
    first = harness.items_sha256(task, file)
    shutil.copy(tmp_path / "items.jsonl", tmp_path / "old.jsonl")
    (tmp_path / "items.jsonl").write_text((tmp_path / "old.jsonl").read_text().replace("Tom", "A"))
    other_items = harness.items_sha256(task, file)
    shutil.copy(tmp_path / "old.jsonl", tmp_path / "items.jsonl")
    file.write_text(CHOICES.replace("ITEMS", "items.jsonl").replace("Who has", "Who wants"))
    other_prompt = harness.items_sha256(task, file)
    task_file(tmp_path, CHOICES)
    assert harness.items_sha256(task, file) == first
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    by_name = TaskConfig(name="arc_easy", kind="harness")
    hashes = {first, other_items, other_prompt, harness.items_sha256(task, file)}
    assert len(hashes | {harness.items_sha256(by_name, None)}) == 5


def test_without_the_harness_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    task = TaskConfig(name="mine", kind="harness", path="arc_easy")
    with pytest.raises(UsageError, match=r"task 'mine' needs .*; pip install -e '\.\[eval\]'"):
        harness.require_installed(task)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: hats", "process_docs: utils.f\ntask: hats", r"task.yaml:2:process_docs: not read"),
        ("task: hats", "include: other.yaml\ntask: hats", r"task.yaml:2:include: .* leave it out"),
        ("task: hats", "task: [a, b]", r"task.yaml:1:task: expected the task's name"),
        ("doc_to_target: gold", "doc_to_target: !function utils.f", "tag .!function. is not read"),
        ("{data_files: {test: ITEMS}}", "{}", "dataset_kwargs: expected data_files"),
        ("ITEMS", "away.jsonl", r"away.jsonl: no such file; .*task.yaml needs its items"),
    ],
)
def test_a_task_file_that_is_wrong_or_runs_code_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = task_file(tmp_path, CHOICES.replace(old, new))
    with pytest.raises(UsageError, match=message):
        harness.item_files(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{question}}", "{{missing}}", "UndefinedError: 'missing' is undefined"),
        ("{{question}}", "{{question.__class__.__mro__}}", "SecurityError: access to attribute"),
        ("multiple_choice", "interpretive_dance", "AssertionError|ValueError|KeyError"),
    ],
)
def test_what_the_harness_cannot_run_is_one_line(
    exported: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = task_file(tmp_path, CHOICES.replace(old, new))
    task = TaskConfig(name="mine", kind="harness", path=str(file))
    with pytest.raises(BadDataError, match=message) as caught:
        ours(exported, task, file)
    assert "try it with lm-eval alone" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_of_which_nothing_can_be_judged_by_item_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    metrics = CHOICES[CHOICES.index("metric_list") :]
    file = task_file(
        tmp_path, CHOICES.replace(metrics, "metric_list:\n  - {metric: brier_score}\n")
    )
    task = TaskConfig(name="mine", kind="harness", path=str(file))
    with pytest.raises(
        BadDataError, match="hats: scores brier_score; of these none can be judged item by"
    ):
        ours(exported, task, file)
