"""How much a metric moves from one training to another of the same recipe, beside its interval.

An interval in evaluation.json is over items: it says how far the value may be from that of all such
items, for this very model. Another training is another model. For every metric this prints the
standard deviation between runs, and what the interval's half-width would make one expect of it,
if items were all that differed.

    python bench/noise_floor.py runs/gates/seed-201 runs/gates/seed-202 runs/gates/seed-203

The runs' recipes may differ in their seeds only. Where seeds draw the evaluation items too, as the
village's does, the spread between runs holds that of the items as well; the table says so.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from sevenfold.base import storage
from sevenfold.base.errors import SevenfoldError, UsageError
from sevenfold.base.records import GATED_STAGES, Run, open_run


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One metric of one stage over the runs.

    ``by_items`` is the standard deviation that the runs' own intervals lead one to expect, None
    without intervals; ``same_items``: all runs were measured on the same items.
    """

    stage: str
    metric: str
    values: tuple[float, ...]
    between: float
    by_items: float | None
    same_items: bool

    @property
    def by_chance(self) -> float:
        """How far two runs differ in one of twenty cases, by this spread."""
        return NormalDist().inv_cdf(0.975) * math.sqrt(2) * self.between


def spreads(folders: Sequence[Path]) -> list[Spread]:
    """Return the spread of every metric that all runs have.

    Errors:
        UsageError: fewer than two runs, or two of different recipes.
    """
    if len(folders) < 2:
        raise UsageError("one run has no spread; name two at least, of one recipe and other seeds")
    runs = [open_run(folder) for folder in folders]
    for run in runs[1:]:
        _require_same_recipe(runs[0], run)
    found: list[Spread] = []
    for stage in GATED_STAGES:
        paths = [run.stage(stage) / "evaluation.json" for run in runs]
        if all(path.is_file() for path in paths):
            found += _of_stage(stage, [storage.read_json(path) for path in paths])
    return found


def _of_stage(stage: str, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[Spread]:
    for metric in evaluations[0]["metrics"]:
        facts = [evaluation["metrics"].get(metric) for evaluation in evaluations]
        if any(fact is None or fact["value"] is None for fact in facts):
            continue
        values = tuple(float(fact["value"]) for fact in facts)
        task = facts[0].get("task")
        items = {
            str(evaluation["data"].get(task, evaluation["data"])) for evaluation in evaluations
        }
        yield Spread(
            stage=stage,
            metric=metric,
            values=values,
            between=statistics.stdev(values),
            by_items=_by_items(facts),
            same_items=len(items) == 1,
        )


def _by_items(facts: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the root of the runs' mean squared standard error, from their intervals."""
    variances = []
    for fact in facts:
        if fact["low"] is None or fact["high"] is None or fact["kind"] == "measured":
            return None
        z = NormalDist().inv_cdf(0.5 + fact["confidence"] / 2)
        variances.append(((fact["high"] - fact["low"]) / 2 / z) ** 2)
    return math.sqrt(statistics.fmean(variances))


def _require_same_recipe(first: Run, other: Run) -> None:
    for field, one, two in _differences(first.recipe, other.recipe):
        if field.rpartition(".")[2] != "seed":
            raise UsageError(
                f"{other.folder / 'run.json'}:recipe.{field}: found {two}, {first.folder} has "
                f"{one}; compare runs whose recipes differ in their seeds only"
            )


def _differences(one: Any, two: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}):
            yield from _differences(one.get(key), two.get(key), f"{name}.{key}".lstrip("."))
    elif one != two:
        yield name, one, two


def table(found: Sequence[Spread]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| stage | metric | values | between runs | by items | ratio | two differ by | items |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in found:
        ratio = f"{one.between / one.by_items:.1f}" if one.by_items else "-"
        cells = (
            one.stage,
            one.metric,
            ", ".join(f"{value:.3g}" for value in one.values),
            f"{one.between:.2g}",
            "-" if one.by_items is None else f"{one.by_items:.2g}",
            ratio,
            f"{one.by_chance:.2g}",
            "the same" if one.same_items else "others",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    try:
        sys.stdout.write(table(spreads([Path(text) for text in sys.argv[1:]])) + "\n")
    except SevenfoldError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
