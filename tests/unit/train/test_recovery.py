"""Bad steps, lost memory, and what a run that does them again must repeat."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train.test_loop import (
    CONFIG,
    assert_equal,
    bench,
    failing,
    losses,
    tiny_model,
    weights,
)

from sevenfold.base.errors import (
    CheckpointError,
    DivergedError,
    MemoryExhaustedError,
    SevenfoldError,
    UsageError,
)
from sevenfold.model.config import LoRAAdapterConfig
from sevenfold.model.lora import add_adapter
from sevenfold.objective.next_token import NEXT_TOKEN, Objective
from sevenfold.train import loop, parallel, resuming
from sevenfold.train.recovery import Decisions, StepGuard


def events(made: loop.Workbench, kind: str) -> list[dict[str, Any]]:
    return [row for row in made.metrics.read() if row.get("event") == kind]


def scaled(by_row: dict[int, float], made: loop.Workbench) -> None:
    """Multiply the loss of every batch in which one of these rows is."""
    objective = made.objective

    def total(scorer: Any, batch: Any) -> Any:
        summed = objective.total(scorer, batch)
        rows = made.batches.indices(made.step) if scorer.training else []
        factor = math.prod(by_row.get(int(row), 1.0) for row in rows)
        return dataclasses.replace(summed, total=summed.total * factor)

    made.objective = Objective(weigh=objective.weigh, total=total)


def poison_places(made: loop.Workbench, places: set[int], crash_at: int | None = None) -> None:
    """Make the loss NaN for batches at these places of the sequence; crash after a return."""
    objective = made.objective

    def total(scorer: Any, batch: Any) -> Any:
        if made.step == crash_at and made.decisions.detours:
            raise ValueError("crash")
        summed = objective.total(scorer, batch)
        bad = scorer.training and made.decisions.place(made.step) in places
        return dataclasses.replace(summed, total=summed.total * (math.nan if bad else 1.0))

    made.objective = Objective(weigh=objective.weigh, total=total)


# --- the guard


def filled(**changes: Any) -> StepGuard:
    guard = StepGuard(**{"sigma": 6.0, "max_in_a_row": 2, **changes})
    for step in range(100):
        assert guard.judge(2.0 + 0.01 * (step % 5), 1.0 + 0.1 * (step % 3), seq_len=8) is None
    return guard


@pytest.mark.fault("D03")
def test_a_loss_beyond_six_sigma_is_refused_for_as_long_as_it_lasts() -> None:
    guard = filled()
    for _ in range(20):
        assert guard.judge(20.0, 1.1, seq_len=8) == "loss 20 is beyond 6 sigma (2.105)"
    assert guard.judge(2.02, 1.1, seq_len=8) is None
    assert (guard.num_skipped, guard.in_a_row) == (20, 0)


@pytest.mark.fault("D03")
def test_a_gradient_norm_beyond_six_sigma_is_refused_unless_it_becomes_usual() -> None:
    guard = filled()
    assert guard.judge(2.02, 9.0, seq_len=8) == "gradient norm 9 is beyond 6 sigma (1.59)"
    answers = [guard.judge(2.02, 9.0, seq_len=8) for _ in range(9)]
    assert answers[0] is not None
    assert answers[-1] is None
    assert guard.in_a_row == 0


def test_another_context_length_has_its_own_mean() -> None:
    guard = filled()
    assert guard.judge(20.0, 9.0, seq_len=16) is None
    assert guard.judge(90.0, 9.0, seq_len=16) is None  # one step says nothing about what is usual


def test_without_a_sigma_only_numbers_that_are_not_finite_are_refused() -> None:
    guard = filled(sigma=None)
    assert guard.judge(1e9, 1e9, seq_len=8) is None
    assert guard.judge(math.nan, 1.0, seq_len=8) == "loss nan is not finite"
    assert guard.judge(2.0, math.inf, seq_len=8) == "gradient norm inf is not finite"


@pytest.mark.fault("C15")
def test_a_restored_guard_decides_the_same() -> None:
    guard, other = filled(), StepGuard(sigma=6.0, max_in_a_row=2)
    guard.judge(20.0, 1.0, seq_len=8)
    other.restore(json.loads(json.dumps(guard.state())))
    for loss in (2.1, 2.11, 2.2, 3.0, math.nan):
        assert guard.judge(loss, 1.0, seq_len=8) == other.judge(loss, 1.0, seq_len=8)
    assert guard.state() == other.state()


# --- steps that are skipped


@pytest.mark.fault("D01", "D02")
def test_a_gradient_that_is_not_finite_is_named_with_its_rows(tmp_path: Path) -> None:
    made = bench(tmp_path)
    name, parameter = next(iter(made.trained.items()))
    poison = parameter.register_hook(
        lambda gradient: gradient * float("nan") if made.step == 6 else gradient
    )
    loop.fit(made)
    poison.remove()
    (event,) = events(made, "skip")
    assert event["step"] == 7
    assert event["why"] == "gradient norm nan is not finite"
    assert event["tensors"] == [name]
    assert event["rows"] == [int(row) for row in made.batches.indices(6)]
    moments = [v for state in made.optimizer.state.values() for v in state.values()]
    assert all(torch.isfinite(value).all() for value in [*moments, *made.trained.values()])


@pytest.mark.fault("D07")
def test_a_batch_without_a_target_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    made = bench(tmp_path)
    weigh = made.objective.weigh
    made.objective = dataclasses.replace(
        made.objective, weigh=lambda batch: 0.0 if made.step == 3 else weigh(batch)
    )
    loop.fit(made)
    assert events(made, "skip")[0]["why"] == "no token of the batch carries loss"


# --- trouble that lasts


@pytest.mark.fault("D04", "C18")
def test_data_that_stay_bad_are_passed_over_from_the_last_checkpoint(tmp_path: Path) -> None:
    made = bench(tmp_path)
    poison_places(made, {11, 12, 13})
    loop.fit(made)
    (event,) = events(made, "rollback")
    assert event["step"] == 10
    assert event["num_batches_passed_over"] == 4
    assert "step 14: loss nan is not finite; 3 steps in a row were skipped" in event["why"]
    assert made.decisions.detours == [(10, 4)]
    rows = [row["step"] for row in made.metrics.read() if "event" not in row]
    assert rows == list(range(1, 25))
    again = Decisions.open(tmp_path / "recovery.json")
    assert [again.place(step) for step in (9, 10, 23)] == [9, 14, 27]


@pytest.mark.fault("D04")
def test_after_as_many_returns_as_allowed_training_ends(tmp_path: Path) -> None:
    made = bench(tmp_path)
    scaled({row: math.nan for row in range(20)}, made)
    made.config = dataclasses.replace(CONFIG, max_rollbacks=2)
    with pytest.raises(DivergedError, match=r"before there was a checkpoint .* smaller schedule"):
        loop.fit(made)
    good = bench(tmp_path, config=made.config)
    good.objective = failing({2 * 8}, ValueError("stop here"))
    with pytest.raises(ValueError, match="stop here"):
        loop.fit(good)
    made = bench(tmp_path, config=made.config)
    scaled({row: math.nan for row in range(20)}, made)
    with pytest.raises(DivergedError, match=r"after 2 returns to a checkpoint; take a smaller"):
        loop.fit(made)


@pytest.mark.fault("B12")
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    made = bench(tmp_path)
    step, spoil = made.optimizer.step, iter([False] * 9 + [True] + [False] * 99)

    def spoiling(*arguments: Any) -> None:
        step(*arguments)
        if next(spoil):
            with torch.no_grad():
                next(iter(made.trained.values()))[3, 3] = math.inf

    made.optimizer.step = spoiling  # type: ignore[method-assign]
    loop.fit(made)
    (event,) = events(made, "rollback")
    assert "step 10: weight model.model.embed_tokens.weight is not finite" in event["why"]
    assert event["step"] == 5
    for number in made.checkpoints.steps():
        model = made.checkpoints.load(number).model
        assert all(torch.isfinite(tensor).all() for tensor in model.values())


@pytest.mark.fault("C01", "D04")
def test_a_crash_after_a_return_ends_with_the_same_model(tmp_path: Path) -> None:
    def poisoned(folder: Path, crash_at: int | None = None) -> loop.Workbench:
        made = bench(folder)
        poison_places(made, {11, 12, 13}, crash_at=crash_at)
        return made

    unbroken = poisoned(tmp_path / "unbroken")
    loop.fit(unbroken)
    for crash_at in (12, 18):
        with pytest.raises(ValueError, match="crash"):
            loop.fit(poisoned(tmp_path / "broken", crash_at))
    made = poisoned(tmp_path / "broken")
    assert made.step == 15
    loop.fit(made)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))


# --- memory


@pytest.mark.fault("E01")
def test_steps_done_again_have_the_micro_batch_they_had(tmp_path: Path) -> None:
    """Memory runs out in step 8 and a crash follows in step 9: steps 6 and 7 are done again."""
    unbroken = bench(tmp_path / "unbroken", objective=failing({15}, torch.OutOfMemoryError("fake")))
    loop.fit(unbroken)
    assert unbroken.decisions.micro_batches == [(7, 1)]
    calls = 0

    def total(scorer: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise torch.OutOfMemoryError("fake")
        if calls == 22:
            raise ValueError("crash")
        return NEXT_TOKEN.total(scorer, batch)

    crashing = bench(tmp_path / "broken", objective=Objective(weigh=NEXT_TOKEN.weigh, total=total))
    with pytest.raises(ValueError, match="crash"):
        loop.fit(crashing)
    made = bench(tmp_path / "broken")
    assert made.step == 5
    loop.fit(made)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))


@pytest.mark.fault("E06")
def test_out_of_memory_in_the_optimizer_is_not_tried_again(tmp_path: Path) -> None:
    made = bench(tmp_path)

    def step() -> None:
        raise torch.OutOfMemoryError("fake")

    made.optimizer.step = step  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryExhaustedError, match=r"step 1: .*in the optimizer .*smaller micro_b"):
        loop.fit(made)
    assert made.checkpoints.steps() == []


@pytest.mark.fault("E01")
def test_out_of_memory_between_two_adapters_of_one_input_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    """The input that they share holds all activations before it, of micro-batches twice as long."""
    shape = LoRAAdapterConfig(r=2, alpha=4.0, dropout=0.0, targets="all-linear")
    config = dataclasses.replace(CONFIG, duration=dataclasses.replace(CONFIG.duration, steps=1))
    made = bench(tmp_path, config=config, model=add_adapter(tiny_model().bfloat16(), shape))
    last = made.scorer.causal_model.get_decoder().layers[1]
    inputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail_once(_: Any, given: tuple[torch.Tensor]) -> None:
        inputs.append(weakref.ref(given[0]))
        if len(inputs) == 1:
            raise torch.OutOfMemoryError("fake")

    last.mlp.up_proj.register_forward_pre_hook(fail_once)
    last.register_forward_pre_hook(lambda *_: alive.extend(each() is not None for each in inputs))
    loop.fit(made)
    assert made.decisions.micro_batches == [(0, 1)]
    assert not alive[0]


@pytest.mark.fault("E08")
def test_out_of_memory_in_validation_halves_too(tmp_path: Path) -> None:
    in_validation = 2 * 10 + 1  # the call after ten steps of two micro-batches
    made = bench(tmp_path, objective=failing({in_validation}, torch.OutOfMemoryError("fake")))
    loop.fit(made)
    assert made.decisions.micro_batches == [(10, 1)]
    (row,) = (row for row in made.metrics.read() if row["step"] == 10)
    assert row["validation_loss"] > 0


@pytest.mark.fault("E08")
def test_out_of_memory_in_a_save_ends_with_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEVENFOLD_FAULTS", "oom@step=10:phase=save")
    with pytest.raises(MemoryExhaustedError, match=r"step 10: .* put together; .*smaller micro_b"):
        loop.fit(bench(tmp_path))
    made = bench(tmp_path)
    assert made.step == 5
    loop.fit(made)


# --- decisions


def test_decisions_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recovery.json").write_text('{"micro_batches": [[1]], "detours": []}')
    with pytest.raises(CheckpointError, match=r"recovery.json: not what training wrote.*no-resume"):
        Decisions.open(tmp_path / "recovery.json")


def test_a_smaller_setting_of_ones_own_wins() -> None:
    decisions = Decisions(None, micro_batches=[(4, 4), (9, 2)])
    assert [decisions.micro_batch(step, 8) for step in (3, 4, 9)] == [8, 4, 2]
    assert decisions.micro_batch(9, 1) == 1


# --- writing while training goes on


@pytest.mark.fault("B10")
def test_a_checkpoint_that_could_not_be_written_stops_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(tmp_path)
    write = made.checkpoints._write

    def full(snapshot: Any) -> None:
        if snapshot.step == 15:
            raise SevenfoldError("no space left")
        write(snapshot)

    monkeypatch.setattr(made.checkpoints, "_write", full)
    with pytest.raises(SevenfoldError, match="no space left"):
        loop.fit(made)
    assert made.step < 20
    assert made.checkpoints.steps() == [5, 10]
    again = bench(tmp_path)
    assert again.step == 10
    loop.fit(again)


@pytest.mark.parametrize("kind", [SevenfoldError, RuntimeError])
def test_a_checkpoint_that_could_not_be_written_hides_no_other_error(
    kind: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk is full, and the step beside the write is out of memory: both are told."""
    made = bench(tmp_path, objective=failing({11}, torch.OutOfMemoryError("no")))
    tried = threading.Event()

    def full(snapshot: Any) -> None:
        tried.wait()
        raise kind("no space left")

    def halve(facts: dict[str, Any]) -> None:
        tried.set()
        raise MemoryExhaustedError("out of memory")

    monkeypatch.setattr(made.checkpoints, "_write", full)
    monkeypatch.setattr(made.memory, "halve", halve)
    with pytest.raises(MemoryExhaustedError, match="out of memory"):
        loop.fit(made)
    assert made.step == 5
    assert "no space left" in caplog.text


