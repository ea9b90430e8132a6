"""Tasks of lm-evaluation-harness, run in this process: its prompts and scoring, our likelihoods.

The harness builds the requests and scores the answers; log-likelihoods come from
``verify/likelihood.py``, in batches by length and shared where choices differ in their last token
only. Generation is the harness's own. No chat template is applied, as the harness does by default.

A task file is YAML as the harness reads it, with its items in JSON lines beside it. It cannot name
Python code: tags, ``class`` and ``include`` are refused, and templates run in jinja's sandbox.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2

from sevenfold.base.config import fingerprint, read_yaml
from sevenfold.base.errors import BadDataError, UsageError, install_command
from sevenfold.data.row_files import read_file
from sevenfold.verify import likelihood
from sevenfold.verify.config import HARNESS_METRICS, TaskConfig
from sevenfold.verify.likelihood import Row
from sevenfold.verify.task_files import task_sha256
from sevenfold.verify.tasks import Item, Task

if TYPE_CHECKING:
    from sevenfold.verify.measures import ItemResult, Subject

INSTALL = install_command("eval")
_CODE_KEYS = ("class", "include", "group", "unsafe_code", "process_docs", "custom_dataset")
_FEWSHOT_SEED = 1234  # the harness's own
# What the harness raises over a task it cannot build or run: nothing narrower is documented.
_PROBLEMS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    jinja2.TemplateError,
)


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Item):
    """A task of the harness: by its name there (``id``), or as the YAML file ``file`` says."""

    file: Path | None


def is_installed() -> bool:
    """True if lm-evaluation-harness can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def require_installed(task: TaskConfig) -> str:
    """Return the harness's version.

    Errors:
        UsageError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"task '{task.name}' needs lm-evaluation-harness, which is not installed; {INSTALL}"
        ) from None


def item_files(file: Path) -> dict[str, list[Path]]:
    """Return the files of items that a task file names, by split; beside it unless absolute.

    Errors:
        UsageError: it names none, one that is not there, or something that runs code.
    """
    values = read_yaml(file)
    for key in _CODE_KEYS:
        if key in values:
            line = values.lines[(key,)]
            raise UsageError(f"{file}:{line}:{key}: not read from a task file; leave it out")
    if not isinstance(values.get("task"), str):
        raise UsageError(f"{file}:1:task: expected the task's name; one file is one task")
    options = values.get("dataset_kwargs")
    named = options.get("data_files") if isinstance(options, Mapping) else None
    splits = named if isinstance(named, Mapping) else {"train": named}
    files = {
        str(split): [
            file.parent / name for name in (names if isinstance(names, list) else [names]) if name
        ]
        for split, names in splits.items()
    }
    if not any(files.values()):
        raise UsageError(f"{file}:1:dataset_kwargs: expected data_files, the items' files by split")
    for path in (path for paths in files.values() for path in paths):
        if not path.is_file():
            raise UsageError(f"{path}: no such file; {file} needs its items")
    return files


def items_sha256(task: TaskConfig, file: Path | None) -> str:
    """Return what identifies a task: its bytes, or its name, and the harness's version.

    Errors:
        UsageError: the harness is not installed, or the task file is wrong.
    """
    version = require_installed(task)
    if file is None:
        return fingerprint([version, task.path or task.name])
    paths = [path for paths in item_files(file).values() for path in paths]
    return fingerprint([version, task_sha256([file, *paths])])


def open_task(task: TaskConfig, file: Path | None) -> Task:
    """Return the task to be measured; its items are read by the harness."""
    item = HarnessTask(id=task.path or task.name, file=file)
    return Task(config=task, items=(item,), sha256=items_sha256(task, file))


def measure_harness(subject: Subject, task: Task) -> list[ItemResult]:
    """Return one result an item, of every metric that can be judged item by item.

    Of several filters of one task the first counts.

    Errors:
        UsageError: the harness is not installed.
        BadDataError: the harness cannot build or run the task, or scores nothing that we judge.
    """
    require_installed(task.config)
    config, source = task.config, cast(HarnessTask, task.items[0])
    with _explained(source), _sandboxed_templates():
        name, samples = _run(subject, config, source)
    first = samples[0]["filter"]
    results = [_result(config, sample) for sample in samples if sample["filter"] == first]
    if not any(result["scores"] for result in results):
        raise BadDataError(
            f"{name}: scores {', '.join(samples[0]['metrics'])}; of these none can be judged item "
            f"by item: {', '.join(HARNESS_METRICS)}"
        )
    return results


@contextlib.contextmanager
def _explained(source: HarnessTask) -> Iterator[None]:
    """Say which task the harness cannot build or run, and keep its bars from the screen."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except _PROBLEMS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadDataError(
            f"{source.file or source.id}: lm-evaluation-harness cannot run it ({reason:.300}); "
            "try it with lm-eval alone"
        ) from error


