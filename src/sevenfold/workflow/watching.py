"""``sevenfold watch``: a run as it trains, from another terminal, from the run's files alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.console import Group
from rich.live import Live
from rich.text import Text

from sevenfold.base import console
from sevenfold.base.records import Run, open_run
from sevenfold.workflow.remaining import StageProgress, progress, seconds_left

WATCH_EVERY_S = 2.0
MARKS = {
    "promoted": ("✓", "green"),
    "refused": ("✗", "red"),
    "trained": ("■", "yellow"),
    "training": ("▸", "bold"),
    "ahead": ("·", "dim"),
}


def watch(options: argparse.Namespace) -> None:
    """Show where a run stands until interrupted: stages, curves, and the time that is left."""
    run = open_run(options.run)
    plain = console.output_console()
    try:
        if options.once or not plain.is_terminal:
            _watch_plainly(run, once=options.once)
            return
        with Live(_picture(run), console=plain, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_EVERY_S)
                live.update(_picture(run), refresh=True)
    except KeyboardInterrupt:
        return


def _watch_plainly(run: Run, *, once: bool) -> None:
    """Print a line for each new step that is logged."""
    shown: tuple[str, int] | None = None
    while True:
        stages = progress(run)
        newest = current(stages)
        if newest is not None and newest.rows and (newest.stage, newest.step) != shown:
            shown = (newest.stage, newest.step)
            console.print_line(
                f"{newest.stage} step {_steps(newest)}  "
                f"{console.describe_step(newest.rows[-1])}{_left(stages)}"
            )
        if once:
            if newest is None:
                console.print_line(f"{run.folder}: nothing has trained yet")
            return
        time.sleep(WATCH_EVERY_S)


def current(stages: Sequence[StageProgress]) -> StageProgress | None:
    """Return the stage that is training, or the last that has; None before the first."""
    begun = [stage for stage in stages if stage.rows]
    unfinished = [stage for stage in begun if not stage.is_done]
    return (unfinished or begun)[-1] if begun else None


def _steps(stage: StageProgress) -> str:
    return f"{stage.step}" if stage.num_steps is None else f"{stage.step}/{stage.num_steps}"


def _left(stages: Sequence[StageProgress]) -> str:
    left_s = seconds_left(stages)
    return f"  about {console.duration(left_s)} of training left" if left_s else ""


def _picture(run: Run) -> Group:
    stages = progress(run)
    strip = stage_strip(stages)
    shown = current(stages)
    if shown is None:
        return Group(strip, Text(f"{run.folder}: nothing has trained yet", style="dim"))
    facts = f"{shown.stage}  {console.describe_step(shown.rows[-1])}{_left(stages)}"
    return Group(strip, console.curves(shown.rows), Text(facts, style="dim"))


def stage_strip(stages: Sequence[StageProgress], training: str | None = None) -> Text:
    """Return one line with a mark for every stage; ``training`` is the one that begins now."""
    strip = Text()
    for stage in stages:
        state = "training" if stage.stage == training else _state(stage)
        mark, style = MARKS[state]
        steps = f" {_steps(stage)}" if state == "training" and training is None else ""
        strip.append(f" {mark} {stage.stage}{steps} ", style=style)
    return strip


def _state(stage: StageProgress) -> str:
    if stage.is_done:
        return stage.gate or "trained"
    return "training" if stage.rows else "ahead"
