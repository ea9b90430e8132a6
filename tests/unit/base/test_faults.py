"""Faults come when asked for, as often as asked for, and otherwise never."""

from __future__ import annotations

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


@pytest.mark.parametrize("text", ["kill", "oom@5", "nan@step=x", "kill@fs:1;;oops@step=1"])
def test_a_misspelt_fault_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no fault; write kill@fs:17"):
        faults.read_faults(text)