def test_training_changes_nothing_that_is_being_written(tmp_path: Path) -> None:
    """The writer waits until training is done, and still writes the weights of its own step."""
    config = dataclasses.replace(CONFIG, checkpoint_every=20)
    loop.fit(bench(tmp_path / "other", config=config))
    made = bench(tmp_path, config=config)
    write = made.checkpoints._write
    kept: list[Any] = []
    made.checkpoints._write = kept.append  # type: ignore[method-assign]
    loop.fit(made)
    for snapshot in kept:
        write(snapshot)
    other = bench(tmp_path / "other", resume=False).checkpoints
    for step in (20, 24):
        assert_equal(made.checkpoints.load(step).model, other.load(step).model)


# --- going on from a checkpoint


@pytest.mark.fault("C11", "C06")
def test_with_a_reason_changed_settings_are_accepted_and_recorded(tmp_path: Path) -> None:
    loop.fit(bench(tmp_path))
    made = bench(tmp_path, resume=False)
    made.identity = {"inputs": {"data": "d"}, "config": {"seed": 6, "log_every": 1}}
    with pytest.raises(CheckpointError, match=r'config.seed was 5, now 6.*--force "reason"'):
        resuming.resume(made)
    assert resuming.resume(made, force="seeds do not matter here")
    (event,) = events(made, "resume")
    assert event["forced"] == "seeds do not matter here"
    assert event["changed"] == ["config.seed was 5, now 6"]


