"""Plain output where nobody watches, and no death by a reader that went away."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.text import Text

from sevenfold.base import console
from sevenfold.base.errors import without_secrets

ROW = {"step": 5, "tokens": 500, "loss": 2.5, "lr": 1e-3, "tok_s": 1234.5, "mfu": 0.413}


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("sevenfold")
    before = (list(root.handlers), root.level, package.level)
    yield
    root.handlers[:], root.level = before[0], before[1]
    package.setLevel(before[2])


def test_lines_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_line("plain [bold]as it is[/bold]")
    console.print_table("things", ["name", "value"], [["a", 1.23456], ["b [red]", None]])
    printed = capsys.readouterr().out
    assert printed.startswith("plain [bold]as it is[/bold]\nthings\n")
    assert "1.235" in printed
    assert "│ b [red] │ -" in printed


def test_an_error_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error("first\n  second")
    assert capsys.readouterr() == ("", "error: first second\n")


@pytest.mark.fault("L06")
def test_what_counts_as_a_password() -> None:
    for text in ("https:/u:hunter2@host/x", "s3://hunter2@b", "'git+ssh://a:hunter2@h'"):
        assert "hunter2" not in without_secrets(text)
        assert "***@" in without_secrets(text)
    for text in ("https://host/a@b", "C:/data@2", "a.py:3:/home", "me@host", "meta-llama/x@main"):
        assert without_secrets(text) == text


@pytest.mark.fault("L06")
@pytest.mark.usefixtures("restored_logging")
def test_no_password_of_an_address_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "no answer from https://me:hunter2@host:80/x or http://token@proxy"
    console.setup_logging(debug=False)
    logging.getLogger("elsewhere").warning("%s", secret)
    console.print_error(secret)
    try:
        raise OSError(secret)
    except OSError:
        console.print_traceback()
    printed = capsys.readouterr().err
    assert printed.count("https://***@host:80/x or http://***@proxy") == 3
    assert "hunter2" not in printed
    assert "token" not in printed


def test_a_step_is_described_from_what_its_row_has() -> None:
    assert console.describe_step(ROW) == "loss 2.5000  lr 1.00e-03  1,234 tok/s  MFU 41.3%"
    assert console.describe_step({"step": 1, "loss": None}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1:00"), (185, "3:05"), (7650, "2:07:30"), (-1, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_progress_without_a_terminal_is_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.TrainingProgress("sft", num_steps=100) as progress:
        for step in range(1, 101):
            progress.update({**ROW, "step": step})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("sft 5/100  loss 2.5000")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("sft 100/100")


def test_progress_shows_the_last_held_out_loss_and_the_last_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.TrainingProgress("sft", num_steps=3, start_step=1) as progress:
        progress.update({"step": 2, "validation_loss": 3.25})
        progress.update({**ROW, "step": 3})
    assert "held-out 3.2500" in capsys.readouterr().out


def test_progress_of_other_processes_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.TrainingProgress("sft", num_steps=3, enabled=False) as progress:
        progress.update(ROW)
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stages = Text("✓ sft ▸ dpo · lora")
    with console.TrainingProgress(
        "dpo", num_steps=10, start_step=2, stages=stages, later_steps=30
    ) as progress:
        progress.update({**ROW, "step": 4, "loss": 3.0})
        progress.update(ROW)
        progress._started_at_s -= 30  # three steps of ten seconds
        progress.update({**ROW, "step": 5})
        console.print_line("said meanwhile")
    shown = terminal.getvalue()
    assert "━" in shown
    assert "✓ sft ▸ dpo · lora" in shown
    assert "█▁▁" in shown  # the loss
    assert "5/10" in shown
    assert "50 s left, 5:50 of all training" in shown
    assert "said meanwhile\n" in shown


def test_working_says_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with console.working("measuring"):
        pass
    assert capsys.readouterr().out == "measuring ...\n"


@pytest.mark.usefixtures("restored_logging")
def test_the_log_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        console.setup_logging(debug=False)
    logging.getLogger("sevenfold.train").info("resuming")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("careful")
    assert capsys.readouterr() == ("", "resuming\nwarning: careful\n")
    console.setup_logging(debug=True)
    logging.getLogger("sevenfold.train").debug("detail")
    assert "sevenfold.train: detail" in capsys.readouterr().err


TALK = """
from sevenfold.base import console
from sevenfold.base.errors import without_secrets
for number in range(2000):
    console.print_line(f"line {number}".ljust(100))
console.print_raw("the end")
console.detach_output()
import sys
sys.stderr.write("reached the end\\n")
"""


@pytest.mark.fault("K11")
def test_a_reader_that_goes_away_stops_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TALK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == f"{'line 0':100}\n"
        process.stdout.close()
        assert process.stderr.read() == "reached the end\n"
    assert process.returncode == 0


@pytest.mark.fault("K11")
def test_a_closed_standard_output_stops_nothing() -> None:
    command = [sys.executable, "-c", TALK]
    answer = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=lambda: os.close(1)
    )
    assert (answer.returncode, answer.stderr) == (0, "reached the end\n")


@pytest.mark.fault("K11")
def test_a_full_disk_under_the_log_stops_nothing() -> None:
    """Both streams go to a device that refuses every byte; the program does its work."""
    done = "import sys; sys.exit(42 if console.detach_output() is None else 1)"
    code = TALK.replace('sys.stderr.write("reached the end\\n")', done)
    assert code != TALK
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, check=False)
    assert answer.returncode == 42
