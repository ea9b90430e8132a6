"""The checkpoints of a run: listed, checked byte for byte, pruned."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from rich.text import Text

from sevenfold.base import console, storage
from sevenfold.base.errors import CheckpointError
from sevenfold.base.records import GATED_STAGES, open_run
from sevenfold.train.checkpoint import Checkpoints


def checkpoints(options: argparse.Namespace) -> None:
    """List the checkpoints of every stage; with ``--verify`` check them, with ``--prune`` delete.

    Errors:
        RunInUseError: the run is being worked on, and checkpoints are to be deleted.
        CheckpointError: ``--verify`` found a damaged one, or ``--prune`` found no good one to
            keep; nothing of that stage is deleted then.
    """
    run = open_run(options.run)
    stages = {name: _open(run.stage(name) / "checkpoints") for name in GATED_STAGES}
    if options.prune is not None:
        with storage.lock_run(run.folder):
            for kept in stages.values():
                _prune(kept, options.prune)
    damaged = (
        [error for kept in stages.values() for error in _damaged(kept)] if (options.verify) else []
    )
    _print_table(run.folder, stages)
    if damaged:
        raise CheckpointError(
            f"{run.folder}: {len(damaged)} damaged: {' | '.join(damaged)}; a stage that goes on "
            "uses the newest good one, --prune N deletes the damaged"
        )
    if options.verify:
        num = sum(len(kept.steps()) for kept in stages.values())
        console.print_line(f"{num} checkpoints, every byte as written")


def _open(folder: Path) -> Checkpoints:
    return Checkpoints(folder, keep=1)


def _damaged(kept: Checkpoints) -> list[str]:
    """Say what is wrong with each checkpoint that is not as it was written."""
    found = []
    for step in kept.steps():
        try:
            kept.verify(step)
        except CheckpointError as error:
            found.append(str(error))
    return found


def _prune(kept: Checkpoints, num: int) -> None:
    """Keep the newest ``num`` good checkpoints and delete the rest, the damaged ones too."""
    good: list[int] = []
    for step in reversed(kept.steps()):
        if len(good) == num:
            break
        try:
            kept.verify(step)
        except CheckpointError:
            continue
        good.append(step)
    if kept.steps() and not good:
        raise CheckpointError(
            f"{kept.folder}: not one good checkpoint; nothing was deleted. Start the stage again "
            "with --no-resume"
        )
    others = [kept.path(step) for step in kept.steps() if step not in good]
    for folder in [*others, *sorted(kept.folder.glob("damaged-step-*"))]:
        storage.remove_folder(folder)
        console.print_line(f"deleted {folder}")


def _print_table(run: Path, stages: dict[str, Checkpoints]) -> None:
    rows: list[list[object]] = []
    for stage, kept in stages.items():
        best = kept.best(kept.steps())
        for step in kept.steps():
            loss = kept.held_out_loss(step)
            shown = "-" if loss is None else f"{loss:.4f}{' best' if step == best else ''}"
            rows.append([stage, f"step {step}", *_size_and_age(kept.path(step)), shown])
        for folder in sorted(kept.folder.glob("damaged-step-*")):
            step = int(re.sub(r"\D", "", folder.name))
            size, age = _size_and_age(folder)
            rows.append([stage, f"step {step}", size, age, Text("damaged, set aside", "red")])
    columns = ["stage", "step", "size", "made", "held-out loss"]
    console.print_table(f"checkpoints of {run}", columns, rows)


def _size_and_age(folder: Path) -> tuple[str, str]:
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    size_gib = sum(file.st_size for file in files) / 2**30
    age_s = time.time() - max((file.st_mtime for file in files), default=time.time())
    return f"{size_gib:.3f} GiB", f"{console.duration(age_s)} ago"
