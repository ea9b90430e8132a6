"""``sevenfold watch``: a run as it trains, from another terminal, from the run's files alone."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sevenfold.base import console
from sevenfold.base.records import Run, open_run
from sevenfold.workflow.remaining import StageProgress, progress, seconds_left

WATCH_EVERY_S = 2.0
CURVES = {"loss": "{:.4f}", "lr": "{:.2e}", "grad_norm": "{:.3g}", "tok_s": "{:,.0f}"}
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48
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
    strip = Text()
    for stage in stages:
        mark, style = MARKS[_state(stage)]
        steps = f" {_steps(stage)}" if _state(stage) == "training" else ""
        strip.append(f" {mark} {stage.stage}{steps} ", style=style)
    shown = current(stages)
    if shown is None:
        return Group(strip, Text(f"{run.folder}: nothing has trained yet", style="dim"))
    table = Table.grid(padding=(0, 2))
    for name, shape in CURVES.items():
        values = [float(r[name]) for r in shown.rows if isinstance(r.get(name), int | float)]
        if values:
            last = shape.format(values[-1])
            table.add_row(Text(name.replace("_", " ")), Text(sparkline(values)), Text(last))
    facts = f"{shown.stage}  {console.describe_step(shown.rows[-1])}{_left(stages)}"
    return Group(strip, table, Text(facts, style="dim"))


def _state(stage: StageProgress) -> str:
    if stage.is_done:
        return stage.gate or "trained"
    return "training" if stage.rows else "ahead"


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Return ``values`` as a line of ``width`` bars at most, each the mean of its share."""
    width = min(width, len(values))
    edges = [len(values) * at // width for at in range(width + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    least, most = min(means), max(means)
    span = most - least
    heights = [(mean - least) / span if span else 0.0 for mean in means]
    return "".join(BARS[min(len(BARS) - 1, int(height * len(BARS)))] for height in heights)
