"""What a flag's word may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from sevenfold.base.errors import nearest


def one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    """Return what reads one of ``names``, and tells the nearest where it is none."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"'{text}' does not exist{nearest(text, names)}")
        return text

    return read


def above_zero(text: str) -> int:
    """Read a whole number from 1 on."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def gpus(text: str) -> tuple[str | None, int]:
    """Read ``N`` or ``KIND:N``, as Slurm and SkyPilot write it."""
    kind, _, number = text.rpartition(":")
    return kind or None, above_zero(number)


def size(text: str) -> float:
    """Read a number above 0."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return size
