"""The one training loop: pretraining, SFT, DPO and LoRA differ in batches and objective only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sevenfold.base.errors import DivergedError, MemoryExhaustedError, StoppedError
from sevenfold.base.hardware import OOMHandler, peak_memory_gib, release_memory
from sevenfold.base.storage import JsonLines
from sevenfold.data.batches import Batch, Batches
from sevenfold.model import accumulating, adapting, float8
from sevenfold.objective.next_token import Objective, Scorer
from sevenfold.train import checkpoint, launch, optimizer, parallel, replicas, resuming
from sevenfold.train.config import TrainConfig
from sevenfold.train.recovery import Decisions, RollBack, StepGuard, StopRequest, stop_on_signal
from sevenfold.train.schedule import learning_rate
from sevenfold.train.watching import OTHER, UPDATE, Clock, Progress

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(kw_only=True)
class Workbench:
    """Everything a stage trains with.

    ``identity`` is what a checkpoint must agree with: fingerprints of the inputs and the stage's
    settings; ``program`` says what code and libraries train. ``flops_per_token`` maps a context
    length to FLOPs; ``peak_flops`` is one GPU's, 0 where unknown. ``clock`` is told where the
    phases of a step begin. ``last`` is the last row of metrics.
    """

    stage: str
    scorer: Scorer
    objective: Objective
    batches: Batches
    validation: list[Batch]
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    processes: parallel.Processes
    checkpoints: checkpoint.Checkpoints
    metrics: JsonLines
    memory: OOMHandler
    progress: Progress
    identity: dict[str, Any]
    flops_per_token: Callable[[int], float]
    peak_flops: float
    guard: StepGuard
    decisions: Decisions
    program: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: Clock = dataclasses.field(default_factory=Clock)
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    last: dict[str, Any] = dataclasses.field(default_factory=dict)
    stopped_at_the_end: bool = False

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.batches.num_steps

    @functools.cached_property  # a GPU would wait for it in every step
    def trained(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name; of whole ones on several GPUs, shares."""
        return replicas.trained(self.scorer)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which this stage's forward passes run."""
        return parallel.autocast(self.config, self.processes)


def fit(bench: Workbench) -> dict[str, Any]:
    """Train from where the bench stands to the last step.

    Returns:
        the last row of metrics.
    Errors:
        StoppedError: a signal came; the step was finished and saved.
        DivergedError: the numbers stay bad after as many returns to a checkpoint as are allowed.
        MemoryExhaustedError: one sequence alone does not fit.
    """
    bench.scorer.train()
    with stop_on_signal() as stop, bench.checkpoints:
        while bench.step < bench.num_steps:
            try:
                _train(bench, stop)
            except RollBack as trouble:
                _go_back(bench, trouble)
        _settle(bench)
        bench.stopped_at_the_end = stop.agreed
    return bench.last


def _settle(bench: Workbench) -> None:
    """Return when the last checkpoint is on the disk, in all processes together."""
    bench.checkpoints.finish()
    bench.processes.wait()


def _train(bench: Workbench, stop: StopRequest) -> None:
    """Train step after step, to the end or until something is wrong."""
    config, begun_at = bench.config, bench.step
    for batch in bench.clock.waiting(bench.batches.prefetch(bench.step)):
        started = time.perf_counter()
        launch.at_phase(bench.step + 1, "load")
        bench.checkpoints.check()
        length = bench.batches.length(bench.step)
        row = train_step(bench, batch, length, stop)
        bench.clock.mark(OTHER)
        bench.step += 1
        bench.tokens += config.tokens_per_batch
        spent_s = time.perf_counter() - started
        bench.elapsed_s += spent_s
        if bench.step == begun_at + 1:
            _reserve_memory_for_checkpoints(bench)
        finished = bench.step == bench.num_steps
        if finished or bench.step % config.validate_every == 0:
            row["validation_loss"] = validation_loss(bench)
        if finished or bench.step % config.log_every == 0 or "validation_loss" in row:
            _report(bench, row, length, spent_s)
        # Several processes have agreed at the start of the step, one need not ask.
        stop.agreed |= bench.processes.world == 1 and stop.signal_name is not None
        # In the middle of trouble the checkpoint before it is the one worth keeping.
        regular = bench.step % config.checkpoint_every == 0 and not bench.guard.in_a_row
        if finished or stop.agreed or regular:
            save(bench, held_out_loss=row.get("validation_loss"))
        if stop.agreed and not finished:
            _settle(bench)
            raise StoppedError(
                f"stopped by a signal after step {bench.step} of {bench.num_steps}, which is "
                "saved; run the same command again to go on"
            )


