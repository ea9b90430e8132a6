"""What the gates need, checked before anything trains: known metrics, and items to measure on."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import sevenfold
from sevenfold.base.config import Document, build, read_yaml
from sevenfold.base.errors import UsageError
from sevenfold.base.records import Run
from sevenfold.verify import gates
from sevenfold.verify.config import STAGES, EvaluateConfig, TaskConfig, metrics_of_stage
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.recipe import Recipe


def require_known_gates(run: Run, recipe: Recipe, gates_file: Path) -> gates.Gates:
    """Read the gate file and refuse it if any section names a metric that nothing measures.

    A section's names are those of its preset's recipe; the run's own section, those of the run's.
    A section ``custom`` that is not the run's own may use the names of every preset.

    Errors:
        UsageError: the file is malformed, or holds an unknown name.
    """
    configs = {
        preset: _evaluate_section(recipes.preset_file(preset)) for preset in recipes.presets()
    }
    known = {preset: _names(config) for preset, config in configs.items()}
    known[run.preset] = _names(recipe.evaluate)
    if recipes.CUSTOM_PRESET not in known:
        known[recipes.CUSTOM_PRESET] = {
            stage: sorted({name for names in known.values() for name in names[stage]})
            for stage in STAGES
        }
    found = gates.read_gates(gates_file)
    gates.check_names(found, known)
    return found


@functools.cache
def _evaluate_section(path: Path) -> EvaluateConfig:
    """Read what a preset measures; in a whole run every stage asks for that of each preset."""
    values = read_yaml(path)
    lines = {at[1:]: line for at, line in values.lines.items() if at[:1] == ("evaluate",)}
    return build(EvaluateConfig, Document(values.get("evaluate", {}), values.path, lines))


def _names(config: EvaluateConfig) -> dict[str, list[str]]:
    return {stage: sorted(metrics_of_stage(config, stage)) for stage in STAGES}


def require_items(recipe: Recipe, stages: Iterable[str]) -> None:
    """Refuse a recipe whose tasks of these stages name a file that is not there.

    Errors:
        UsageError: the first file that is missing, with the task that needs it.
    """
    for stage in stages:
        for task in recipe.evaluate.tasks_of(stage):
            if task.kind == "harness":
                from sevenfold.verify.harness import require_installed  # needs torch

                require_installed(task)
            if task.file is not None:
                items_path(task.file, task)


def missing_items(recipe: Recipe, stages: Iterable[str]) -> list[str]:
    """Return the files of items that tasks of these stages name and that are not there."""
    tasks = [task for stage in stages for task in recipe.evaluate.tasks_of(stage)]
    named = dict.fromkeys(task.file for task in tasks if task.file is not None)
    return [file for file in named if _find(file) is None]


def items_path(path: str, task: TaskConfig) -> Path:
    """Return where a task's file is: seen from the working directory, else from the repository.

    Errors:
        UsageError: it is in neither.
    """
    found = _find(path)
    if found is None:
        raise UsageError(
            f"{Path(path).expanduser()}: no such file; task '{task.name}' needs its items: "
            "docs/DATA_FORMATS.md, section 7, says where public ones come from"
        )
    return found


def _find(path: str) -> Path | None:
    given = Path(path).expanduser()
    places = (given, Path(sevenfold.__file__).parents[2] / given)
    return next((place for place in places if place.exists()), None)
