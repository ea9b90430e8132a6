"""Checkpoints: everything a stage needs to go on as if it had never stopped.

One folder a checkpoint, ``step-00000100``: model.safetensors (what is trained),
optimizer.safetensors, random.safetensors, state.json and a manifest with their SHA-256. A folder
is complete or does not exist; a damaged one is set aside by name and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sevenfold.base import storage
from sevenfold.base.errors import CheckpointError

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds: tensors by name, and plain facts."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, folder: Path, *, keep: int):
        """Use ``folder``; keep the newest ``keep`` checkpoints."""
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step-{step:08d}"

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint durably, then remove those beyond ``keep``."""
        target = self.path(snapshot.step)
        with storage.new_folder(target, kind="checkpoint", step=snapshot.step) as folder:
            for name in ("model", "optimizer", "random"):
                tensors = getattr(snapshot, name)
                save_file(_separate(tensors), folder / f"{name}.safetensors")
            storage.write_json(folder / "state.json", snapshot.state)
        for step in self.steps()[: -self.keep]:
            storage.remove_folder(self.path(step))

    def load_latest(self) -> Snapshot | None:
        """Return the newest checkpoint whose every byte is as it was written, or None.

        Errors:
            CheckpointError: there are checkpoints, and all are damaged; each is named.
        """
        storage.sweep(self.folder)
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self._load(step)
            except CheckpointError as error:
                damaged.append(str(error))
                self._set_aside(step, str(error))
        # Set aside by an earlier call: going on from nothing would be a silent fresh start.
        damaged = damaged or [path.name for path in sorted(self.folder.glob("damaged-step-*"))]
        if damaged:
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged ({' | '.join(damaged)}); "
                "start the stage again with --no-resume"
            )
        return None

    def _load(self, step: int) -> Snapshot:
        folder = self.path(step)
        if not (folder / storage.MANIFEST).is_file():
            raise CheckpointError(f"{folder / storage.MANIFEST}: missing")
        storage.verify_folder(folder, CheckpointError)
        try:
            tensors = {
                name: load_file(folder / f"{name}.safetensors")
                for name in ("model", "optimizer", "random")
            }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder}: not readable: {error}") from None
        state = storage.read_json(folder / "state.json", CheckpointError)
        return Snapshot(step=step, state=state, **tensors)

    def _set_aside(self, step: int, reason: str) -> None:
        log.warning("checkpoint set aside as damaged: %s", reason)
        damaged = self.folder / f"damaged-step-{step:08d}"
        storage.remove_folder(damaged)
        storage.move_folder(self.path(step), damaged)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU copies; tensors that share memory are written out each."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.numel() and copy.data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.data_ptr())
        separate[name] = copy
    return separate


def random_state() -> dict[str, Tensor]:
    """Return the state of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
