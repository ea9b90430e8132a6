"""The training loop on a model of a few thousand weights."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sevenfold.base import faults
from sevenfold.base.errors import (
    CheckpointError,
    DivergedError,
    MemoryExhaustedError,
    StoppedError,
)
from sevenfold.base.hardware import OOMHandler
from sevenfold.base.storage import JsonLines
from sevenfold.data.batches import Batches, PackedText, RowSource
from sevenfold.model import accumulating
from sevenfold.objective.next_token import NEXT_TOKEN, Objective, Scorer
from sevenfold.train import checkpoint, loop, optimizer, parallel, resuming
from sevenfold.train.config import (
    ContextPhase,
    Duration,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from sevenfold.train.recovery import Decisions, StepGuard

VOCAB, BOS = 61, 0


class Table:
    """Random rows with a document start here and there."""

    num_rows, row_length = 20, 32

    def __init__(self) -> None:
        generator = np.random.default_rng(3)
        self.ids = generator.integers(0, VOCAB, (self.num_rows, self.row_length))
        self.ids[generator.random(self.ids.shape) < 0.1] = BOS

    def rows(self, indices: Any) -> Any:
        return self.ids[indices].astype(np.int64)


class Silent:
    def update(self, row: dict[str, Any]) -> None:
        pass


def tiny_model(dropout: float = 0.0, *, hidden_size: int = 16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sevenfold.model.attention import IMPLEMENTATION, register_attention

    register_attention()
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,  # the least that FlexAttention takes on a GPU
            attention_dropout=dropout,
            attn_implementation=IMPLEMENTATION,
        )
    )


CONFIG = TrainConfig(
    duration=Duration(steps=24),
    tokens_per_batch=4 * 32,
    contexts=(ContextPhase(length=8, until=0.3), ContextPhase(length=32, until=1.0)),
    micro_batch=2,
    mask_documents=True,
    optimizer=OptimizerConfig(
        kind="adamw", betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
    ),
    schedule=ScheduleConfig(kind="cosine", peak_lr=1e-2, final_lr=0.0, warmup_fraction=0.1),
    precision="fp32",
    weights="fp32",
    compile="none",
    recompute=False,
    deterministic=False,
    validate_every=10,
    validation_batches=1,
    checkpoint_every=5,
    keep_checkpoints=3,
    log_every=1,
    keep_best=False,
    spike_sigma=6.0,
    max_skipped_steps=2,
    max_rollbacks=1,
)


def bench(
    folder: Path,
    *,
    config: TrainConfig = CONFIG,
    objective: Objective = NEXT_TOKEN,
    recovery: bool = True,
    dropout: float = 0.1,
    resume: bool = True,
    model: Any = None,
    rows: RowSource | None = None,
) -> loop.Workbench:
    """Put ``model``, where it lies, on a bench with ``rows``; a tiny one with tiny rows if None."""
    scorer = Scorer(tiny_model(dropout) if model is None else model, kernel="plain")
    torch.manual_seed(1)
    rows = PackedText(Table(), bos_id=BOS) if rows is None else rows
    decisions = Decisions.open(folder / "recovery.json")
    made = loop.Workbench(
        stage="pretrain",
        scorer=scorer,
        objective=objective,
        batches=Batches(
            rows,
            tokens_per_batch=config.tokens_per_batch,
            contexts=config.contexts,
            num_steps=config.num_steps(rows.num_rows, rows.row_length),
            seed=5,
            place=decisions.place,
        ),
        validation=[rows.batch(np.arange(3), rows.row_length)],
        optimizer=optimizer.make_optimizer(scorer, config.optimizer),
        config=config,
        processes=parallel.Processes(rank=0, world=1, device=next(scorer.parameters()).device),
        checkpoints=checkpoint.Checkpoints(
            folder / "checkpoints", keep=config.keep_checkpoints, keep_best=config.keep_best
        ),
        metrics=JsonLines(folder / "metrics.jsonl"),
        memory=OOMHandler(config.micro_batch, enabled=recovery),
        progress=Silent(),
        identity={"inputs": {"data": "d"}, "config": {"seed": 5, "log_every": 1}},
        flops_per_token=lambda length: 1.0,
        peak_flops=0.0,
        guard=StepGuard(sigma=config.spike_sigma, max_in_a_row=config.max_skipped_steps),
        decisions=decisions,
        program={"code": "1"},
    )
    if resume:
        resuming.resume(made)
    return made


def losses(folder: Path) -> dict[int, str]:
    rows = JsonLines(folder / "metrics.jsonl").read()
    return {row["step"]: float(row["loss"]).hex() for row in rows if "event" not in row}


def weights(made: loop.Workbench) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.scorer.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def failing(at_calls: set[int], error: Exception) -> Objective:
    """The next-token objective, which raises at the given calls (counted from 1)."""
    calls = 0

    def total(scorer: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        summed = NEXT_TOKEN.total(scorer, batch)
        if calls in at_calls:
            raise error
        return summed

    return Objective(weigh=NEXT_TOKEN.weigh, total=total)


def test_it_learns_and_writes_one_row_a_step(tmp_path: Path) -> None:
    made = bench(tmp_path)
    last = loop.fit(made)
    rows = [row for row in made.metrics.read() if "event" not in row]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {row["seq_len"] for row in rows} == {8, 32}
    assert last["tokens"] == 24 * 128
    assert "validation_loss" in rows[9]
    assert made.checkpoints.steps() == [15, 20, 24]


def signalling(made: loop.Workbench, stop_at: int) -> Objective:
    """The bench's objective, which sends this process SIGTERM in step ``stop_at``."""
    objective = made.objective

    def total(scorer: Any, batch: Any) -> Any:
        if made.step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return objective.total(scorer, batch)

    return Objective(weigh=objective.weigh, total=total)


