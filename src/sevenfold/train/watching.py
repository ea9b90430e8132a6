"""Who looks on while a stage trains: the progress that is shown, and the clock of a benchmark."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

import torch

from sevenfold.base.hardware import reset_peak_memory
from sevenfold.data.batches import Batch

# The phases of a step, in their order. Waiting is for the batch; the optimizer's phase begins with
# the gradient norm; the rest of the step is logging, validation and saving.
WAIT, COMPUTE, UPDATE, OTHER = "wait", "forward_backward", "optimizer", "other"


class Progress(Protocol):
    """Shows a row of metrics to whoever watches."""

    def update(self, row: dict[str, Any]) -> None:
        """Show one row."""


class Clock:
    """A clock that nobody reads: what ordinary training carries."""

    def mark(self, phase: str) -> None:
        """Hear that ``phase`` begins."""

    def waiting(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """Return the batches of the steps to train."""
        return batches


class TimeIsUp(Exception):  # noqa: N818  the end of a measurement, not an error of the user's
    """All steps that were to be measured are done."""


class Stopwatch(Clock):
    """Measures every phase of so many steps, then ends the training with :class:`TimeIsUp`.

    On a GPU a mark is an event in its queue: the host never waits for it, and a phase lasts until
    the GPU reaches the next mark. Waiting for data is then the time that the GPU stood still.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        device: torch.device,
        warm_up: int = 0,
        when_warm: Callable[[], None] = reset_peak_memory,
    ):
        """Measure ``num_steps``, and call ``when_warm`` after the first ``warm_up`` of them."""
        self.num_steps = num_steps
        self.warm_up = warm_up
        self.when_warm = when_warm
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Note that ``phase`` begins."""
        moment: Any = time.perf_counter()
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((phase, moment))

    def waiting(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """Yield a batch a step.

        Errors:
            TimeIsUp: after the last step.
        """
        with contextlib.closing(batches):
            for number in range(self.num_steps):
                if number == self.warm_up:
                    self.when_warm()
                self.mark(WAIT)
                batch = next(batches)
                self.mark(COMPUTE)
                yield batch
        self.mark(WAIT)
        raise TimeIsUp

    def seconds(self) -> list[dict[str, float]]:
        """Return, for every step, the seconds of each of its phases.

        A step begins with :data:`WAIT`; what follows the last such mark is not counted.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        steps: list[dict[str, float]] = []
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase == WAIT:
                steps.append({})
            spent_s = begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
            steps[-1][phase] = steps[-1].get(phase, 0.0) + spent_s
        return steps


def totals(steps: Iterable[dict[str, float]]) -> list[float]:
    """Return the seconds of each step as a whole."""
    return [sum(step.values()) for step in steps]
