"""What nvidia-smi says of the GPU: asked of a program of that name that each test writes."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sevenfold.base import gpu_clock

AT_WORK = "1410, 1980, 0x0000000000000004"
TOO_HOT = "345, 1980, 0x0000000000000068"
IDLE = "1980, 1980, 0x0000000000000001"
Say = Callable[..., Path]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let nvidia-smi do something in a shell, or be missing."""

    def write(commands: str | None) -> Path:
        if commands is not None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
        return tmp_path

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"uuid": "1-2-3"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return write


def watch(say: Say, *answers: str) -> gpu_clock.ClockWatch:
    """Look until so many answers have been given; then there are none, and the watch gives up."""
    folder = say(None)
    (folder / "answers").write_text("\n".join(answers) + "\n")
    say(f"cd {folder}; echo >>asked; sed -n $(wc -l <asked)p answers")
    return watch_to_the_end()


def watch_to_the_end() -> gpu_clock.ClockWatch:
    with gpu_clock.ClockWatch(0.001) as clock:
        clock.join(60)
        assert not clock.is_alive()
    return clock


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("echo 700.00", 700.0), ("echo '[N/A]'", None), ("exit 9", None), (None, None)],
)
def test_the_power_limit_is_asked_for(answer: str | None, expected: float | None, say: Say) -> None:
    say(answer)
    assert gpu_clock.power_limit_w() == expected


def test_a_gpu_at_its_power_limit_is_as_it_should_be(
    say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    clock = watch(say, IDLE, IDLE, IDLE, AT_WORK, AT_WORK)
    assert clock.sm_clock_mhz == 1410  # what it had while it waited is no speed
    assert clock.slowed_by == ["power_cap"]
    assert not caplog.records


def test_a_gpu_that_is_too_hot_is_reported_once_and_when_it_has_cooled(
    say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        clock = watch(say, AT_WORK, TOO_HOT, AT_WORK, TOO_HOT, TOO_HOT, TOO_HOT, TOO_HOT, AT_WORK)
    begun, ended = [record.getMessage() for record in caplog.records]
    assert f"{platform.node()}, GPU-1-2-3 is slowed (hardware_slowdown, temperature, tem" in begun
    assert "345 MHz of 1980; look at its cooling" in begun
    assert ended.endswith("GPU-1-2-3 is no longer slowed: its clock is at 1410 MHz")
    assert clock.slowed_by == ["hardware_slowdown", "temperature", "temperature_alarm"]


def test_two_looks_with_a_pause_between_are_not_in_a_row(
    say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    assert watch(say, AT_WORK, TOO_HOT, IDLE, TOO_HOT, AT_WORK).sm_clock_mhz == (345 + 1410) / 2
    assert not caplog.records


def test_what_is_forgotten_is_not_in_the_answer(say: Say) -> None:
    clock = watch(say, AT_WORK, AT_WORK)
    clock.forget()
    assert (clock.sm_clock_mhz, clock.slowed_by) == (None, [])


def test_a_few_failures_are_not_the_end(say: Say, caplog: pytest.LogCaptureFixture) -> None:
    clock = watch(say, AT_WORK, *[""] * (gpu_clock.MOST_FAILURES - 1), TOO_HOT, TOO_HOT)
    assert clock.sm_clock_mhz == 345
    assert len(caplog.records) == 1


def test_an_older_driver_knows_the_older_name(say: Say, tmp_path: Path) -> None:
    say(
        f"[ -e {tmp_path}/done ] && exit 9\n"
        f'case "$1" in *throttle*) touch {tmp_path}/done; echo "{AT_WORK}";;\n'
        "*) echo not a valid field; exit 2;; esac"
    )
    assert watch_to_the_end().sm_clock_mhz == 1410


@pytest.mark.parametrize("answer", [None, "exit 9", "echo '[N/A], [N/A], [N/A]'", "echo"])
def test_nothing_is_claimed_where_nobody_answers(
    answer: str | None, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    say(answer)
    clock = watch_to_the_end()
    assert (clock.sm_clock_mhz, clock.slowed_by, caplog.records) == (None, [], [])


def test_nobody_waits_for_a_driver_that_does_not_answer(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_clock, "LEAVE_S", 0.05)
    say(f"touch {tmp_path}/asked; exec sleep 3")
    with gpu_clock.ClockWatch(0.0) as clock:
        while not (tmp_path / "asked").exists():
            time.sleep(0.01)
        left_at_s = time.monotonic()
    assert time.monotonic() - left_at_s < 2
    clock.join(60)


def test_without_a_gpu_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with gpu_clock.ClockWatch(0.0) as clock:
        assert not clock.is_alive()
    assert gpu_clock.power_limit_w() is None
