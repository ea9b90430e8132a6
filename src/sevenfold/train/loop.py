"""The one training loop: pretraining, SFT, DPO and LoRA differ in batches and objective only."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sevenfold.base import faults
from sevenfold.base.errors import CheckpointError, MemoryExhaustedError, StoppedError
from sevenfold.base.hardware import OOMHandler, peak_memory_gib, release_memory
from sevenfold.base.storage import JsonLines
from sevenfold.data.batches import Batch, Batches
from sevenfold.objective.next_token import Objective, Scorer
from sevenfold.train import checkpoint, parallel
from sevenfold.train.config import HARMLESS, TrainConfig
from sevenfold.train.optimizer import clip_gradients, set_learning_rate
from sevenfold.train.recovery import FiniteGuard, StopRequest, stop_on_signal
from sevenfold.train.schedule import learning_rate

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows a row of metrics to whoever watches."""

    def update(self, row: dict[str, Any]) -> None:
        """Show one row."""


@dataclasses.dataclass(kw_only=True)
class Workbench:
    """Everything a stage trains with.

    ``identity`` is what a checkpoint must agree with: fingerprints of the inputs and the stage's
    settings. ``flops_per_token`` maps a context length to FLOPs; ``peak_flops`` is one GPU's, 0
    where unknown.
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
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    stopped_at_the_end: bool = False
    guard: FiniteGuard = dataclasses.field(default_factory=lambda: FiniteGuard(0))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.batches.num_steps

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which this stage's forward passes run."""
        return autocast(self.config, self.processes)


