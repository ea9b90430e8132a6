"""Stopping on a signal after saving, bad steps, and what a replay of them must repeat."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from sevenfold.base import storage
from sevenfold.base.errors import CheckpointError

log = logging.getLogger(__name__)

# Steps whose loss and gradient norm say what is usual, and how many must be known before a step is
# called unusual.
WINDOW = 128
ENOUGH = WINDOW // 2


class StopRequest:
    """Remembers that SIGTERM or Ctrl-C came; training looks at it once a step."""

    def __init__(self) -> None:
        """Start without a request; ``agreed`` is set once all processes know of it."""
        self.signal_name: str | None = None
        self.agreed = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            log.warning("%s: stopping after this step, saving first", signal.Signals(number).name)
        self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request while the block runs; a second one changes nothing."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, request._remember) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RollBack(Exception):  # noqa: N818  an instruction to the loop, not an error of the user's
    """Go back to the last good checkpoint; the message says what was wrong in ``step``."""

    def __init__(self, problem: str, *, step: int):
        """Remember the step, counted from 1."""
        super().__init__(problem)
        self.step = step


class StepGuard:
    """Judges the numbers of each step before the optimizer sees its gradients.

    Refused are numbers that are not finite, and a loss or gradient norm beyond ``sigma`` standard
    deviations above the mean of the last steps. Of the losses, refused ones do not count: where
    they stay high the weights or the data are bad, and that must not become the usual. Of the
    norms, all count: they may rise for good while the loss does not, and a guard that remembers
    the low ones alone would refuse every step from there on.
    """

    def __init__(self, *, sigma: float | None, max_in_a_row: int):
        """Refuse outliers beyond ``sigma``, None for never; allow ``max_in_a_row`` refusals."""
        self.sigma = sigma
        self.max_in_a_row = max_in_a_row
        self.num_skipped = 0
        self.in_a_row = 0
        self.seq_len = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def judge(self, loss: float, grad_norm: float, *, seq_len: int) -> str | None:
        """Return why this step must not be applied, or None and remember its numbers.

        What is usual at one context length says nothing about another.
        """
        if seq_len != self.seq_len:
            self.seq_len = seq_len
            self._losses.clear()
            self._norms.clear()
        problem = self._problem("loss", loss, self._losses)
        problem = problem or self._problem("gradient norm", grad_norm, self._norms)
        if math.isfinite(grad_norm):
            self._norms.append(grad_norm)
        if problem is None:
            self.in_a_row = 0
            self._losses.append(loss)
        else:
            self.refuse()
        return problem

    def refuse(self) -> None:
        """Count a step that is not applied."""
        self.num_skipped += 1
        self.in_a_row += 1

    @property
    def has_had_enough(self) -> bool:
        """True after more refusals in a row than are allowed."""
        return self.in_a_row > self.max_in_a_row

    def _problem(self, name: str, value: float, usual: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} {value} is not finite"
        if self.sigma is None or len(usual) < ENOUGH:
            return None
        limit = statistics.fmean(usual) + self.sigma * statistics.pstdev(usual)
        if value > limit:
            return f"{name} {value:.4g} is beyond {self.sigma:g} sigma ({limit:.4g})"
        return None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "num_skipped": self.num_skipped,
            "in_a_row": self.in_a_row,
            "seq_len": self.seq_len,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` returned."""
        self.num_skipped = state["num_skipped"]
        self.in_a_row = state["in_a_row"]
        self.seq_len = state["seq_len"]
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["norms"], maxlen=WINDOW)


@dataclasses.dataclass
class Decisions:
    """What was decided on the way and must be decided the same when steps are done again.

    ``micro_batches``: (step, rows) from which step on fewer rows at a time were computed, because
    memory ran out. ``detours``: (step, batches) from which step on the data go on that many
    batches later, because those in between were bad. Steps are counted from 0. Kept in a file of
    its own, so that a run that falls back to any checkpoint repeats them; None keeps them nowhere.
    """

    path: Path | None = None
    micro_batches: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    detours: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Decisions:
        """Read the decisions kept in ``path``; none where there is no such file.

        Errors:
            CheckpointError: the file is not readable.
        """
        if not path.is_file():
            return cls(path)
        kept = storage.read_json(path, CheckpointError)
        try:
            pairs = {
                name: [(int(step), int(amount)) for step, amount in kept[name]]
                for name in ("micro_batches", "detours")
            }
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path}: not what training wrote; start the stage again with --no-resume"
            ) from None
        return cls(path, **pairs)

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            values = {"micro_batches": self.micro_batches, "detours": self.detours}
            storage.write_json(self.path, values)

    def micro_batch(self, step: int, configured: int) -> int:
        """Rows of the longest context that ``step`` computes at a time."""
        return min([configured, *(rows for first, rows in self.micro_batches if step >= first)])

    def place(self, step: int) -> int:
        """Place of the batch of ``step`` in the endless sequence of batches."""
        return step + sum(batches for first, batches in self.detours if step >= first)
