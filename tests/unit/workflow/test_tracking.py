"""Tracking with wandb and TensorBoard: what they keep, and that they stop nothing."""

from __future__ import annotations

import logging
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import UsageError
from sevenfold.workflow import tracking

CANARY = "CANARY7d1f"
ROW = {"step": 1, "loss": 2.5}


def job(folder: Path, wanted: str = "wandb") -> Any:
    """The parts of a job that tracking reads."""
    return types.SimpleNamespace(
        recipe=types.SimpleNamespace(tracking=wanted),
        processes=types.SimpleNamespace(is_main=True),
        run=types.SimpleNamespace(folder=folder, preset="demo"),
        stage="sft",
        settings={"seed": 1},
    )


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "sevenfold")
    return caplog


def has_loss(folder: Path) -> bool:
    return any(b"loss" in path.read_bytes() for path in folder.rglob("*.wandb"))


def failing(run_method: str) -> Any:
    """A stand-in for wandb's run of which one method fails, as with a service that died."""
    from wandb.errors import CommError

    def fail(*anything: Any, **named: Any) -> None:
        raise CommError("the service\nis gone")

    methods = {"log": lambda *_, **__: None, "finish": lambda: None, run_method: fail}
    return types.SimpleNamespace(**methods)


@pytest.mark.fault("L06")
def test_what_is_tracked_holds_metrics_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SOME_SECRET"):
        monkeypatch.setenv(name, f"{CANARY}-{name}".ljust(40, "0"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{CANARY}@127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["sevenfold", "--source", f"https://u:{CANARY}@host/x"])
    with tracking.tracked(job(tmp_path)) as tracker:
        tracker.log(ROW)
    # wandb's own service writes the file, in its own time.
    end_s = time.monotonic() + 30
    while not (found := has_loss(tmp_path)) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert found
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path for path, content in kept.items() if CANARY.encode() in content] == []


@pytest.mark.fault("K11")
def test_a_backend_that_is_down_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "START_TIMEOUT_S", 1.0)
    with tracking.tracked(job(tmp_path)) as tracker:
        tracker.log(ROW)
    assert warnings.text.count("training goes on without it") == 1


@pytest.mark.fault("K11")
@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_backend_that_fails_later_costs_one_warning(
    warnings: pytest.LogCaptureFixture, method: str
) -> None:
    tracker = tracking.Tracker(failing(method))
    for _ in range(3):
        tracker.log(ROW)
    tracker.end()
    assert warnings.text.count("wandb: the service is gone; training goes on without it") == 1


@pytest.mark.fault("K11")
def test_a_backend_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "END_TIMEOUT_S", 0.05)
    started_s = time.monotonic()
    tracking.Tracker(types.SimpleNamespace(finish=lambda: time.sleep(5))).end()
    assert time.monotonic() - started_s < 4
    assert warnings.text.count("it has not finished within 0 s; training goes on") == 1


def test_a_run_that_is_not_tracked_writes_nothing(tmp_path: Path) -> None:
    with tracking.tracked(job(tmp_path, "none")) as tracker:
        tracker.log(ROW)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_tracks_nowhere_needs_no_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU image without it trains as well."""
    for name in ("wandb", "wandb.errors"):
        monkeypatch.setitem(sys.modules, name, None)
    with tracking.tracked(job(tmp_path, "none")) as tracker:
        tracker.log(ROW)


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself reads back of a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard" / "sft"))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def test_tensorboard_reads_back_what_metrics_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with tracking.tracked(job(tmp_path, "tensorboard")) as tracker:
        for step in (1, 2, 3):
            loss = None if step == 2 else 4.0 / step
            row = {"step": step, "loss": loss, "tok_s": 1000, "note": "x", "is_last": step == 3}
            tracker.log(row)
    assert points(tmp_path, "loss") == [(1, 4.0), (3, pytest.approx(4 / 3))]
    assert points(tmp_path, "tok_s") == [(1, 1000), (2, 1000), (3, 1000)]
    with pytest.raises(KeyError):
        points(tmp_path, "is_last")


def test_steps_that_a_resumed_stage_does_again_are_shown_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, loss in ((1, 9.0), (3, 1.0)):
        with tracking.tracked(job(tmp_path, "tensorboard")) as tracker:
            for step in range(first, 5):
                tracker.log({"step": step, "loss": loss})
    assert points(tmp_path, "loss") == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)]


@pytest.mark.fault("K11")
def test_tensorboard_on_a_full_disk_costs_one_warning(
    warnings: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file stands where the folder should be")
    with tracking.tracked(job(tmp_path, "tensorboard")) as tracker:
        for step in (1, 2):
            tracker.log({"step": step, "loss": 1.0})
    assert warnings.text.count("tensorboard: ") == 1
    assert "training goes on without it" in warnings.text


@pytest.mark.fault("K12")
def test_without_tensorboard_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    asked = pytest.raises(UsageError, match=r"pip install -e '\.\[tensorboard\]', or set track")
    with asked, tracking.tracked(job(tmp_path, "tensorboard")):
        pass