def train_step(bench: Workbench, batch: Batch, length: int, stop: StopRequest) -> dict[str, float]:
    """Do one optimizer step, unless its numbers are bad.

    Errors:
        RollBack: there were too many bad steps in a row.
    """
    asked = float(stop.signal_name is not None)
    weight, stops = bench.processes.sum([bench.objective.weigh(batch), asked])
    stop.agreed = stops > 0
    rate = learning_rate(bench.config.schedule, bench.step, bench.num_steps)
    optimizer.set_learning_rate(bench.optimizer, rate)
    sums = _fitting(bench, bench.step, length, lambda: _gradients(bench, batch, length, weight))
    bench.clock.mark(UPDATE)
    norm, grad_norm = optimizer.gradient_norm(bench.trained.values())
    launch.at_phase(bench.step + 1, "clip")
    row = {"loss": sums.pop("total") / max(weight, 1.0), "grad_norm": grad_norm, "lr": rate}
    if weight:
        problem = bench.guard.judge(row["loss"], grad_norm, seq_len=length)
    else:
        problem = "no token of the batch carries loss"
        bench.guard.refuse()
    if problem is None:
        optimizer.clip_gradients(bench.optimizer, bench.config.optimizer.clip_norm, norm)
        _update(bench)
    else:
        _skip(bench, problem)
    bench.optimizer.zero_grad(set_to_none=True)
    pairs = sums.pop("pairs", 0.0)
    return row | {name: value / pairs for name, value in sums.items() if pairs}


def _fitting(bench: Workbench, step: int, length: int, compute: Callable[[], T]) -> T:
    """Compute something; where memory runs out, again and whole with smaller micro-batches.

    ``step`` is the first that the smaller size holds for, counted from 0.

    Errors:
        MemoryExhaustedError: recovery is off, or one sequence alone does not fit.
    """
    random = checkpoint.random_state()
    while True:
        bench.memory.micro_batch = bench.decisions.micro_batch(step, bench.config.rows_at_once)
        with contextlib.suppress(torch.OutOfMemoryError):
            return compute()
        bench.memory.halve({"step": step + 1, "seq_len": length})
        bench.decisions.micro_batches.append((step, bench.memory.micro_batch))
        bench.decisions.save()
        event = {"event": "oom", "micro_batch": bench.memory.micro_batch, "seq_len": length}
        _note(bench, step + 1, event)
        launch.start_again_if_several(bench.processes, bench.memory.micro_batch)
        checkpoint.restore_random_state(random)
        bench.optimizer.zero_grad(set_to_none=True)
        adapting.forget(bench.scorer)
        release_memory()


def _gradients(bench: Workbench, batch: Batch, length: int, weight: float) -> dict[str, float]:
    """Add up a step's gradients, once FP8 has scales: before the first step they are sought."""
    if not float8.has_history(bench.scorer):
        rows = bench.memory.micro_batch * bench.config.longest_context // length
        float8.forget_history(bench.scorer)
        for _ in range(float8.ROUNDS):
            _accumulate(bench, batch.rows(0, rows), length, weight)
            float8.end_step(bench.scorer)
            bench.optimizer.zero_grad(set_to_none=True)
    return _accumulate(bench, batch, length, weight)


