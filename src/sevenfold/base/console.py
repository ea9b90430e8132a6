"""What people see: lines, tables, the progress of a stage, and the log.

Results and progress go to standard output, the log to standard error. A reader that goes away
(``| head``, a closed terminal) never stops a run: what can no longer be shown is dropped.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sevenfold.base.errors import without_secrets

# Plain lines are printed this often, whichever comes first, when nobody watches a bar move.
PLAIN_LINES_PER_STAGE = 20
PLAIN_LINE_EVERY_S = 60.0
# What is drawn of a stage while it trains, and how its newest value is written.
CURVES = {"loss": "{:.4f}", "lr": "{:.2e}", "grad_norm": "{:.3g}", "tok_s": "{:,.0f}"}
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48
MOST_ROWS_DRAWN = 4096
# Names of libraries that announce on import what they could not load; none of it is news.
TALKATIVE = (
    "torchao",
    "torch.utils._pytree",
    "datasets",
    "lm_eval",
    "transformers",
    "peft",
    "urllib3",
    "filelock",
    "fsspec",
)


class _LastingStream(io.TextIOBase):
    """Standard output that survives its reader: errors while writing are swallowed."""

    def __init__(self, name: str, *, below_bar: bool = False):
        self._name = name
        self._below_bar = below_bar

    @property
    def _stream(self) -> TextIO | None:
        stream = getattr(sys, self._name, None)
        # While a bar is shown, rich puts a proxy before the stream that prints above the bar; the
        # bar itself must write past that proxy.
        return getattr(stream, "rich_proxied_file", stream) if self._below_bar else stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("standard output is closed")
        return self._stream.fileno()


def output_console(*, below_bar: bool = False) -> Console:
    """Return a console on standard output as it is now; plain text where it is no terminal."""
    stream = _LastingStream("stdout", below_bar=below_bar)
    # A file or a pipe has no width: long lines are left to whoever reads them.
    width = None if stream.isatty() else 160
    file = cast("TextIO", stream)
    return Console(file=file, highlight=False, soft_wrap=True, width=width)


class _LogHandler(logging.Handler):
    """One line a record on standard error, without what a terminal bar would be torn by."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        stream = _LastingStream("stderr")
        stream.write(without_secrets(f"{level}{self.format(record)}\n"))
        stream.flush()


