"""Stopping on a signal after saving, and steps whose numbers are not finite."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType

from sevenfold.base.errors import DivergedError

log = logging.getLogger(__name__)


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


class FiniteGuard:
    """Counts steps that were skipped because loss or gradient was not finite."""

    def __init__(self, max_skipped_steps: int, *, num_skipped: int = 0, in_a_row: int = 0):
        """Allow ``max_skipped_steps`` in a row."""
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = num_skipped
        self.in_a_row = in_a_row

    def skip(self, step: int, *, loss: float, grad_norm: float) -> None:
        """Count one skipped step.

        Errors:
            DivergedError: more than ``max_skipped_steps`` in a row.
        """
        self.num_skipped += 1
        self.in_a_row += 1
        log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, grad_norm)
        if self.in_a_row > self.max_skipped_steps:
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; {self.in_a_row} steps in a "
                "row were not finite. Take a smaller schedule.peak_lr, or look at this step's data"
            )

    def accept(self) -> None:
        """Note a step whose numbers were finite."""
        self.in_a_row = 0
