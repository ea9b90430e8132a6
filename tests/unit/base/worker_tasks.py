"""What workers do in the tests: functions that a spawned process can import quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def square(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))  # so that they do not end in the order in which they began
    return os.getpid(), number * number


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return number


def wait_in(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def refuse(number: int) -> int:
    from sevenfold.base.errors import BadDataError

    raise BadDataError(f"number {number} is bad; give another")