def setup_logging(*, debug: bool = False) -> None:
    """Send the package's log to standard error: from INFO on, with ``debug`` everything."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _LogHandler):
            root.removeHandler(handler)
    handler = _LogHandler()
    if debug:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("sevenfold").setLevel(logging.DEBUG if debug else logging.INFO)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING if debug else logging.ERROR)


def silence_libraries() -> None:
    """Turn off the progress bars and advice of the libraries, unless the user asked for them.

    Call it before they are imported: most of them read these variables only then.
    """
    quiet = {
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def share_cores() -> None:
    """Let idle threads sleep instead of spinning beside other programs.

    On two cores that others used as well, a step took 20 to 50 ms with this and 830 ms without.
    Call it before torch is imported: OpenMP reads the variable once.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_compiled_code() -> None:
    """Let torch.compile and Triton keep what they make in the user's cache folder, side by side.

    So that the next process has it. Left to itself the one takes the folder for temporary files,
    which a restart empties and in which others may write; the other takes the home, until the
    first has compiled something, then a place below that. Call it before either is imported.
    """
    # Of a user who has no home, or whose home is another's: torch chooses.
    with contextlib.suppress(RuntimeError, OSError):
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = home / "sevenfold"
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if os.access(nearest, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def print_line(text: str = "", *, style: str | None = None) -> None:
    """Print one line to standard output; ``style`` (``bold``, ``green``) shows in a terminal."""
    output_console().print(Text(text, style=style or ""))


def print_raw(text: str) -> None:
    """Print ``text`` as it is, without a line break: for streamed answers."""
    stream = _LastingStream("stdout")
    stream.write(text)
    stream.flush()


def print_error(message: str, *, kind: str = "error") -> None:
    """Print one line, ``kind: message``, to standard error."""
    stream = _LastingStream("stderr")
    stream.write(without_secrets(f"{kind}: {' '.join(message.split())}\n"))
    stream.flush()


def print_traceback() -> None:
    """Print where the error that is being handled came from, to standard error."""
    stream = _LastingStream("stderr")
    stream.write(without_secrets(traceback.format_exc()))
    stream.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; a cell may be a number, a text or a rich Text, None is a dash."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for name in columns:
        table.add_column(name)
    for row in rows:
        # As Text, or rich would take what stands in square brackets for markup.
        table.add_row(*(cell if isinstance(cell, Text) else Text(_cell(cell)) for cell in row))
    output_console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def detach_output() -> None:
    """Let the interpreter end quietly when standard output or error was closed under it."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name, None)
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def duration(seconds: float) -> str:
    """Return ``seconds`` as people say it: 42 s, 3:05, 2:07:30."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe_step(row: Mapping[str, Any]) -> str:
    """Return a row of ``metrics.jsonl`` as one readable line; what the row lacks is left out."""
    shapes = (
        ("loss", "loss {:.4f}"),
        ("validation_loss", "held-out {:.4f}"),
        ("lr", "lr {:.2e}"),
        ("seq_len", "context {}"),
        ("tok_s", "{:,.0f} tok/s"),
        ("mfu", "MFU {:.1%}"),
        ("mem_gib", "{:.1f} GiB"),
    )
    return "  ".join(
        shape.format(row[name]) for name, shape in shapes if isinstance(row.get(name), int | float)
    )


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Return ``values`` as a line of ``width`` bars at most, each the mean of its share."""
    width = min(width, len(values))
    edges = [len(values) * at // width for at in range(width + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    least, most = min(means), max(means)
    span = most - least
    heights = [(mean - least) / span if span else 0.0 for mean in means]
    return "".join(BARS[min(len(BARS) - 1, int(height * len(BARS)))] for height in heights)


def curves(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a sparkline, and the newest value, of what the rows of metrics hold."""
    table = Table.grid(padding=(0, 2))
    for name, shape in CURVES.items():
        values = [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if values:
            last = shape.format(values[-1])
            table.add_row(Text(name.replace("_", " ")), Text(sparkline(values)), Text(last))
    return table


class TrainingProgress:
    """The progress of one training stage, drawn from the rows that go to ``metrics.jsonl``.

    In a terminal it is a bar below the stages and the curves; elsewhere about twenty plain lines a
    stage, and one a minute. Use it as a context manager, on one process only.
    """

    def __init__(
        self,
        title: str,
        *,
        num_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        stages: Text | None = None,
        later_steps: float | None = None,
    ) -> None:
        """Show steps ``start_step`` to ``num_steps`` of the stage named ``title``.

        ``stages`` is a line about all stages; ``later_steps`` is how long those after this one
        train, in steps of this one, None where that is not known.
        """
        self._title = title
        self._num_steps = num_steps
        self._start_step = start_step
        self._enabled = enabled
        self._console = output_console(below_bar=True)
        self._started_at_s = time.monotonic()
        self._line_at_s = self._started_at_s
        self._stages, self._later_steps = stages, later_steps
        self._rows: list[Mapping[str, Any]] = []
        self._bar: Progress | None = None
        self._live: Live | None = None
        self._line_at_step = start_step
        self._held_out: dict[str, Any] = {}

    def __enter__(self) -> TrainingProgress:
        self._started_at_s = self._line_at_s = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}  {task.fields[facts]}"),
                console=self._console,
            )
            self._bar.add_task(
                self._title, total=self._num_steps, completed=self._start_step, facts=""
            )
            self._live = Live(
                get_renderable=self._picture, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def _picture(self) -> Group:
        assert self._bar is not None
        above = [self._stages] if self._stages else []
        return Group(*above, curves(self._rows), self._bar)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show one row; a row without ``loss`` (a held-out measurement) is kept for the next."""
        if not self._enabled:
            return
        if row.get("validation_loss") is not None:
            self._held_out = {"validation_loss": row["validation_loss"]}
        if row.get("loss") is None:
            return
        step = int(row["step"])
        hidden = CURVES.keys() - {"loss"} if self._bar else ()  # drawn above the bar
        shown = {name: value for name, value in row.items() if name not in hidden}
        facts = describe_step({**self._held_out, **shown}) + self._time_left(step)
        if self._bar is not None:
            if len(self._rows) >= MOST_ROWS_DRAWN:  # every second will do for a picture this small
                del self._rows[::2]
            self._rows.append(row)
            self._bar.update(self._bar.task_ids[0], completed=step, facts=facts)
        elif self._is_due(step):
            self._line_at_s, self._line_at_step = time.monotonic(), step
            self._console.print(Text(f"{self._title} {step}/{self._num_steps}  {facts}"))

    def _is_due(self, step: int) -> bool:
        every = max(1, self._num_steps // PLAIN_LINES_PER_STAGE)
        waited = time.monotonic() - self._line_at_s
        is_far = step - self._line_at_step >= every
        return is_far or step >= self._num_steps or waited >= PLAIN_LINE_EVERY_S

    def _time_left(self, step: int) -> str:
        done, left = step - self._start_step, self._num_steps - step
        if done <= 0 or left <= 0:
            return ""
        step_s = (time.monotonic() - self._started_at_s) / done
        told = f"  {duration(step_s * left)} left"
        if self._later_steps:
            told += f", {duration(step_s * (left + self._later_steps))} of all training"
        return told


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Say what is being done while it takes a moment, and how long it took."""
    console = output_console(below_bar=True)
    started_at_s = time.monotonic()
    if not console.is_terminal:
        console.print(Text(f"{text} ..."))
        yield
        return
    with console.status(text):
        yield
    elapsed = duration(time.monotonic() - started_at_s)
    console.print(Text(f"{text}: {elapsed}", style="dim"))
