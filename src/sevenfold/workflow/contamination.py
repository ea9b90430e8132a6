"""The evaluation's items against what is trained on: looked for before, and judged after.

The village's generator makes both its data and its items, and decides what of them is held out, so
its data are not searched; whatever else is trained on is searched for the items of every task.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.records import GATED_STAGES, Run
from sevenfold.base.records import SCRIPTS as TRAINING_SCRIPTS
from sevenfold.data.decontamination import (
    REASON,
    DecontaminationConfig,
    ItemIndex,
    TaskTexts,
    index_fingerprint,
)
from sevenfold.verify.config import VALIDATION_TASK, TaskConfig, metrics_of_task
from sevenfold.verify.item_texts import item_texts
from sevenfold.verify.task_files import task_sha256
from sevenfold.workflow.prepared import SCRIPTS
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.thresholds import items_path

INPUT = "evaluation_items"  # the name of an index among the inputs in a manifest


# ---- where items are -----------------------------------------------------------------------------


def task_paths(run: Run, task: TaskConfig) -> list[Path]:
    """Return the files of a task: those of the run where the task names none.

    A relative path is looked for from the working directory, then from the repository.

    Errors:
        UsageError: there are none.
    """
    if task.path is not None:
        return [items_path(task.path, task)]
    if is_held_out(task):
        paths = sorted(run.data("clean").glob("validation-*.jsonl*"))
        if not paths:
            raise UsageError(
                f"{run.data('clean')}: no held-out documents; run scripts/02_clean_data.py, or "
                "give evaluate.tasks a text task with a path"
            )
        return paths
    path = _own_file(run, task)
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file; run scripts/01_download_data.py, or give task '{task.name}' "
            "a path"
        )
    return [path]


def is_held_out(task: TaskConfig) -> bool:
    """True for the task of the run's own held-out documents."""
    return task.path is None and task.kind == "text" and task.name == VALIDATION_TASK


def _own_file(run: Run, task: TaskConfig) -> Path:
    return run.data("raw") / "evaluation" / f"{task.name}.jsonl"


def items_sha256(run: Run, task: TaskConfig) -> str:
    """Return what identifies the items of a task.

    Errors:
        UsageError: a file of it is missing.
    """
    if task.kind == "harness":
        from sevenfold.verify import harness  # needs torch

        return harness.items_sha256(task, task_file(task))
    return task_sha256(task_paths(run, task))


def task_file(task: TaskConfig) -> Path | None:
    """Return the file that a task names, or None."""
    return None if task.file is None else items_path(task.file, task)


# ---- before training -----------------------------------------------------------------------------


class EvaluationItems:
    """The items that must not be trained on; the index of their words is built when asked for."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        """Look up the items' files and hash them.

        Errors:
            UsageError: a file that a task names is not there.
        """
        self._config = recipe.decontaminate
        self._paths = {
            task.name: (task, _paths(run, task)) for task in _searchable(run, recipe.evaluate.tasks)
        }
        self._hashes = {
            name: items_sha256(run, task) for name, (task, _) in sorted(self._paths.items())
        }
        self.fingerprint = index_fingerprint(self._config, self._hashes)

    @functools.cached_property
    def index(self) -> ItemIndex:
        """The index; reading the items of a few public sets takes seconds."""
        tasks = {
            name: TaskTexts(
                sha256=self._hashes[name], read=functools.partial(item_texts, task, paths)
            )
            for name, (task, paths) in self._paths.items()
        }
        return ItemIndex(self._config, tasks)

    def facts(self, dropped: Mapping[str, int], *, generated: Collection[str]) -> dict[str, Any]:
        """Return what a manifest says: the index, the tasks, and what was removed for which.

        ``generated`` names the sources that were not searched.
        """
        tasks: dict[str, Any] = {name: {"sha256": sha} for name, sha in self._hashes.items()}
        facts = {"index": self.fingerprint, "ngram": self._config.ngram, "tasks": tasks}
        if "index" in self.__dict__:
            facts = self.index.facts
        found = {
            reason.removeprefix(REASON): count
            for reason, count in sorted(dropped.items())
            if reason.startswith(REASON)
        }
        return {**facts, "removed": found, "generated": sorted(generated)}


def _searchable(run: Run, tasks: Sequence[TaskConfig]) -> Iterator[TaskConfig]:
    """Yield the tasks whose items can stand in training data, as far as they are there.

    Held-out documents are kept apart from the others when these are split.
    """
    for task in tasks:
        is_own = task.path is None and task.kind != "harness"
        if not is_held_out(task) and (not is_own or _own_file(run, task).is_file()):
            yield task


def _paths(run: Run, task: TaskConfig) -> list[Path]:
    if task.kind != "harness":
        return task_paths(run, task)
    file = task_file(task)
    return [] if file is None else [file]


def require_searched(run: Run, recipe: Recipe, name: str) -> None:
    """Refuse to train on data that were searched for other items than the recipe names now.

    Errors:
        UsageError: naming the scripts that prepare the data anew.
    """
    inputs = storage.read_manifest(run.data(name)).get("inputs", {})
    if inputs.get(INPUT) != EvaluationItems(run, recipe).fingerprint:
        raise UsageError(
            f"{run.data(name)}: not searched for the items of evaluate.tasks as they are now, by "
            f"decontaminate.ngram {recipe.decontaminate.ngram}; {_preparing(name)} again"
        )


def _preparing(name: str) -> str:
    scripts = (SCRIPTS["clean"], SCRIPTS["packed"]) if name == "packed" else (SCRIPTS[name],)
    return f"run {' and '.join(scripts)}"


# ---- after training ------------------------------------------------------------------------------


def _searched(run: Run, stage: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a stage's data were searched: by now, or else as it stood when it trained.

    What was searched again since, and lost nothing by it, need not be trained on again.
    """
    folder = run.data("packed" if stage == "pretrain" else stage)
    with contextlib.suppress(BadDataError, UsageError):
        manifest = storage.read_manifest(folder)
        if manifest["fingerprint"] == record.get("inputs", {}).get("data"):
            return _mapping(manifest.get("decontaminated"))
    return _mapping(record.get("decontaminated"))


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _advice(stage: str, record: Mapping[str, Any]) -> str:
    if record.get("data_sources"):  # rows that were packed elsewhere
        return (
            "give --data a folder that step 03 wrote, which says how it was searched, or go past "
            'this gate with --force "reason"'
        )
    preparing = _preparing("packed" if stage == "pretrain" else stage)
    return f"{preparing} again, and then {TRAINING_SCRIPTS[stage]}"


