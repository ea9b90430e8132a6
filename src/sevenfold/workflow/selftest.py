"""``sevenfold selftest faults``: break runs in every way that is promised to be harmless.

The same runs are made by the tests, so that the published table and the tests cannot differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sevenfold import __version__
from sevenfold.base import console, storage
from sevenfold.base.errors import SevenfoldError, UsageError
from sevenfold.workflow.attempts import Laboratory, Result

COLUMNS = (
    "fault",
    "rows",
    "runs",
    "recovered",
    "identical",
    "median steps lost",
    "median seconds to recover",
)
BEGIN, END = "<!-- selftest faults: begin -->", "<!-- selftest faults: end -->"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What came of all runs with one kind of fault."""

    name: str
    rows: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def failures(self) -> list[Result]:
        """The runs that did not come back, or came back different."""
        return [r for r in self.results if not (r.recovered and r.identical)]

    def cells(self) -> list[str]:
        """Return the line of the table."""
        lost = [r.num_steps_lost for r in self.results if r.num_steps_lost is not None]
        seconds = [r.recovery_s for r in self.results if r.recovery_s is not None]
        return [
            self.name,
            " ".join(self.rows),
            str(len(self.results)),
            str(sum(r.recovered for r in self.results)),
            str(sum(r.identical for r in self.results)),
            f"{statistics.median(lost):g}" if lost else "-",
            f"{statistics.median(seconds):.2f}" if seconds else "-",
        ]


def selftest(options: argparse.Namespace) -> None:
    """Break runs, print the table, and write it to ``--output``.

    Errors:
        UsageError: the output file has no place for the table.
        SevenfoldError: a run did not come back, or came back different.
    """
    if options.output is not None:
        _place_in(options.output)  # before minutes of work, not after
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="sevenfold-selftest-") as folder:
        lines = break_toys(Path(folder))
        if options.soak:
            from sevenfold.workflow import soak

            lines += [_told(line) for line in soak.break_stages(Path(folder))]
    console.print_table("selftest faults", COLUMNS, [line.cells() for line in lines])
    if options.output is not None:
        publish(options.output, lines)
        console.print_line(f"{options.output}: the table is written")
    require_all(lines)


def break_toys(folder: Path) -> list[Line]:
    """Try every mishap on a toy run in this process's children, saying how it goes."""
    from sevenfold.workflow.mishaps import MISHAPS

    laboratory = Laboratory(folder)
    lines = []
    for mishap in MISHAPS:
        started_s = time.perf_counter()
        results = tuple(mishap.runs(laboratory))
        line = Line(name=mishap.name, rows=mishap.rows, results=results)
        lines.append(_told(line, time.perf_counter() - started_s))
    return lines


def _told(line: Line, elapsed_s: float | None = None) -> Line:
    good = len(line.results) - len(line.failures)
    took = "" if elapsed_s is None else f" ({elapsed_s:.0f} s)"
    style = "red" if line.failures else "green"
    text = f"{line.name}: {good} of {len(line.results)} recovered and identical{took}"
    console.print_line(text, style=style)
    for failure in line.failures:
        console.print_line(f"  {failure.why}", style="red")
    return line


def require_all(lines: Sequence[Line]) -> None:
    """Refuse a table in which a run is not as it should be.

    Errors:
        SevenfoldError: at least one is not; the first is named.
    """
    failures = [(line.name, failure) for line in lines for failure in line.failures]
    if failures:
        name, first = failures[0]
        raise SevenfoldError(
            f"selftest: {len(failures)} of {sum(len(line.results) for line in lines)} runs did not "
            f"come back identical, first: {name}: {first.why}; do not trust resumed runs on this "
            "machine, and report this line"
        )


def publish(path: Path, lines: Sequence[Line]) -> None:
    """Write the table to ``path``: in place of the one that is there, or as a new file."""
    before, after = _place_in(path)
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(line.cells() for line in lines)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    made = (
        f"Sevenfold {__version__}, torch {importlib.metadata.version('torch')}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}."
    )
    storage.write_text(path, f"{before}{BEGIN}\n{table}\n{made}\n{END}{after}")


def _place_in(path: Path) -> tuple[str, str]:
    """Return what stands in ``path`` before and after the table."""
    if not path.exists():
        return "", "\n"
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(
            f"{path}: no place for the table; put the lines '{BEGIN}' and '{END}' where it shall "
            "stand, or name a new file"
        )
    return before, after
