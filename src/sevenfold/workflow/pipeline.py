"""All steps in order, in one process, with a gate after every training stage."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from sevenfold.base import console, records, storage
from sevenfold.base.errors import (
    GateRefusedError,
    SevenfoldError,
    StoppedError,
    UsageError,
    nearest,
    without_secrets,
)
from sevenfold.base.records import GATED_STAGES
from sevenfold.data.row_rules import RowRules
from sevenfold.verify.config import STAGES
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import steps
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.remaining import progress, seconds_left
from sevenfold.workflow.steps import Job
from sevenfold.workflow.thresholds import require_items, require_known_gates
from sevenfold.workflow.workers import Workers, require_executor

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Step:
    """One numbered step of the pipeline; ``verb`` is its name on the command line."""

    number: str
    verb: str
    module: str
    function: str

    @property
    def is_training(self) -> bool:
        """True for the stages that end with a gate."""
        return self.verb in GATED_STAGES


STEPS = (
    Step("01", "download", "prepare", "download"),
    Step("02", "clean", "prepare", "clean"),
    Step("03", "tokenize", "prepare", "tokenize_and_pack"),
    Step("04", "init", "initialize", "initialize"),
    Step("05", "pretrain", "pretrain", "pretrain"),
    Step("06", "prepare-sft", "prepare", "prepare_sft"),
    Step("07", "sft", "sft", "sft"),
    Step("08", "prepare-dpo", "prepare", "prepare_dpo"),
    Step("09", "dpo", "dpo", "dpo"),
    Step("10", "lora", "lora", "lora"),
)


PREPARES_ROWS = {"prepare-sft": ("sft", "lora"), "prepare-dpo": ("dpo",)}


def run_all(options: argparse.Namespace) -> None:
    """Run the steps from ``--from`` to ``--until``; stop at a refusing gate unless forced.

    Errors:
        SevenfoldError: a step failed, or a gate did not promote; where the run holds anything by
            then, the report is written all the same, and names the error.
    """
    chosen = select(options.first, options.last)
    gates_file = options.gates or recipes.gates_file()
    for name, value in {"resume": True, "start_from": None, "fp8": None}.items():
        setattr(options, name, value)
    with steps.working_on(options) as job:
        gates = require_known_gates(job.run, job.recipe, gates_file)
        stages = [step.verb for step in chosen if step.is_training]
        if options.dry_run:
            steps.dry_run(job, stages, options)
            return
        _require_what_is_needed(job.recipe, chosen, _workers(options))
        for stage in stages:
            gates.checks(job.run.preset, stage)
            steps.call("planning", "require_room")(job.run, job.recipe, stage)
        started_at_s = time.monotonic()
        try:
            for index, step in enumerate(chosen):
                _announce(step, chosen, index)
                if step.is_training:
                    _say_what_is_left(job.run, stages)
                _perform(step, job, options, gates_file)
        except StoppedError:
            raise
        except SevenfoldError as error:
            _report_failure(job, started_at_s, error)
            raise
        _close(job, started_at_s)


def _workers(options: argparse.Namespace) -> Workers:
    return Workers(count=options.workers or 1)


def _require_what_is_needed(recipe: Recipe, chosen: Sequence[Step], workers: Workers) -> None:
    """Refuse now what a later step would refuse, perhaps after days.

    Errors:
        UsageError: a package or a file of items is not there, or a language is not told apart.
    """
    verbs = {step.verb for step in chosen}
    if "clean" in verbs:
        steps.call("clean", "require_packages")(recipe.clean)
        require_executor(workers)
    for verb, prepared in PREPARES_ROWS.items():
        for stage in prepared if verb in verbs else ():
            RowRules(getattr(recipe, stage).data.rules)
    # Data are searched for the items of all stages, whatever is trained today.
    is_searched = bool(verbs & {"clean", *PREPARES_ROWS})
    require_items(recipe, STAGES if is_searched else [s.verb for s in chosen if s.is_training])


def select(first: str | None, last: str | None) -> tuple[Step, ...]:
    """Return the steps from ``first`` to ``last``, each a verb or a number, both included.

    Errors:
        UsageError: a step that does not exist, or the last before the first.
    """
    start = 0 if first is None else _find("--from", first)
    end = len(STEPS) - 1 if last is None else _find("--until", last)
    if end < start:
        raise UsageError(f"--until {last} comes before --from {first}; exchange them")
    return STEPS[start : end + 1]


def _find(flag: str, name: str) -> int:
    names = {"11": "10", "12": "10", "evaluate": "lora", "check": "lora"}
    wanted = names.get(name, name)
    for index, step in enumerate(STEPS):
        if wanted in (step.verb, step.number, step.number.lstrip("0")):
            return index
    raise UsageError(f"{flag} {name}: no such step{nearest(name, [s.verb for s in STEPS])}")


def _announce(step: Step, chosen: tuple[Step, ...], index: int) -> None:
    """Print the strip of steps: done, this one, to come."""
    strip = Text()
    for at, other in enumerate(chosen):
        mark, style = (
            ("✓", "green") if at < index else ("▸", "bold") if at == index else ("·", "dim")
        )
        strip.append(f" {mark} {other.number} {other.verb} ", style=style)
    plain = console.output_console()
    if plain.is_terminal:
        plain.rule(style="dim")
        plain.print(strip)
    else:
        plain.print(Text(f"[{index + 1}/{len(chosen)}] {step.number} {step.verb}"))


def _say_what_is_left(run: records.Run, stages: Sequence[str]) -> None:
    """Print how long the training of ``stages`` still takes, once a stage has shown how fast."""
    left_s = seconds_left([stage for stage in progress(run) if stage.stage in stages])
    if left_s:
        console.print_line(f"about {console.duration(left_s)} of training left", style="dim")


def _perform(step: Step, job: Job, options: argparse.Namespace, gates_file: Path) -> None:
    if step.is_training:
        steps.train_stage(job, step.verb, options)
        _judge(step.verb, job, options.force, gates_file)
    elif step.verb == "clean":
        steps.call(step.module, step.function)(job.run, job.recipe, _workers(options))
    elif step.verb == "tokenize":
        steps.call(step.module, step.function)(job.run, job.recipe, num_workers=options.workers)
    else:
        steps.call(step.module, step.function)(job.run, job.recipe)


def _judge(stage: str, job: Job, force: str | None, gates_file: Path) -> None:
    """Measure and judge ``stage``; what has been measured already is not measured again."""
    release_models()
    steps.call("evaluation", "evaluate_stage")(job.run, job.recipe, stage)
    release_models()
    try:
        steps.call("evaluation", "check_stage")(job.run, job.recipe, stage, gates_file)
    except GateRefusedError as refusal:
        if force is None:
            raise
        record = job.run.record(stage)
        job.run.write_record(stage, {**record, "forced_past": force})
        console.print_line(f"going on past the gate, forced: {force} ({refusal})", style="yellow")


def release_models() -> None:
    """Drop what a stage left in memory, so that the next one starts from the same free memory."""
    hardware: Any = importlib.import_module("sevenfold.base.hardware")
    hardware.release_memory()


def _report_failure(job: Job, started_at_s: float, error: SevenfoldError) -> None:
    """Write the report of a run that ended early; what prevents that is no news beside ``error``.

    A run that holds nothing yet has nothing to report, and leaves nothing behind.
    """
    if not recipes.made_files(job.run):
        return
    try:
        _close(job, started_at_s, error=error)
    except SevenfoldError as further:
        log.warning("the report could not be written: %s", further)


def _close(job: Job, started_at_s: float, error: SevenfoldError | None = None) -> None:
    """Print the verdicts, three conversations if all went well, and where the report is."""
    from sevenfold.verify import report

    # A gate's refusal is told by the verdict.
    is_news = error is not None and not isinstance(error, GateRefusedError)
    told = without_secrets(str(error)) if is_news else ""
    path = report.write_report(job.run, error=told)
    _print_verdicts(job.run)
    finished = [s for s in GATED_STAGES if (job.run.stage(s) / "record.json").is_file()]
    if error is None and [s for s in finished if s != "pretrain"]:
        _print_conversations(job.run, finished[-1])
    console.print_line()
    console.print_line(f"time    {console.duration(time.monotonic() - started_at_s)}")
    console.print_line(f"report  {path}")
    console.print_line(f"talk    sevenfold chat {job.run.folder}")


def _print_verdicts(run: records.Run) -> None:
    rows: list[list[Any]] = []
    for stage in GATED_STAGES:
        path = run.stage(stage) / "verdict.json"
        if not path.is_file():
            rows.append([stage, "not judged", ""])
            continue
        verdict = storage.read_json(path)
        checks = verdict.get("checks", [])
        passed = sum(check.get("result") == "pass" for check in checks)
        promoted = verdict.get("promoted") is True
        word = Text("promoted" if promoted else "refused", style="green" if promoted else "red")
        rows.append([stage, word, f"{passed} of {len(checks)} checks pass"])
    console.print_table("verdicts", ["stage", "gate", ""], rows)


def _print_conversations(run: records.Run, stage: str) -> None:
    chat: Any = importlib.import_module("sevenfold.workflow.chat")
    console.print_line()
    console.print_line(f"Three questions to the model of stage {stage}:", style="bold")
    for prompt, answer in chat.converse(run, stage, chat.closing_prompts(run)):
        console.print_line(f"  you    {prompt}", style="cyan")
        console.print_line(f"  model  {answer}")
