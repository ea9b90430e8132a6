"""Faults on request, for tests and for people who want to see a recovery: inert otherwise.

``SEVENFOLD_FAULTS`` holds faults separated by ``;``:

    kill@fs:17                    end the process at its 17th storage operation
    kill@step=5                   end it in step 5 of training, in the forward pass
    term@step=5:phase=optimizer   send it SIGTERM there; phases: forward, backward, optimizer
    oom@step=5:times=2            run out of memory, at most twice (default: once)
    nan@step=7                    make the loss NaN
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
from collections import Counter

from sevenfold.base.errors import UsageError

VARIABLE = "SEVENFOLD_FAULTS"
_SHAPE = re.compile(
    r"(?P<kind>kill)@fs:(?P<operation>\d+)"
    r"|(?P<step_kind>kill|term|oom|nan)@step=(?P<step>\d+)"
    r"(?::phase=(?P<phase>forward|backward|optimizer))?(?::times=(?P<times>\d+))?"
)
_operations_done = 0
_times_done: Counter[Fault] = Counter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, at a storage operation or in a phase of a training step."""

    kind: str
    operation: int | None = None
    step: int | None = None
    phase: str = "forward"
    times: int = 1


@functools.lru_cache(maxsize=4)
def read_faults(text: str) -> tuple[Fault, ...]:
    """Read the value of ``SEVENFOLD_FAULTS``.

    Errors:
        UsageError: a fault that is not written as the module says.
    """
    faults = []
    for part in filter(None, text.split(";")):
        match = _SHAPE.fullmatch(part)
        if match is None:
            raise UsageError(
                f"{VARIABLE}: '{part}' is no fault; write kill@fs:17, kill@step=5, "
                "term@step=5:phase=optimizer, oom@step=5:times=2 or nan@step=7"
            )
        if match["operation"]:
            faults.append(Fault(kind="kill", operation=int(match["operation"])))
        else:
            faults.append(
                Fault(
                    kind=match["step_kind"],
                    step=int(match["step"]),
                    phase=match["phase"] or "forward",
                    times=int(match["times"] or 1),
                )
            )
    return tuple(faults)


def at_storage_operation() -> None:
    """Count one storage operation; end the process here if that is asked for."""
    global _operations_done
    _operations_done += 1
    for fault in read_faults(os.environ.get(VARIABLE, "")):
        if fault.operation == _operations_done:
            os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, phase: str) -> set[str]:
    """Act on the faults of this phase of ``step``, counted from 1; return what is left to raise.

    Signals are sent here; ``oom`` and ``nan`` are returned, for the training loop to make true.
    """
    asked = set()
    for fault in read_faults(os.environ.get(VARIABLE, "")):
        if fault.step == step and fault.phase == phase and _times_done[fault] < fault.times:
            _times_done[fault] += 1
            if fault.kind in ("kill", "term"):
                number = signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM
                os.kill(os.getpid(), number)
            else:
                asked.add(fault.kind)
    return asked
