"""A step in a process of its own, which a fault may end: no import has to be done again."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

import pytest

from sevenfold.base import faults


def was_killed(step: Callable[[], object], *, at: int) -> bool:
    """Do ``step`` in a fork of this process, to be killed at that storage operation.

    Returns False where it ended before; fails the test if it ended in any other way.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ[faults.VARIABLE] = f"kill@fs:{at}"
            faults._operations_done = 0
            step()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        pytest.fail(f"the step ended with {status}")
    return status != 0


def kill_everywhere(prepare: Callable[[], object], step: Callable[[], object]) -> int:
    """Kill ``step`` at each of its storage operations in turn, after ``prepare``; then do it again.

    Returns how often it was killed.
    """
    operation = 0
    while True:
        prepare()
        if not was_killed(step, at=operation + 1):
            return operation
        operation += 1
        step()
