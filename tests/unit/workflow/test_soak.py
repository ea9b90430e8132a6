"""The self-test's kills of real commands, without the commands: they take minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import SevenfoldError
from sevenfold.base.faults import read_faults
from sevenfold.base.records import GATED_STAGES
from sevenfold.workflow import soak


def test_ten_kills_a_stage_each_reached_after_the_one_before() -> None:
    for stage in GATED_STAGES:
        moments = soak._moments(stage)
        found = [read_faults(moment)[0] for moment in moments]
        assert [fault.kind for fault in found] == ["kill"] * 10
        steps = [fault.number for fault in found if fault.place == "step"]
        assert steps == sorted(set(steps))
        assert 1 < steps[0] < steps[-1] < soak.NUM_STEPS
        assert soak._moments(stage) == moments
    assert len({tuple(soak._moments(stage)) for stage in GATED_STAGES}) == 4


def finished(stage: Path, *, weights: str = "w", loss: float = 1.5, model: str = "m") -> Path:
    """Write what a finished stage holds, as far as it is compared."""
    with storage.new_folder(stage / "model", kind="model") as folder:
        (folder / "model.safetensors").write_text(model)
    with storage.new_folder(stage / "checkpoints" / "step-00000060", kind="checkpoint") as folder:
        (folder / "model.safetensors").write_text(weights)
    lines = storage.JsonLines(stage / "metrics.jsonl")
    lines.append({"step": 0, "event": "resume"})
    lines.append({"step": 60, "loss": loss, "grad_norm": 1.0, "lr": 0.1})
    return stage


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"model": "n"}, "the model is not as in the unbroken stage"),
        ({"loss": 1.5000000000000002}, "a logged loss is not as"),
        ({"weights": "v"}, "the last checkpoint's model.safetensors is not as"),
    ],
)
def test_two_finished_stages_are_compared_byte_by_byte(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    whole, copy = finished(tmp_path / "a"), finished(tmp_path / "b", **change)
    found = soak._difference(whole, copy)
    assert found.startswith(why)
    assert bool(found) == bool(why)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Put exit codes in place of commands that are to be killed, and of the last one."""
    codes = {"killed": -9, "last": 0}

    def run(run: Path, *arguments: str, fault: str = "") -> tuple[int, str]:
        storage.JsonLines(run / "sft" / "metrics.jsonl").append({"step": 12, "event": "resume"})
        return codes["killed"], "error: no more road"

    def finish(run: Path, stage: str, metrics: storage.JsonLines) -> tuple[int, float | None]:
        return codes["last"], 2.5

    monkeypatch.setattr(soak, "_run", run)
    monkeypatch.setattr(soak, "_finish", finish)
    return codes


def test_every_kill_is_a_run_with_what_it_cost(tmp_path: Path, commands: dict[str, int]) -> None:
    finished(tmp_path / "a" / "sft")
    finished(tmp_path / "b" / "sft")
    results = list(soak._break(tmp_path / "a", tmp_path / "b", "sft"))
    assert [(r.recovered, r.identical, r.num_steps_lost) for r in results] == [
        (True, True, 48)
    ] * 10
    assert results[0].recovery_s == 2.5


@pytest.mark.parametrize(
    ("which", "code", "why"),
    [
        ("killed", 0, "exit code 0 instead of a kill"),
        ("last", 5, "the last start ended with exit code 5"),
    ],
)
def test_what_did_not_go_as_planned_is_no_recovery(
    tmp_path: Path, commands: dict[str, int], which: str, code: int, why: str
) -> None:
    commands[which] = code
    finished(tmp_path / "a" / "sft")
    finished(tmp_path / "b" / "sft")
    for result in soak._break(tmp_path / "a", tmp_path / "b", "sft"):
        assert not result.recovered
        assert why in result.why


def test_what_is_left_behind_is_no_recovery(tmp_path: Path, commands: dict[str, int]) -> None:
    finished(tmp_path / "a" / "sft")
    (finished(tmp_path / "b" / "sft") / ".metrics.jsonl.partial-7").write_text("")
    results = list(soak._break(tmp_path / "a", tmp_path / "b", "sft"))
    assert results[0].why == "left behind: .metrics.jsonl.partial-7"


def test_a_small_run_that_fails_by_itself_is_said(tmp_path: Path, commands: dict[str, int]) -> None:
    commands["killed"] = 4
    message = (
        r"'download' of a small run ended with exit code 4 .*; mend this first: error: no more"
    )
    with pytest.raises(SevenfoldError, match=message):
        list(soak.break_stages(tmp_path))


# --- the preparation


@pytest.fixture
def preparing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put writing one folder in place of the commands; return what they did."""
    done: dict[str, Any] = {"calls": [], "code": 0, "text": "same"}

    def run(run: Path, *arguments: str, fault: str = "") -> tuple[int, str]:
        done["calls"].append((arguments[0], bool(fault)))
        if fault:
            return -9, ""
        text = done["text"] if run.name == "copy" else "same"
        with storage.new_folder(run / "data" / arguments[0], kind="thing") as folder:
            (folder / "a").write_text(text)
        return done["code"], "error: no more road"

    monkeypatch.setattr(soak, "_run", run)
    return done


def break_preparation(folder: Path) -> list[Any]:
    for verb in soak.PREPARATION:
        soak._run(folder / "whole", verb)
    return list(soak._break_preparation(folder / "whole", folder / "copy", soak._settings()))


def test_every_command_of_the_preparation_is_killed_then_finished(
    tmp_path: Path, preparing: dict[str, Any]
) -> None:
    results = break_preparation(tmp_path)
    assert [(result.recovered, result.identical) for result in results] == [(True, True)] * 10
    broken = preparing["calls"][len(soak.PREPARATION) :]
    for verb in soak.PREPARATION:
        kills = [killed for name, killed in broken if name == verb]
        assert kills in ([True, True, False], [True, False])


@pytest.mark.parametrize(
    ("change", "recovered", "why"),
    [
        ({"text": "other"}, True, "data/clean is not as in the unbroken run"),
        ({"code": 4}, False, "download ended with exit code 4: error: no more road"),
    ],
)
def test_a_preparation_that_ends_otherwise_is_said(
    tmp_path: Path, preparing: dict[str, Any], change: dict[str, Any], recovered: bool, why: str
) -> None:
    preparing |= change
    for result in break_preparation(tmp_path):
        assert (result.recovered, result.identical, result.why) == (recovered, False, why)
