"""The steps 01 to 12 as commands: settle the recipe, hold the run's lock, do the step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import console, storage
from sevenfold.base.config import to_plain
from sevenfold.base.errors import SevenfoldError, StoppedError
from sevenfold.base.records import Run
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import workers
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.thresholds import require_known_gates

LOCK_HELD_VARIABLE = "SEVENFOLD_LOCK_HELD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is being worked on, and its recipe."""

    run: Run
    recipe: Recipe


@contextlib.contextmanager
def working_on(options: argparse.Namespace, overrides: Sequence[str] = ()) -> Iterator[Job]:
    """Settle the recipe, lock the run, save its settings; a dry run does only the first.

    ``overrides`` come from named flags and outrank ``--set``.
    """
    chosen = [*options.set, *overrides]
    run, recipe = recipes.resolve(options.preset, options.config, chosen, options.run)
    if options.dry_run or _is_locked_for_us(run.folder):
        yield Job(run=run, recipe=recipe)
        return
    with storage.lock_run(run.folder), recipes.saved(run) as saved:
        yield Job(run=saved, recipe=recipe)


def _is_locked_for_us(folder: Path) -> bool:
    """True in a process that was started by one that holds the lock, or by torchrun."""
    held = os.environ.get(LOCK_HELD_VARIABLE) == str(folder.resolve())
    return held or os.environ.get("RANK", "0") != "0"


def download(options: argparse.Namespace) -> None:
    """Step 01."""
    with working_on(options, source_overrides(["data"], options.source)) as job:
        if not _ends_dry(options, f"01 would read {_sources(job)} into {job.run.data('raw')}"):
            call("prepare", "download")(job.run, job.recipe)


def clean(options: argparse.Namespace) -> None:
    """Step 02."""
    with working_on(options) as job:
        if not _ends_dry(
            options, f"02 would clean into {job.run.data('clean')}", job.run.data("raw")
        ):
            call("prepare", "clean")(job.run, job.recipe, workers.from_flags(options))


def tokenize(options: argparse.Namespace) -> None:
    """Step 03."""
    with working_on(options) as job:
        if not _ends_dry(
            options, f"03 would pack into {job.run.data('packed')}", job.run.data("clean")
        ):
            call("prepare", "tokenize_and_pack")(job.run, job.recipe, num_workers=options.workers)


def initialize(options: argparse.Namespace) -> None:
    """Step 04."""
    with working_on(options) as job:
        parameters = job.recipe.model.num_parameters
        if not _ends_dry(
            options, f"04 would write a model of {parameters:,} parameters", job.run.tokenizer
        ):
            call("initialize", "initialize")(job.run, job.recipe)


def pretrain(options: argparse.Namespace) -> None:
    """Step 05."""
    train(options, "pretrain")


def prepare_sft(options: argparse.Namespace) -> None:
    """Step 06."""
    with working_on(options, source_overrides(["sft.data", "lora.data"], options.source)) as job:
        if not _ends_dry(
            options,
            f"06 would prepare {job.run.data('sft')} and its like for lora",
            job.run.tokenizer,
        ):
            call("prepare", "prepare_sft")(job.run, job.recipe)


def sft(options: argparse.Namespace) -> None:
    """Step 07."""
    train(options, "sft")


def prepare_dpo(options: argparse.Namespace) -> None:
    """Step 08."""
    with working_on(options, source_overrides(["dpo.data"], options.source)) as job:
        if not _ends_dry(options, f"08 would prepare {job.run.data('dpo')}", job.run.tokenizer):
            call("prepare", "prepare_dpo")(job.run, job.recipe)


def dpo(options: argparse.Namespace) -> None:
    """Step 09."""
    train(options, "dpo")


def lora(options: argparse.Namespace) -> None:
    """Step 10."""
    train(options, "lora")


def evaluate(options: argparse.Namespace) -> None:
    """Step 11."""
    with working_on(options) as job:
        tasks = job.recipe.evaluate.tasks_of(options.stage)
        if not _ends_dry(
            options,
            f"11 would measure {', '.join(task.name for task in tasks)}",
            job.run.model(options.stage),
        ):
            call("evaluation", "evaluate_stage")(job.run, job.recipe, options.stage)


def check(options: argparse.Namespace) -> None:
    """Step 12."""
    with working_on(options) as job:
        gates_file = options.gates or recipes.gates_file()
        if not _ends_dry(
            options,
            f"12 would judge {options.stage} by {gates_file}",
            job.run.model(options.stage),
        ):
            call("evaluation", "check_stage")(job.run, job.recipe, options.stage, gates_file)


def train(options: argparse.Namespace, stage: str) -> None:
    """Train one stage: in this process, or in one process per GPU where there are several."""
    with working_on(options, precision_overrides(options, stage)) as job:
        require_known_gates(job.run, job.recipe, recipes.gates_file())
        if options.dry_run:
            call("training", "check_named_inputs")(job.run, job.recipe, _stage_options(options))
            dry_run(job, [stage], options)
        else:
            train_stage(job, stage, options)


