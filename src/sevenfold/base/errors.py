"""The users' errors, each with its exit code.

    SevenfoldError             1
    ├── UsageError             2   asked wrongly: flags, configuration, missing step
    ├── GateRefusedError       3   a gate refused, or the evidence is insufficient
    ├── BadDataError           4   an input file holds something it must not hold
    ├── CheckpointError        5   a checkpoint is corrupt or does not match
    ├── DivergedError          6   training left the numbers it can come back from
    ├── MemoryExhaustedError   7   out of memory at micro-batch 1
    ├── RunInUseError          8   another process works in this run directory
    └── StoppedError          75   stopped by a signal, after saving

The message is one line: what was found, where, what was expected, what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What stands between :// and @ of an address: a user's name, and often a password or token. As a
# path, an address has lost one of the slashes.
_USER_INFO = re.compile(r"(\b[a-zA-Z][\w+.-]+:/{1,2})[^/\s@\"']+@")


def install_command(extra: str) -> str:
    """Return the command, in the project's folder, that adds what an extra brings."""
    return f"pip install -e '.[{extra}]'"


class SevenfoldError(Exception):
    """A mistake or a situation that the user can do something about."""

    exit_code = 1


class UsageError(SevenfoldError):
    """The command, its flags or its configuration ask for something impossible."""

    exit_code = 2


class GateRefusedError(SevenfoldError):
    """A gate said no, or there is not enough evidence to say yes."""

    exit_code = 3


class BadDataError(SevenfoldError):
    """An input holds something it must not hold."""

    exit_code = 4


class CheckpointError(SevenfoldError):
    """A checkpoint is corrupt, or belongs to something else."""

    exit_code = 5


class DivergedError(SevenfoldError):
    """Training produced numbers from which it cannot go on."""

    exit_code = 6


class MemoryExhaustedError(SevenfoldError):
    """One sequence alone does not fit into the device's memory."""

    exit_code = 7


class RunInUseError(SevenfoldError):
    """Another process holds the lock of this run directory."""

    exit_code = 8


class StoppedError(SevenfoldError):
    """A signal asked to stop; everything needed to go on has been saved."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?``, or the known names where none is near."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if matches:
        return "; did you mean " + " or ".join(f"'{match}'" for match in matches) + "?"
    return "; known: " + ", ".join(names)


def without_secrets(text: str) -> str:
    """Return ``text`` without users and passwords in the addresses in it."""
    return _USER_INFO.sub(r"\1***@", text)