def test_another_program_is_said_once_and_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop.fit(bench(tmp_path))
    made = bench(tmp_path, resume=False)
    made.program = {"code": "2"}
    assert resuming.resume(made)
    assert "the result may differ: program.code was '1', now '2'" in caplog.text
    assert events(made, "resume")[0]["program"] == ["program.code was '1', now '2'"]


@pytest.mark.fault("B14")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"written in format 1, this version reads 3.*--no-resume"),
        ({}, r"embed_tokens.weight is \(61, 17\) torch.float32, the model's is \(61, 16\)"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    made = bench(tmp_path)
    loop.fit(made)
    last = made.checkpoints.load(24)
    wider = {"model.model.embed_tokens.weight": torch.zeros(61, 17)} if not change else {}
    spoilt = dataclasses.replace(
        last, model={**last.model, **wider}, state={**last.state, **change}
    )
    made.checkpoints.save(spoilt)
    made.checkpoints.finish()
    with pytest.raises(CheckpointError, match=message):
        bench(tmp_path)


@pytest.mark.fault("C17")
def test_a_finished_stage_knows_its_last_row_without_the_log(tmp_path: Path) -> None:
    last = loop.fit(bench(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    assert loop.fit(bench(tmp_path)) == last


# --- several processes


class Second(parallel.Processes):
    """The second process of two, whose first has read the checkpoint of step 5."""

    def sum(self, values: list[float]) -> list[float]:
        return [1.0, 5.0] if len(values) == 2 else values

    def first_difference(self, facts: Mapping[str, str]) -> str | None:
        return "recovery.detours" if facts["recovery.detours"] != "[]" else None


def second(folder: Path) -> loop.Workbench:
    """Return a bench of the second process, with checkpoints of steps 5 and 8."""
    made = bench(folder, resume=False)
    for made.step in (5, 8):
        loop.save(made)
    made.checkpoints.finish()
    made.processes = Second(rank=1, world=2, device=made.processes.device)
    return made


def test_all_processes_go_on_from_the_checkpoint_of_the_first(tmp_path: Path) -> None:
    """The newest that one node sees need not be the newest that another sees."""
    made = second(tmp_path)
    assert made.checkpoints.steps() == [5, 8]
    snapshot = resuming.latest(made)
    assert snapshot is not None
    assert snapshot.step == 5
    assert made.checkpoints.steps() == [5, 8]
    (tmp_path / "checkpoints" / "step-00000005" / "random.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError,
        match=r"random.safetensors: 0 bytes.*process 1 of 2 has to go on from it .* look at the di",
    ):
        resuming.latest(made)
    assert made.checkpoints.steps() == [5, 8]  # only the first sets aside what is damaged


def test_processes_that_know_of_other_decisions_are_refused(tmp_path: Path) -> None:
    """They would pass over other rows."""
    made = second(tmp_path)
    made.decisions.detours = [(5, 2)]
    with pytest.raises(
        UsageError, match=r"recovery.detours is not the same in all 2 .*see the same run"
    ):
        resuming.resume(made)


# --- which checkpoints are kept


def test_the_best_is_kept_beside_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, validate_every=5, keep_checkpoints=1, keep_best=True)
    held_out = iter([3.0, 1.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(loop, "validation_loss", lambda bench: next(held_out))
    made = bench(tmp_path, config=config)
    loop.fit(made)
    assert made.checkpoints.steps() == [10, 24]


@pytest.mark.fault("B11")
def test_rotation_leaves_what_is_later_alone_and_never_takes_the_newest(tmp_path: Path) -> None:
    made = bench(tmp_path, config=dataclasses.replace(CONFIG, keep_checkpoints=1))
    stale = made.checkpoints.path(99999)
    stale.mkdir(parents=True)
    loop.fit(made)
    assert made.checkpoints.steps() == [24, 99999]


@pytest.mark.fault("B08")
def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_with_sizes(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.checkpoints.require_room(1000, 9)
    for num_to_come, count in ((9, 4), (3, 3), (1, 1)):
        found = rf"{count} checkpoints of 1048576.00 GiB .*smaller keep_check"
        with pytest.raises(UsageError, match=found):
            made.checkpoints.require_room(2**50, num_to_come)
