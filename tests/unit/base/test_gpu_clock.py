"""What nvidia-smi says of the GPU: asked of a program of that name that each test writes."""

from __future__ import annotations

import logging
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


def say_in_turn(say: Say, *answers: str) -> None:
    """One answer after the other; the last one again and again."""
    folder = say(None)
    (folder / "answers").write_text("\n".join(answers) + "\n")
    say(
        f"cd {folder}; echo >>asked; line=$(sed -n $(wc -l <asked)p answers)\n"
        'echo "${line:-$(tail -n 1 answers)}"'
    )


def watch(folder: Path, count: int) -> gpu_clock.ClockWatch:
    """Look until nvidia-smi has been asked so often."""
    with gpu_clock.ClockWatch(0.01) as clock:
        give_up_s = time.monotonic() + 30
        while clock.is_alive() and time.monotonic() < give_up_s:
            if (folder / "asked").is_file() and len((folder / "asked").read_text()) > count:
                break
            time.sleep(0.01)
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
    say: Say, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say_in_turn(say, IDLE, IDLE, IDLE, AT_WORK)
    clock = watch(tmp_path, 6)
    assert clock.sm_clock_mhz == 1410  # what it had while it waited is no speed
    assert clock.slowed_by == ["power_cap"]
    assert not caplog.records


def test_a_gpu_that_is_too_hot_is_reported_once_and_when_it_has_cooled(
    say: Say, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say_in_turn(say, AT_WORK, TOO_HOT, AT_WORK, TOO_HOT, TOO_HOT, TOO_HOT, TOO_HOT, AT_WORK)
    with caplog.at_level(logging.WARNING):
        clock = watch(tmp_path, 8)
    begun, ended = [record.getMessage() for record in caplog.records]
    assert "slowed (hardware_slowdown, temperature, temperature_alarm)" in begun
    assert "345 MHz of 1980; look at its cooling" in begun
    assert ended == "the GPU is no longer slowed: its clock is at 1410 MHz"
    assert clock.slowed_by == ["hardware_slowdown", "temperature", "temperature_alarm"]


def test_an_older_driver_knows_the_older_name(say: Say, tmp_path: Path) -> None:
    say(
        f"echo >>{tmp_path}/asked\n"
        f'case "$1" in *throttle*) echo "{AT_WORK}";; *) echo not a valid field; exit 2;; esac'
    )
    assert watch(tmp_path, 4).sm_clock_mhz == 1410


@pytest.mark.parametrize("answer", [None, "exit 9", "echo '[N/A], [N/A], [N/A]'", "echo"])
def test_nothing_is_claimed_where_nobody_answers(
    answer: str | None, say: Say, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say(answer)
    clock = watch(tmp_path, 1)
    assert (clock.sm_clock_mhz, clock.slowed_by, caplog.records) == (None, [], [])


def test_without_a_gpu_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with gpu_clock.ClockWatch(0.0) as clock:
        assert not clock.is_alive()
    assert gpu_clock.power_limit_w() is None