@pytest.mark.fault("C01", "C03", "C04", "C05")
@pytest.mark.parametrize("stops", [(5,), (7, 11), (3, 9, 20)])
def test_stopped_and_resumed_it_is_bit_identical(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Stops fall inside and across the curriculum boundary and the epoch boundary at step 5."""
    unbroken = bench(tmp_path / "unbroken")
    loop.fit(unbroken)
    for stop_at in stops:
        made = bench(tmp_path / "broken")
        made.objective = signalling(made, stop_at)
        with pytest.raises(StoppedError, match="run the same command again"):
            loop.fit(made)
    made = bench(tmp_path / "broken")
    assert made.step >= stops[-1] - 1  # a signal during validation is seen before the next step
    loop.fit(made)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))


@pytest.mark.fault("C07")
def test_a_crash_costs_only_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    unbroken = bench(tmp_path / "unbroken")
    loop.fit(unbroken)
    crashing = bench(tmp_path / "broken", objective=failing({2 * 13}, ValueError("crash")))
    with pytest.raises(ValueError, match="crash"):
        loop.fit(crashing)
    made = bench(tmp_path / "broken")
    assert made.step == 10
    loop.fit(made)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert_equal(weights(made), weights(unbroken))


@pytest.mark.fault("C10", "D06")
def test_micro_batch_and_accumulation_change_rounding_only(tmp_path: Path) -> None:
    results = []
    for micro_batch in (4, 2, 1):
        config = dataclasses.replace(CONFIG, micro_batch=micro_batch)
        made = bench(tmp_path / str(micro_batch), config=config, dropout=0.0)
        loop.fit(made)
        results.append([row["loss"] for row in made.metrics.read() if "event" not in row])
    for other in results[1:]:
        assert np.allclose(results[0], other, rtol=2e-5)


@pytest.mark.fault("E01")
def test_out_of_memory_halves_and_goes_on_like_a_run_of_that_size(tmp_path: Path) -> None:
    small = bench(tmp_path / "small", config=dataclasses.replace(CONFIG, micro_batch=1))
    loop.fit(small)
    made = bench(tmp_path / "oom", objective=failing({1}, torch.OutOfMemoryError("fake")))
    loop.fit(made)
    assert made.memory.micro_batch == 1
    assert_equal(weights(made), weights(small))
    assert [row["event"] for row in made.metrics.read() if "event" in row] == ["oom"]


def test_gradients_added_up_in_products_begin_anew_with_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after memory ran out in the middle of one, and after one that was not a number."""
    monkeypatch.setenv("SEVENFOLD_FAULTS", "nan@step=9")
    found = {}
    for name in ("plain", "in products"):
        monkeypatch.setattr(faults, "_times_done", collections.Counter())
        model = tiny_model()
        if name == "in products":
            accumulating.accumulate_in_products(model)
        out_of_memory = failing({2 * 6}, torch.OutOfMemoryError("fake"))
        made = bench(tmp_path / name, objective=out_of_memory, model=model)
        loop.fit(made)
        rows = made.metrics.read()
        assert [row["event"] for row in rows if "event" in row] == ["oom", "skip"]
        found[name] = [row["loss"] for row in rows if row.get("loss")]
        assert len(found[name]) == 23
    np.testing.assert_allclose(found["plain"], found["in products"], rtol=1e-5)


def test_out_of_memory_without_recovery_says_which_flag_helps(tmp_path: Path) -> None:
    made = bench(tmp_path, recovery=False, objective=failing({1}, torch.OutOfMemoryError("fake")))
    with pytest.raises(MemoryExhaustedError, match="add --enable-oom-recovery"):
        loop.fit(made)


@pytest.mark.fault("E02")
def test_out_of_memory_at_micro_batch_one_names_length_and_peak(tmp_path: Path) -> None:
    objective = failing(set(range(100)), torch.OutOfMemoryError("fake"))
    with pytest.raises(MemoryExhaustedError, match=r"micro-batch 1 \(step 1, seq_len 8, peak"):
        loop.fit(bench(tmp_path, objective=objective))


@pytest.mark.fault("E07")
def test_another_runtime_error_is_not_taken_for_out_of_memory(tmp_path: Path) -> None:
    made = bench(tmp_path, objective=failing({1}, RuntimeError("CUDA out of memory, it says")))
    with pytest.raises(RuntimeError, match="it says"):
        loop.fit(made)
    assert made.memory.num_recoveries == 0


def poisoned(steps: set[int]) -> tuple[Objective, list[Any]]:
    """The next-token objective whose loss is NaN at the given steps; the bench is put in later."""
    holder: list[Any] = []

    def total(scorer: Any, batch: Any) -> Any:
        summed = NEXT_TOKEN.total(scorer, batch)
        bad = holder[0].step in steps
        return dataclasses.replace(summed, total=summed.total * (float("nan") if bad else 1.0))

    return Objective(weigh=NEXT_TOKEN.weigh, total=total), holder


@pytest.mark.fault("D01")
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    objective, holder = poisoned({6})
    made = bench(tmp_path, objective=objective)
    holder.append(made)
    loop.fit(made)
    assert made.guard.num_skipped == 1
    assert all(torch.isfinite(p).all() for p in made.scorer.parameters())
    assert [row["step"] for row in made.metrics.read() if row.get("event") == "skip"] == [7]


@pytest.mark.fault("D01")
def test_too_many_bad_steps_in_a_row_end_the_stage(tmp_path: Path) -> None:
    objective, holder = poisoned(set(range(6, 24)))
    made = bench(tmp_path, objective=objective)
    holder.append(made)
    with pytest.raises(DivergedError, match=r"3 steps in a row .* smaller schedule.peak_lr"):
        loop.fit(made)
    assert made.checkpoints.steps() == [5]


@pytest.mark.fault("C11")
def test_a_checkpoint_of_other_data_is_refused_by_field(tmp_path: Path) -> None:
    loop.fit(bench(tmp_path))
    made = bench(tmp_path, resume=False)
    made.identity = {"inputs": {"data": "other"}, "config": {"seed": 5}}
    with pytest.raises(CheckpointError, match=r"inputs.data was 'd', now 'other'.*--no-resume"):
        resuming.resume(made)


@pytest.mark.fault("C11")
def test_a_harmless_setting_may_change(tmp_path: Path) -> None:
    loop.fit(bench(tmp_path))
    made = bench(tmp_path, resume=False)
    made.identity = {"inputs": {"data": "d"}, "config": {"seed": 5, "log_every": 7}}
    assert resuming.resume(made)
    assert made.step == 24


@pytest.mark.fault("C05")
def test_validation_does_not_move_the_random_state(tmp_path: Path) -> None:
    made = bench(tmp_path)
    before = torch.get_rng_state()
    first, second = loop.validation_loss(made), loop.validation_loss(made)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


class OfOneOpinion(parallel.Processes):
    """One of several processes, the others of which are not there."""

    def sum(self, values: list[float]) -> list[float]:
        return values


@pytest.mark.parametrize(
    ("world", "rank", "reserved"),
    [(1, 0, {"model", "optimizer"}), (2, 0, {"model"}), (2, 1, set())],
)
def test_memory_for_checkpoints_is_reserved_where_a_gpu_has_what_is_saved(
    world: int, rank: int, reserved: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whole weights in each process, the first one saves them; moments are gathered."""
    made = bench(tmp_path)
    made.processes = OfOneOpinion(rank=rank, world=world, device=torch.device("cpu"))
    asked: list[set[str]] = []
    monkeypatch.setattr(made.checkpoints, "reserve", lambda parts: asked.append(set(parts)))
    loop._reserve_memory_for_checkpoints(made)
    assert asked == ([reserved] if reserved else [])