def _accumulate(bench: Workbench, batch: Batch, length: int, weight: float) -> dict[str, float]:
    """Add up the gradients of all micro-batches, each divided by the global batch's weight.

    FSDP2 averages gradients over processes, so each multiplies by their number to get the sum.
    """
    factor = parallel.num_averaged(bench.scorer, bench.processes) / max(weight, 1.0)
    rows = bench.memory.micro_batch * bench.config.longest_context // length
    sums: dict[str, Tensor] = {}
    float8.begin_step(bench.scorer)
    accumulating.begin_step(bench.scorer)
    for micro_batch in parallel.exchanging_once(bench.scorer, batch.split(rows)):
        asked = launch.at_phase(bench.step + 1, "forward")
        with bench.autocast():
            summed = bench.objective.total(bench.scorer, micro_batch.to(bench.processes.device))
        launch.run_out_of_memory_if(asked | launch.at_phase(bench.step + 1, "backward"))
        total = summed.total * (float("nan") if "nan" in asked else 10 if "spike" in asked else 1)
        (total * factor).backward()
        for name, value in {"total": total.detach(), **summed.extras}.items():
            sums[name] = sums.get(name, 0.0) + value
    values = bench.processes.sum(torch.stack(list(sums.values())).double().tolist())
    return dict(zip(sums, values, strict=True))


def _update(bench: Workbench) -> None:
    """Apply the gradients, once the last checkpoint's copy of the weights is complete.

    Errors:
        MemoryExhaustedError: the update is half applied, so it can neither go on nor be repeated.
    """
    asked = launch.at_phase(bench.step + 1, "optimizer")
    bench.checkpoints.wait_until_copied()
    try:
        launch.run_out_of_memory_if(asked)
        optimizer.update(bench.optimizer, bench.scorer)
    except torch.OutOfMemoryError as error:
        raise MemoryExhaustedError(
            f"step {bench.step + 1}: out of memory in the optimizer (peak {peak_memory_gib():.1f} "
            "GiB), which has changed a part of the weights; nothing of this step is saved. Set a "
            "smaller micro_batch and run the same command again: it goes on from the last "
            "checkpoint"
        ) from error


def _skip(bench: Workbench, problem: str) -> None:
    """Note a step that is not applied, with the tensors and the rows that are to blame.

    Errors:
        RollBack: it is one too many.
    """
    gradients = {name: p.grad for name, p in bench.trained.items() if p.grad is not None}
    event = {
        "event": "skip",
        "why": problem,
        "tensors": parallel.not_finite(gradients, bench.processes)[:8],
        "rows": [int(row) for row in bench.batches.indices(bench.step)],
    }
    _note(bench, bench.step + 1, event)
    log.warning("step %d skipped: %s", bench.step + 1, problem)
    if bench.guard.has_had_enough:
        problem = f"{problem}; {bench.guard.in_a_row} steps in a row were skipped"
        raise RollBack(problem, step=bench.step + 1)


def _go_back(bench: Workbench, trouble: RollBack) -> None:
    """Return to the last good checkpoint, and pass over the data between it and the trouble.

    Errors:
        DivergedError: that was done as often as is allowed, or there is no checkpoint.
    """
    detours = bench.decisions.detours
    where = f"step {trouble.step}: {trouble}"
    advice = "take a smaller schedule.peak_lr, or look at the rows that metrics.jsonl names"
    if len(detours) >= bench.config.max_rollbacks:
        raise DivergedError(f"{where}, after {len(detours)} returns to a checkpoint; {advice}")
    snapshot = resuming.latest(bench)
    if snapshot is None:
        raise DivergedError(f"{where}, before there was a checkpoint to return to; {advice}")
    resuming.restore(bench, snapshot)
    num_batches = trouble.step - bench.step
    detours.append((bench.step, num_batches))
    if bench.processes.is_main:
        bench.decisions.save()
        bench.metrics.rewind(bench.step)
    event = {"event": "rollback", "why": where, "num_batches_passed_over": num_batches}
    _note(bench, bench.step, event)
    log.warning("%s; going on from step %d with the data after it", where, bench.step)