def autocast(
    config: TrainConfig, processes: parallel.Processes
) -> contextlib.AbstractContextManager[Any]:
    """Compute in bf16 where weights are kept in fp32 on a single GPU; FSDP2 casts itself."""
    mixed = config.weights == "fp32" and config.precision in ("bf16", "fp8")
    if mixed and processes.world == 1:
        return torch.autocast(processes.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def fit(bench: Workbench) -> dict[str, Any]:
    """Train from the latest checkpoint, or from the start, to the last step.

    Returns:
        the last row of metrics.
    Errors:
        StoppedError: a signal came; the step was finished and saved.
        DivergedError: too many steps in a row were not finite.
        MemoryExhaustedError: one sequence alone does not fit.
    """
    config = bench.config
    last: dict[str, Any] = {}
    bench.scorer.train()
    with stop_on_signal() as stop:
        for batch in bench.batches.prefetch(bench.step):
            started = time.perf_counter()
            length = bench.batches.length(bench.step)
            row = train_step(bench, batch, length, stop)
            # Several processes have agreed at the start of the step, one need not ask.
            stop.agreed |= bench.processes.world == 1 and stop.signal_name is not None
            bench.step += 1
            bench.tokens += config.tokens_per_batch
            spent_s = time.perf_counter() - started
            bench.elapsed_s += spent_s
            finished = bench.step == bench.num_steps
            if finished or bench.step % config.validate_every == 0:
                row["validation_loss"] = validation_loss(bench)
            if finished or bench.step % config.log_every == 0 or "validation_loss" in row:
                last = _report(bench, row, length, spent_s)
            if finished or stop.agreed or bench.step % config.checkpoint_every == 0:
                save(bench)
            if stop.agreed and not finished:
                raise StoppedError(
                    f"stopped by a signal after step {bench.step} of {bench.num_steps}, which is "
                    "saved; run the same command again to go on"
                )
        bench.stopped_at_the_end = stop.agreed
    return last


def train_step(bench: Workbench, batch: Batch, length: int, stop: StopRequest) -> dict[str, float]:
    """Do one optimizer step; where memory runs out, redo it whole with a smaller micro-batch."""
    asked = float(stop.signal_name is not None)
    weight, stops = bench.processes.sum([bench.objective.weigh(batch), asked])
    stop.agreed = stops > 0
    rate = learning_rate(bench.config.schedule, bench.step, bench.num_steps)
    set_learning_rate(bench.optimizer, rate)
    random = checkpoint.random_state()
    while True:
        try:
            sums = _accumulate(bench, batch, length, weight)
            break
        except torch.OutOfMemoryError as error:
            facts = {"step": bench.step, "seq_len": length}
            _prepare_smaller(bench, error, facts)
        checkpoint.restore_random_state(random)
        bench.optimizer.zero_grad(set_to_none=True)
        release_memory()
    parameters = [p for p in bench.scorer.parameters() if p.requires_grad]
    norm = float(clip_gradients(parameters, bench.config.optimizer.clip_norm))
    loss = sums.pop("total") / weight if weight else 0.0
    row = {"loss": loss, "grad_norm": norm, "lr": rate}
    if weight and torch.isfinite(torch.tensor([loss, norm])).all():
        faults.at_step(bench.step + 1, "optimizer")
        bench.optimizer.step()
        bench.guard.accept()
    else:
        event = {"step": bench.step + 1, "event": "skip", "loss": loss, "grad_norm": norm}
        _note(bench, event)
        bench.guard.skip(bench.step + 1, loss=loss, grad_norm=norm)
    bench.optimizer.zero_grad(set_to_none=True)
    pairs = sums.pop("pairs", 0.0)
    return row | {name: value / pairs for name, value in sums.items() if pairs}


def _accumulate(bench: Workbench, batch: Batch, length: int, weight: float) -> dict[str, float]:
    """Add up the gradients of all micro-batches, each divided by the global batch's weight.

    FSDP2 averages gradients over processes, so each multiplies by their number to get the sum.
    """
    world = bench.processes.world
    rows = bench.memory.micro_batch * bench.config.longest_context // length
    sums: dict[str, Tensor] = {}
    for micro_batch in batch.split(rows):
        asked = faults.at_step(bench.step + 1, "forward")
        with bench.autocast():
            summed = bench.objective.total(bench.scorer, micro_batch.to(bench.processes.device))
        if "oom" in asked | faults.at_step(bench.step + 1, "backward"):
            raise torch.OutOfMemoryError("injected")
        factor = float("nan") if "nan" in asked else world / max(weight, 1.0)
        (summed.total * factor).backward()
        for name, value in {"total": summed.total.detach(), **summed.extras}.items():
            sums[name] = sums.get(name, 0.0) + value
    values = bench.processes.sum(torch.stack(list(sums.values())).double().tolist())
    return dict(zip(sums, values, strict=True))


def _prepare_smaller(bench: Workbench, error: Exception, facts: dict[str, Any]) -> None:
    if bench.processes.world > 1:
        raise MemoryExhaustedError(
            f"out of memory at micro-batch {bench.memory.micro_batch} on process "
            f"{bench.processes.rank} of {bench.processes.world} ({facts}); recovery works on one "
            "GPU only so far: set a smaller micro_batch"
        ) from error
    bench.memory.halve(facts)
    event = {"step": bench.step + 1, "event": "oom", "micro_batch": bench.memory.micro_batch}
    _note(bench, event | facts)


def _note(bench: Workbench, event: dict[str, Any]) -> None:
    if bench.processes.is_main:
        bench.metrics.append(event)


def _report(bench: Workbench, row: dict[str, float], length: int, spent_s: float) -> dict[str, Any]:
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
        bench.metrics.append(full)
        bench.progress.update(full)
    return full


@torch.no_grad()
def validation_loss(bench: Workbench) -> float:
    """Return the objective's mean over the held-out batches, without touching random states."""
    bench.scorer.eval()
    total, weight = 0.0, 0.0
    for batch in bench.validation:
        for micro_batch in batch.split(bench.memory.micro_batch):
            with bench.autocast():
                placed = micro_batch.to(bench.processes.device)
                total += float(bench.objective.total(bench.scorer, placed).total)
            weight += bench.objective.weigh(micro_batch)
    bench.scorer.train()
    total, weight = bench.processes.sum([total, weight])
    return total / weight


def save(bench: Workbench) -> None:
    """Write a checkpoint of the present step."""
    model = trained_state(bench)
    optimizer = parallel.gather_optimizer(bench.scorer, bench.optimizer, bench.processes)
    if bench.processes.is_main:
        state = {
            "step": bench.step,
            "tokens": bench.tokens,
            "elapsed_s": bench.elapsed_s,
            "num_skipped": bench.guard.num_skipped,
            "skipped_in_a_row": bench.guard.in_a_row,
            "micro_batch": bench.memory.micro_batch,
            "identity": bench.identity,
        }
        bench.checkpoints.save(
            checkpoint.Snapshot(
                step=bench.step,
                model=model,
                optimizer=optimizer,
                random=checkpoint.random_state(),
                state=state,
            )
        )
    bench.processes.wait()


def trained_state(bench: Workbench) -> dict[str, Tensor]:
    """Return what training changes: all weights, or the adapters alone where the rest is frozen."""
    state = parallel.gather_model(bench.scorer, bench.processes)
    trained = _trained_names(bench)
    return {name: value for name, value in state.items() if name in trained}


def _trained_names(bench: Workbench) -> set[str]:
    frozen = {name for name, p in bench.scorer.named_parameters() if not p.requires_grad}
    return set(bench.scorer.state_dict()) - frozen


def resume(bench: Workbench) -> bool:
    """Go back to the latest good checkpoint; return False where there is none.

    Errors:
        CheckpointError: it was written with other inputs or settings, or for another model.
    """
    # The main process sets damaged checkpoints aside; the others look when it has done so.
    snapshot = bench.checkpoints.load_latest() if bench.processes.is_main else None
    bench.processes.wait()
    if not bench.processes.is_main:
        snapshot = bench.checkpoints.load_latest()
    if snapshot is None:
        if bench.processes.is_main:
            bench.metrics.rewind(0)
        return False
    _check_identity(
        snapshot.state["identity"], bench.identity, bench.checkpoints.path(snapshot.step)
    )
    if odd_names := set(snapshot.model) ^ _trained_names(bench):
        odd = sorted(odd_names)[0]
        raise CheckpointError(
            f"{bench.checkpoints.path(snapshot.step)}: tensor {odd} is in only one of checkpoint "
            "and model; start the stage again with --no-resume"
        )
    parallel.scatter_model(bench.scorer, snapshot.model, bench.processes)
    parallel.scatter_optimizer(
        bench.scorer, bench.optimizer, dict(snapshot.optimizer), bench.processes
    )
    checkpoint.restore_random_state(snapshot.random)
    bench.step = snapshot.step
    bench.tokens = snapshot.state["tokens"]
    bench.elapsed_s = snapshot.state["elapsed_s"]
    bench.guard.num_skipped = snapshot.state["num_skipped"]
    bench.guard.in_a_row = snapshot.state["skipped_in_a_row"]
    if bench.memory.enabled:
        bench.memory.micro_batch = min(bench.memory.micro_batch, snapshot.state["micro_batch"])
    if bench.processes.is_main:
        bench.metrics.rewind(bench.step)
        bench.metrics.append({"step": bench.step, "event": "resume"})
    return True


def _check_identity(found: dict[str, Any], expected: dict[str, Any], where: Any) -> None:
    """Refuse a checkpoint of other inputs or settings, naming the field, old and new."""
    for section in ("inputs", "config"):
        old, new = found.get(section, {}), expected.get(section, {})
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name) and name not in HARMLESS:
                raise CheckpointError(
                    f"{where}: {section}.{name} was {old.get(name)!r}, now {new.get(name)!r}; set "
                    "it back, or start the stage again with --no-resume"
                )