def _run(
    subject: Subject, config: TaskConfig, source: HarnessTask
) -> tuple[str, list[dict[str, Any]]]:
    """Let the harness run one task, as its ``simple_evaluate`` does, and return its samples."""
    from lm_eval.evaluator import evaluate

    name, task, loaded = _load(source)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    chosen = _drawn(len(task.eval_docs), config, subject.config.seed)
    found = evaluate(
        lm=_language_model(subject),
        task_dict=loaded,
        samples=None if chosen is None else {name: chosen},
        bootstrap_iters=0,
        log_samples=True,
    )
    return name, found["samples"][name]


def _load(source: HarnessTask) -> tuple[str, Any, Any]:
    """Return the task's name, the task, and both as the harness passes them on."""
    from lm_eval.tasks import TaskManager

    spec: Any = source.id if source.file is None else _task_values(source.file)
    loaded = TaskManager(include_defaults=source.file is None).load([spec])
    if len(loaded["tasks"]) != 1:
        raise ValueError(f"it is a group of {len(loaded['tasks'])} tasks; name each")
    [(name, task)] = loaded["tasks"].items()
    return name, task, loaded


def item_texts(task: TaskConfig, file: Path | None) -> Iterator[Sequence[str]]:
    """Yield every string of each item that is asked; its few-shot examples are not evaluated.

    Errors:
        UsageError: the harness is not installed.
        BadDataError: the harness cannot build the task.
    """
    require_installed(task)
    source = HarnessTask(id=task.path or task.name, file=file)
    with _explained(source), _sandboxed_templates():
        documents = list(_load(source)[1].eval_docs)
    for document in documents:
        yield [value for value in document.values() if isinstance(value, str)]


def _drawn(num_items: int, config: TaskConfig, seed: int) -> list[int] | None:
    """Return which items to ask, as for our own tasks; None for all of them."""
    if config.max_items is None or config.max_items >= num_items:
        return None
    dice = random.Random(f"{seed}/{config.name}/0")
    return sorted(dice.sample(range(num_items), config.max_items))


def _task_values(file: Path) -> dict[str, Any]:
    """Return what the task file says, with its items read here: nothing goes into a cache."""
    import datasets

    splits = {
        split: datasets.Dataset.from_list(
            [dict(row) for path in paths for row, _ in read_file(path)]
        )
        for split, paths in item_files(file).items()
    }
    values = {key: value for key, value in read_yaml(file).items() if key != "dataset_kwargs"}
    return {**values, "custom_dataset": lambda **_: datasets.DatasetDict(splits)}


def _language_model(subject: Subject) -> Any:
    """Wrap the model for the harness, with our log-likelihoods."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):  # type: ignore[misc]
        """The harness's model of transformers, without bars and with other log-likelihoods."""

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
        ) -> list[tuple[float, bool]]:
            longest = subject.context + 1
            rows = []
            for _, context, continuation in requests:
                ids = (*context, *continuation)[-longest:]
                rows.append(Row(ids, max(1, len(ids) - len(continuation))))
            # The harness forbids no token, so none is suppressed here either.
            scores = likelihood.score_rows(subject.model, rows, batch_tokens=subject.batch_tokens)
            return [(-score.nats, score.is_greedy) for score in scores]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    rows = max(1, min(64, subject.batch_tokens // subject.context))
    made: Any = LanguageModel(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        backend="causal",
        batch_size=rows,
        max_length=subject.context,
    )
    # It encodes the question anew for each of its choices, which stand one after the other.
    made.tok_encode = functools.lru_cache(maxsize=64)(made.tok_encode)
    return made


@contextlib.contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Let a task's templates run in jinja's sandbox: the harness itself uses none.

    Each is compiled once; the harness does it for every item.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    sandboxed: Any = ImmutableSandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=True
    )
    sandboxed.filters.update(own.filters)
    sandboxed.from_string = functools.lru_cache(maxsize=64)(sandboxed.from_string)
    utils.env = sandboxed
    try:
        yield
    finally:
        utils.env = own


def _result(config: TaskConfig, sample: Mapping[str, Any]) -> ItemResult:
    """Turn a logged sample into a line of evaluation_items.jsonl."""
    finite = all(math.isfinite(number) for number in _numbers(sample["resps"]))
    scores: dict[str, Any] = {
        f"{config.name}_{metric}": _score(metric, sample[metric]) if finite else None
        for metric in HARNESS_METRICS
        if metric in sample["metrics"]
    }
    return {
        "task": config.name,
        "id": str(sample["doc_id"]),
        "score": next(iter(scores.values()), None),
        "scores": scores,
        "prompt": str(sample["arguments"][0][0]),
        "gold": str(sample["target"]),
    }


def _score(metric: str, value: Any) -> float | list[float]:
    """Return an item's score: a number, or what is summed over items and then divided."""
    if metric == "perplexity":
        return [-float(value), 1.0]
    if isinstance(value, tuple | list):
        unit = math.log(2) if metric == "bits_per_byte" else 1.0
        return [-float(value[0]) / unit, float(value[1])]
    return float(value)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, float):
        yield value
