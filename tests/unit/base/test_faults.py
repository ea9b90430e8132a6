"""Faults come when asked for, as often as asked for, and otherwise never."""

from __future__ import annotations

import errno
import re
import signal

import pytest

from sevenfold.base import faults
from sevenfold.base.errors import UsageError


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.at_step(1, "forward") == set()
    faults.at_storage_operation()


def test_a_fault_comes_at_its_step_and_phase_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "oom@step=5:phase=backward:times=2;nan@step=7")
    monkeypatch.setattr(faults, "_times_done", faults.Counter())
    assert faults.at_step(5, "forward") == set()
    assert [faults.at_step(5, "backward") for _ in range(3)] == [{"oom"}, {"oom"}, set()]
    assert faults.at_step(7, "forward") == {"nan"}


def test_signals_are_sent_to_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    monkeypatch.setenv(faults.VARIABLE, "term@step=3:phase=optimizer")
    monkeypatch.setattr(faults, "_times_done", faults.Counter())
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        faults.at_step(3, "optimizer")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]


def test_a_disk_is_full_or_broken_for_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "full@fs:2:times=2;eio@fs:5")
    monkeypatch.setattr(faults, "_operations_done", 0)
    failed = []
    for frees_room in (False, False, True, False, True):
        try:
            faults.at_storage_operation("a.txt", frees_room=frees_room)
            failed.append(0)
        except OSError as error:
            assert error.filename == "a.txt"  # noqa: PT017
            failed.append(error.errno or -1)
    assert failed == [0, errno.ENOSPC, 0, 0, errno.EIO]
    assert faults.operations_done() == 5
    faults.start_counting()
    assert faults.operations_done() == 0


def test_a_fault_may_be_meant_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "spike@step=3:rank=1;nan@step=3:rank=0")
    for rank, expected in (("1", {"spike"}), ("0", {"nan"}), ("2", set())):
        monkeypatch.setattr(faults, "_times_done", faults.Counter())
        monkeypatch.setenv("RANK", rank)
        assert faults.at_step(3, "forward") == expected


def test_everything_that_the_module_lists_can_be_asked_for() -> None:
    assert faults.__doc__ is not None
    listed = re.findall(r"^    (\S+@\S+) ", faults.__doc__, re.MULTILINE)
    assert len(listed) == 8
    for text in listed:
        assert faults.read_faults(text)[0].kind == text.partition("@")[0]
    for phase in faults.PHASES:
        assert f" {phase}" in faults.__doc__
        assert faults.read_faults(f"kill@step=1:rank=2:phase={phase}")[0].rank == 2


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "oom@5",
        "nan@step=x",
        "kill@fs:1;;oops@step=1",
        "kill@fs:0",
        "kill@fs=3",
        "kill@fs:1:times=2",
        "oom@fs:3",
        "oom@step=3:phase=clip",
        "nan@step=3:phase=save",
        "term@step=3:phase=lunch",
        "oom@step=3:times=0",
        "oom@step=3:times=two",
        "oom@step=3:times=2:times=3",
        "oom@step=3:step=4",
        "spike@step=3:rank=one",
    ],
)
def test_a_misspelt_fault_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no fault; write kill@fs:17"):
        faults.read_faults(text)
