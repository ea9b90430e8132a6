"""Faults on request, for tests and for people who want to see a recovery: inert otherwise.

``SEVENFOLD_FAULTS`` holds faults separated by ``;``. At file operations, counted from 1:

    kill@fs:17                     end the process before its 17th file operation; where that is
                                   the second half of a file's bytes, half a file is left
    full@fs:17:times=3             let the disk be full at operations 17 to 19, except for removals
    eio@fs:17                      let this operation fail with an input/output error

At a step of training, counted from 1, in phase forward unless another is named:

    kill@step=5:phase=load         end the process there; phases: load, forward, backward, clip,
                                   optimizer, log, evaluate, save
    term@step=5                    send it SIGTERM there; phases as above
    oom@step=5:times=2             run out of memory there, at most twice; phases: forward,
                                   backward, optimizer, evaluate, save
    nan@step=7                     make the loss NaN
    spike@step=7                   make the loss ten times as large

``times`` goes with all but kills (default: once); ``rank=1`` with faults at a step, to let them
come in this one of several processes only.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable

from sevenfold.base.errors import UsageError

VARIABLE = "SEVENFOLD_FAULTS"
PHASES = ("load", "forward", "backward", "clip", "optimizer", "log", "evaluate", "save")
# What may go wrong where, and what may be said about it; a step's fault names one of the phases.
_FORMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("kill", "fs"): (),
    ("full", "fs"): ("times",),
    ("eio", "fs"): ("times",),
    ("kill", "step"): ("phase", "rank"),
    ("term", "step"): ("phase", "times", "rank"),
    ("oom", "step"): ("phase", "times", "rank"),
    ("nan", "step"): ("times", "rank"),
    ("spike", "step"): ("times", "rank"),
}
_OOM_PHASES = ("forward", "backward", "optimizer", "evaluate", "save")
_SHAPE = re.compile(r"([a-z]+)@(?:(fs):|(step)=)([1-9]\d*)((?::[a-z]+=[a-z0-9]+)*)")
_ERRORS = {"full": errno.ENOSPC, "eio": errno.EIO}
_operations_done = 0
_counting = threading.Lock()
_times_done: Counter[Fault] = Counter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, at file operation or training step ``number``; ``rank`` None: in any process."""

    kind: str
    place: str
    number: int
    phase: str = "forward"
    times: int = 1
    rank: int | None = None


@functools.lru_cache(maxsize=4)
def read_faults(text: str) -> tuple[Fault, ...]:
    """Read the value of ``SEVENFOLD_FAULTS``.

    Errors:
        UsageError: a fault that is not written as the module says.
    """
    return tuple(_read_fault(part) for part in text.split(";") if part)


def _read_fault(text: str) -> Fault:
    match = _SHAPE.fullmatch(text)
    if match is not None:
        kind, place = match[1], match[2] or match[3]
        pairs = [pair.split("=") for pair in match[5].split(":")[1:]]
        said = dict(pairs)
        known = set(said) <= set(_FORMS.get((kind, place), ())) and (kind, place) in _FORMS
        numbers = all(said.get(name, "1").isdecimal() for name in ("times", "rank"))
        phase = said.get("phase", "forward") in (_OOM_PHASES if kind == "oom" else PHASES)
        if known and numbers and phase and len(said) == len(pairs) and said.get("times") != "0":
            return Fault(
                kind=kind,
                place=place,
                number=int(match[4]),
                phase=said.get("phase", "forward"),
                times=int(said.get("times", 1)),
                rank=int(said["rank"]) if "rank" in said else None,
            )
    raise UsageError(
        f"{VARIABLE}: '{text}' is no fault; write kill@fs:17, full@fs:17:times=3, eio@fs:17, "
        "kill@step=5:phase=save, term@step=5:phase=optimizer:rank=1, oom@step=5:times=2, "
        "nan@step=7 or spike@step=7 (base/faults.py lists all)"
    )


def operations_done() -> int:
    """Number of file operations that this process has come to."""
    return _operations_done


def start_counting() -> None:
    """Count operations, and what faults have done, from here: for a child that was forked."""
    global _operations_done
    _operations_done = 0
    _times_done.clear()


def at_storage_operation(
    path: object = None, *, frees_room: bool = False, halve: Callable[[], None] | None = None
) -> None:
    """Count the file operation on ``path`` that comes next; end the process if that is asked for.

    ``frees_room``: a full disk does not stop it. ``halve`` is called before a kill, to leave of a
    file that a library wrote what a kill in the middle would have left.

    Errors:
        OSError: the disk is to be full or broken here.
    """
    global _operations_done
    with _counting:
        _operations_done += 1
        number = _operations_done
    for fault in read_faults(os.environ.get(VARIABLE, "")):
        if fault.place != "fs" or not fault.number <= number < fault.number + fault.times:
            continue
        if fault.kind == "kill":
            if halve is not None:
                halve()
            os.kill(os.getpid(), signal.SIGKILL)
        elif not (frees_room and fault.kind == "full"):
            code = _ERRORS[fault.kind]
            raise OSError(code, os.strerror(code), None if path is None else str(path))


def at_step(step: int, phase: str) -> set[str]:
    """Act on the faults of this phase of ``step``, counted from 1; return what is left to raise.

    Signals are sent here; ``oom``, ``nan`` and ``spike`` are returned, for the training loop to
    make true.
    """
    asked = set()
    for fault in read_faults(os.environ.get(VARIABLE, "")):
        here = (fault.place, fault.number, fault.phase) == ("step", step, phase)
        if not here or fault.rank not in (None, int(os.environ.get("RANK", "0"))):
            continue
        if _times_done[fault] < fault.times:
            _times_done[fault] += 1
            if fault.kind in ("kill", "term"):
                number = signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM
                os.kill(os.getpid(), number)
            else:
                asked.add(fault.kind)
    return asked