def _note(bench: Workbench, step: int, event: dict[str, Any]) -> None:
    if bench.processes.is_main:
        bench.metrics.append({"step": step, **event})


def _report(bench: Workbench, row: dict[str, float], length: int, spent_s: float) -> None:
    """Complete the step's row, write it to metrics.jsonl and show the same row."""
    rate = bench.config.tokens_per_batch / spent_s / bench.processes.world
    full = {
        "step": bench.step,
        "tokens": bench.tokens,
        **row,
        "seq_len": length,
        "tok_s": rate,
        "mem_gib": peak_memory_gib(),
        "elapsed_s": bench.elapsed_s,
    }
    if bench.peak_flops:
        full["mfu"] = rate * bench.flops_per_token(length) / bench.peak_flops
    if bench.processes.is_main:
        launch.at_phase(bench.step, "log")
        bench.metrics.append(full)
        bench.progress.update(full)
    bench.last = full


def validation_loss(bench: Workbench) -> float:
    """Return the objective's mean over the held-out batches, without touching random states."""
    bench.scorer.eval()
    longest = bench.config.longest_context
    total, weight = _fitting(bench, bench.step, longest, lambda: _validate(bench))
    bench.scorer.train()
    return total / weight


@torch.no_grad()
def _validate(bench: Workbench) -> list[float]:
    """Return the summed loss of the held-out batches, and their weight."""
    asked, total, weight = launch.at_phase(bench.step, "evaluate"), 0.0, 0.0
    for batch in bench.validation:
        for micro_batch in batch.split(bench.memory.micro_batch):
            launch.run_out_of_memory_if(asked)
            with bench.autocast():
                placed = micro_batch.to(bench.processes.device)
                total += float(bench.objective.total(bench.scorer, placed).total)
            weight += bench.objective.weigh(micro_batch)
    return bench.processes.sum([total, weight])


def save(bench: Workbench, *, held_out_loss: float | None = None) -> None:
    """Save the present step; it is written while training goes on.

    Errors:
        RollBack: a weight is not finite; such weights are never saved.
        MemoryExhaustedError: a GPU has no room to put sharded weights together.
    """
    asked = launch.at_phase(bench.step, "save")
    if bad := parallel.not_finite(bench.trained, bench.processes):
        raise RollBack(f"weight {bad[0]} is not finite", step=bench.step)
    try:
        launch.run_out_of_memory_if(asked)
        model = resuming.trained_state(bench)
        moments = parallel.gather_optimizer(bench.scorer, bench.optimizer, bench.processes)
    except torch.OutOfMemoryError as error:
        raise MemoryExhaustedError(
            f"step {bench.step}: out of memory while the checkpoint was put together; the one "
            "before is whole. Set a smaller micro_batch and run the same command again"
        ) from error
    if not bench.processes.is_main:
        return
    state = {
        "format": resuming.FORMAT,
        "step": bench.step,
        "tokens": bench.tokens,
        "elapsed_s": bench.elapsed_s,
        "guard": bench.guard.state(),
        "last": {k: v for k, v in bench.last.items() if math.isfinite(v)},
        "validation_loss": held_out_loss,
        "identity": bench.identity,
        "program": bench.program,
    }
    random = checkpoint.random_state()
    bench.checkpoints.save(
        checkpoint.Snapshot(
            step=bench.step, model=model, optimizer=moments, random=random, state=state
        )
    )


def _reserve_memory_for_checkpoints(bench: Workbench) -> None:
    """Once the optimizer has its state; what is sharded is gathered, which is no GPU's copy."""
    if bench.processes.is_main and parallel.is_whole(bench.scorer):
        parts = {"model": resuming.trained_state(bench)}
        if bench.processes.world == 1:
            moments = parallel.gather_optimizer(bench.scorer, bench.optimizer, bench.processes)
            parts["optimizer"] = moments
        bench.checkpoints.reserve(parts)
