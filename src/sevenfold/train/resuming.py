"""Going back to a checkpoint: after a stop, and after trouble."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sevenfold.base.errors import CheckpointError, UsageError
from sevenfold.model import float8
from sevenfold.train import checkpoint, parallel
from sevenfold.train.config import HARMLESS

if TYPE_CHECKING:
    from sevenfold.train.loop import Workbench

log = logging.getLogger(__name__)

# What state.json holds and how tensors are named; another number is another layout.
FORMAT = 3


def resume(bench: Workbench, *, force: str | None = None) -> bool:
    """Go back to the latest good checkpoint; return False where there is none.

    ``force`` is the reason for going on although inputs or settings have changed.

    Errors:
        CheckpointError: it was written with other inputs or settings, or for another model.
        UsageError: the processes were not all started with the same.
    """
    _require_same_job(bench)
    snapshot = latest(bench)
    if snapshot is None:
        if bench.processes.is_main:
            bench.metrics.rewind(0)
        return False
    where = bench.checkpoints.path(snapshot.step)
    changes = list(_differences(snapshot.state["identity"], bench.identity))
    if changes and force is None:
        raise CheckpointError(
            f"{where}: {changes[0]}; set it back, start the stage again with --no-resume, or go "
            'on all the same with --force "reason"'
        )
    event: dict[str, Any] = {"step": snapshot.step, "event": "resume"}
    if changes:
        event |= {"forced": force, "changed": changes}
        log.warning("%s: going on although %s", where, "; ".join(changes))
    known = {"program": snapshot.state["program"]}
    if news := list(_differences(known, {"program": bench.program})):
        event["program"] = news
        log.warning(
            "%s: another program than the one that wrote it, so the result may differ: %s",
            where,
            "; ".join(news),
        )
    restore(bench, snapshot)
    if bench.processes.is_main:
        bench.metrics.rewind(bench.step)
        bench.metrics.append(event)
    return True


def _require_same_job(bench: Workbench) -> None:
    """Refuse processes that were started with other inputs, settings or code than each other."""
    # What was decided on the way says which rows come next.
    decided = {"micro_batches": bench.decisions.micro_batches, "detours": bench.decisions.detours}
    sections = {**bench.identity, "program": bench.program, "recovery": decided}
    facts = {f"{s}.{name}": repr(v) for s, fields in sections.items() for name, v in fields.items()}
    if name := bench.processes.first_difference(facts):
        raise UsageError(
            f"{bench.stage}: {name} is not the same in all {bench.processes.world} processes (here "
            f"{facts.get(name, sorted(facts))}); start them all with the same files and flags, "
            "on nodes that see the same run folder"
        )


def latest(bench: Workbench) -> checkpoint.Snapshot | None:
    """Return the newest good checkpoint, the same in every process, or None.

    Errors:
        CheckpointError: all are damaged, it has another layout, or not all processes see it.
    """
    # The main process sets damaged checkpoints aside, and its choice is everybody's: another node
    # may see an older one yet, or read its bytes otherwise, and would go on from another step.
    snapshot = bench.checkpoints.load_latest() if bench.processes.is_main else None
    known = snapshot is not None, 0 if snapshot is None else snapshot.step
    found, step = bench.processes.sum([float(fact) for fact in known])
    if found and not bench.processes.is_main:
        snapshot = _load_as_main_did(bench, int(step))
    if snapshot is not None and snapshot.state.get("format") != FORMAT:
        raise CheckpointError(
            f"{bench.checkpoints.path(snapshot.step)}: written in format "
            f"{snapshot.state.get('format', 1)}, this version reads {FORMAT}; start the stage "
            "again with --no-resume"
        )
    return snapshot


def _load_as_main_did(bench: Workbench, step: int) -> checkpoint.Snapshot:
    try:
        return bench.checkpoints.load(step)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; process {bench.processes.rank} of {bench.processes.world} has to go on from "
            "it as the first one does, which could read it: look at the disk that all nodes share, "
            "then run the same command again"
        ) from None


def restore(bench: Workbench, snapshot: checkpoint.Snapshot) -> None:
    """Put weights, optimizer, random states and counters back.

    A history of FP8 that only one side has is left out: by force, training goes on in another
    precision, and FP8 then seeks its scales anew.

    Errors:
        CheckpointError: it is another model's.
    """
    _require_same_tensors(bench, snapshot)
    names = trained_names(bench.scorer)
    if not any(name.endswith(float8.HISTORY) for name in snapshot.model):
        float8.forget_history(bench.scorer)
    known = {name: tensor for name, tensor in snapshot.model.items() if name in names}
    parallel.scatter_model(bench.scorer, known, bench.processes)
    bench.optimizer.state.clear()
    bench.optimizer.zero_grad(set_to_none=True)
    parallel.scatter_optimizer(
        bench.scorer, bench.optimizer, dict(snapshot.optimizer), bench.processes
    )
    checkpoint.restore_random_state(snapshot.random)
    bench.step = snapshot.step
    bench.tokens = snapshot.state["tokens"]
    bench.elapsed_s = snapshot.state["elapsed_s"]
    bench.last = snapshot.state["last"]
    bench.guard.restore(snapshot.state["guard"])


def trained_state(bench: Workbench) -> dict[str, Tensor]:
    """Return what training changes: all weights, or the adapters alone where the rest is frozen."""
    state = parallel.gather_model(bench.scorer, bench.processes)
    trained = trained_names(bench.scorer)
    return {name: value for name, value in state.items() if name in trained}


def trained_names(scorer: nn.Module) -> set[str]:
    """Names of the tensors that a checkpoint holds: everything that is not frozen.

    What belongs to a frozen weight, such as the scales of one in four bits, is named below it.
    """
    frozen = tuple(f"{name}." for name, p in scorer.named_parameters() if not p.requires_grad)
    return {name for name in scorer.state_dict() if not f"{name}.".startswith(frozen)}


def _require_same_tensors(bench: Workbench, snapshot: checkpoint.Snapshot) -> None:
    where: Path = bench.checkpoints.path(snapshot.step)
    different = set(snapshot.model) ^ trained_names(bench.scorer)
    if odd := sorted(name for name in different if not name.endswith(float8.HISTORY)):
        raise CheckpointError(
            f"{where}: tensor {odd[0]} is in only one of checkpoint and model; start the stage "
            "again with --no-resume"
        )
    present: dict[str, Tensor] = bench.scorer.state_dict()
    for name, tensor in snapshot.model.items():
        if name not in present:
            continue
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        expected = f"{tuple(present[name].shape)} {present[name].dtype}"
        if found != expected:
            raise CheckpointError(
                f"{where}: tensor {name} is {found}, the model's is {expected}; start the stage "
                "again with --no-resume"
            )


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Say which fields differ, old and new, harmless settings left out."""
    changes = []
    for section in sorted(set(found) | set(expected)):
        old, new = found.get(section, {}), expected.get(section, {})
        changes += [
            f"{section}.{name} was {old.get(name)!r}, now {new.get(name)!r}"
            for name in sorted(set(old) | set(new))
            if old.get(name) != new.get(name) and name not in HARMLESS
        ]
    return changes