def train_stage(job: Job, stage: str, options: argparse.Namespace) -> None:
    """Train ``stage`` of a run whose lock is held."""
    call("planning", "require_room")(job.run, job.recipe, stage, options.start_from)
    if options.start_from is not None and os.environ.get("RANK", "0") == "0":
        take_in = call("outside", "take_in")
        take_in(job.run, job.recipe, stage, options.start_from, options.force)
    if _train_on_all_gpus(job.run, stage, options):
        return
    try:
        call(stage, stage)(job.run, job.recipe, _stage_options(options))
    except StoppedError as stopped:
        if options.resume or stopped.exit_code != StoppedError.exit_code:
            raise
        raise StoppedError(f"{stopped}, without --no-resume this time") from None


def _stage_options(options: argparse.Namespace) -> Any:
    training = importlib.import_module("sevenfold.workflow.training")
    return training.StageOptions(
        oom_recovery=options.enable_oom_recovery,
        resume=options.resume,
        start_from=options.start_from,
        force=options.force,
        data=getattr(options, "data", None),
    )


def dry_run(job: Job, stages: Sequence[str], options: argparse.Namespace) -> None:
    """Plan ``stages`` and rehearse the largest on the GPUs there are; write nothing."""
    if not stages:
        console.print_line("dry run: the recipe is valid and no stage trains; nothing was written")
        return
    asked = stages[:1] if len(stages) == 1 else ["run", "--from", stages[0], "--until", stages[-1]]
    arguments = [*asked, "--dry-run", "--preset", job.run.preset]
    arguments += [] if options.config is None else ["--config", str(options.config)]
    arguments += [] if options.fp8 is None else ["--fp8" if options.fp8 else "--no-fp8"]
    for assignment in options.set:
        arguments += ["--set", assignment]
    start_from = getattr(options, "start_from", None)
    arguments += [] if start_from is None else ["--start-from", str(start_from)]
    if not on_all_gpus(arguments, job.run):
        call("planning", "dry_run")(job.run, job.recipe, stages, start_from)


def _train_on_all_gpus(run: Run, stage: str, options: argparse.Namespace) -> bool:
    arguments = [stage]
    arguments += ["--enable-oom-recovery"] if options.enable_oom_recovery else []
    arguments += [] if options.resume else ["--no-resume"]
    for name in ("start_from", "force", "data"):
        value = getattr(options, name, None)
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return on_all_gpus([*arguments, *(["--debug"] if options.debug else [])], run)


def on_all_gpus(arguments: list[str], run: Run | None = None) -> bool:
    """Do a command in one process per GPU; False where one process, this one, is enough.

    ``run`` is the run that it works on, whose lock this process holds; None for no run.

    Errors:
        SevenfoldError: the processes ended with an error, which they have printed themselves.
    """
    from sevenfold.train import launch

    num_processes = launch.num_processes_to_start()
    if num_processes == 1:
        return False
    command = ["-m", "sevenfold.workflow.cli", *arguments]
    if run is not None:
        os.environ[LOCK_HELD_VARIABLE] = str(run.folder.resolve())
        command += ["--run", str(run.folder)]
    code = launch.launch(command, num_processes)
    if code:
        kinds = {kind.exit_code: kind for kind in SevenfoldError.__subclasses__()}
        raise kinds.get(code, SevenfoldError)(
            f"{arguments[0]}: one of {num_processes} processes ended with exit code {code}; its "
            "own message is above"
        )
    return True


def precision_overrides(options: argparse.Namespace, stage: str) -> list[str]:
    """Return what ``--fp8`` and ``--no-fp8`` mean for the recipe."""
    if options.fp8 is None:
        return []
    section = stage if stage == "pretrain" else f"{stage}.train"
    return [f"{section}.precision={'fp8' if options.fp8 else 'bf16'}"]


def source_overrides(sections: Sequence[str], sources: Sequence[Path]) -> list[str]:
    """Return what ``--source`` means for the recipe, so that later steps read the same sources.

    Errors:
        UsageError: nothing is there.
    """
    if not sources:
        return []
    from sevenfold.data.sources import list_files, sources_from_paths

    configs = sources_from_paths([path.expanduser().absolute() for path in sources])
    for config in configs:
        list_files(config)
    values = json.dumps(to_plain(configs))
    changes = [f"{section}.sources={values}" for section in sections]
    if sections == ["data"]:
        return [*changes, "data.village=null", "data.mixture=null"]
    return [*changes, *(f"{section}.weights=null" for section in sections)]


def _sources(job: Job) -> str:
    sources = job.recipe.data.sources
    return ", ".join(source.location for source in sources) or "the embedded village"


def _ends_dry(options: argparse.Namespace, plan: str, *inputs: Path) -> bool:
    """Say what would be done if this is a dry run, once the inputs that are there were checked.

    Errors:
        BadDataError: a file of an input is not what its manifest says.
    """
    if options.dry_run:
        for folder in inputs:
            if (folder / storage.MANIFEST).is_file():
                storage.verify_folder(folder)
            else:
                plan += f"; {folder} is not there yet"
        console.print_line(f"dry run: {plan}; nothing was written")
    return bool(options.dry_run)


def call(module: str, function: str) -> Callable[..., Any]:
    """Import a step only now: most of them import torch and transformers."""
    step: Callable[..., Any] = getattr(
        importlib.import_module(f"sevenfold.workflow.{module}"), function
    )
    return step


def plan(options: argparse.Namespace) -> None:
    """Plan every training stage: memory, tokens, time and cost; train nothing."""
    run, recipe = recipes.resolve(options.preset, options.config, options.set, options.run)
    call("planning", "plan_all")(run, recipe, options.gpus)