def _problem(
    stage: str, facts: Mapping[str, Any] | None, wanted: Mapping[str, str], ngram: int, again: str
) -> str | None:
    """Return why a stage's data do not count as searched for the items that judge, or None.

    ``again`` is what to do then.
    """
    if not wanted:
        return None
    what = f"what {stage} was trained on was"
    if facts is None:
        return f"{what} never searched for the items of {', '.join(sorted(wanted))}; {again}"
    searched = facts.get("tasks", {})
    for name, sha256 in sorted(wanted.items()):
        if searched.get(name, {}).get("sha256") != sha256:
            word = "searched for other items of" if name in searched else "not searched for"
            return f"{what} {word} {name}, which judges it; {again}"
    hashes = {name: task["sha256"] for name, task in searched.items()}
    expected = index_fingerprint(DecontaminationConfig(ngram=ngram), hashes)
    if facts.get("index") != expected:
        return (
            f"{what} searched by ngram {facts.get('ngram')} or by an earlier method, the recipe "
            f"says ngram {ngram}; {again}"
        )
    return None


def _told(facts: Mapping[str, Any] | None) -> dict[str, Any] | str:
    """Return what a verdict says of a stage's data; their tasks stand in their own manifest."""
    if facts is None:
        return "unknown"
    return {key: value for key, value in facts.items() if key != "tasks"}


def facts_of(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's manifest says about decontamination; None where it says nothing."""
    if not (folder / storage.MANIFEST).is_file():
        return None
    return _mapping(storage.read_manifest(folder).get("decontaminated"))


def judge(run: Run, recipe: Recipe, stage: str, metrics: Collection[str]) -> dict[str, Any]:
    """Say whether what a model was trained on was searched for the items it is judged by.

    All stages that it descends from count. Of a model from outside nobody can say what it was
    trained on: that is said, and is no reason to refuse it.

    Returns:
        ``{tasks, data: {stage: facts}, unknown: [stage], problem}``; ``problem`` is None or why
        the gate refuses.
    """
    tasks = [
        task
        for task in recipe.evaluate.tasks
        if not is_held_out(task) and set(metrics_of_task(task, recipe.evaluate)) & set(metrics)
    ]
    wanted = {}
    for task in tasks:
        try:
            wanted[task.name] = items_sha256(run, task)
        except UsageError:
            wanted[task.name] = ""  # the check itself says what is missing
    data: dict[str, Any] = {}
    advice = {}
    unknown = []
    for name in reversed(GATED_STAGES[: GATED_STAGES.index(stage) + 1]):
        if not (run.stage(name) / "record.json").is_file():
            data[name], advice[name] = None, _advice(name, {})
            continue
        record = run.record(name)
        if "outside" in record:
            unknown.append(name)
            break
        advice[name] = _advice(name, record)
        data[name] = _searched(run, name, record)
        if record.get("external"):
            unknown.append(name)
            break
    problems = [
        problem
        for name, facts in data.items()
        if (problem := _problem(name, facts, wanted, recipe.decontaminate.ngram, advice[name]))
    ]
    return {
        "tasks": sorted(wanted),
        "data": {name: _told(facts) for name, facts in data.items()},
        "unknown_before": unknown,
        "problem": problems[-1] if problems else None,
    }
