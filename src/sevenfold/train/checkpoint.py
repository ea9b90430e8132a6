"""Checkpoints: everything a stage needs to go on as if it had never stopped.

One folder a checkpoint, ``step-00000100``: model.safetensors (what is trained),
optimizer.safetensors, random.safetensors, state.json and a manifest with their SHA-256. What is
large is cut into several files (`tensor_files`). A folder is complete or does not exist; a damaged
one is set aside by name and the one before it is used.
Training goes on while one is written: tensors are copied to main memory first, on a GPU beside
the next step's computation, and the next update waits for that copy alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import re
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sevenfold.base import storage
from sevenfold.base.errors import CheckpointError, SevenfoldError, UsageError
from sevenfold.train import tensor_files

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
PARTS = ("model", "optimizer", "random")


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

    def __init__(self, folder: Path, *, keep: int, keep_best: bool = False):
        """Use ``folder``; keep the newest ``keep``, and the best by held-out loss if asked."""
        self.folder = folder
        self.keep = keep
        self.keep_best = keep_best
        self._memory = _MainMemory()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step-{step:08d}"

    def require_room(self, size_bytes: int, num_to_come: int) -> None:
        """Refuse to start where the disk cannot hold what is to be kept, and one being written.

        ``num_to_come`` will be written if nothing interrupts: a short run has fewer at any time.

        Errors:
            UsageError: it cannot; the message has the sizes.
        """
        parent = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        steps = self.steps()
        files = [path for step in steps for path in self.path(step).rglob("*")]
        present = sum(path.stat().st_size for path in files if path.is_file())
        count = min(self.keep + self.keep_best + 1, len(steps) + num_to_come)
        needed = size_bytes * count - present
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise UsageError(
                f"{self.folder}: {count} checkpoints of {size_bytes / 2**30:.2f} GiB (those kept "
                "and one being written, or all of a short run) need "
                f"{needed / 2**30:.2f} GiB more, {free / 2**30:.2f} GiB are free; set a smaller "
                "keep_checkpoints, or choose a --run folder on a larger disk"
            )

    def reserve(self, parts: Parts) -> None:
        """Page-lock main memory for copies of these GPU tensors while training goes on.

        It took a second a GiB on an H100's host; the first checkpoint would wait for it. The stream
        that they are copied on is made at once: on a GPU that is full by then, none can be made.
        """
        shapes = {
            f"{part}/{name}": (tensor.shape, tensor.dtype)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
            if tensor.is_cuda
        }
        if shapes:
            self.finish()
            self._memory.make_stream()
            self._writing = self._writer.submit(self._memory.reserve, shapes)

    def save(self, snapshot: Snapshot) -> None:
        """Copy ``snapshot`` to main memory and write it while training goes on.

        Errors:
            SevenfoldError: the one before could not be written.
        """
        self.finish()
        begun: dict[str, Any] = self._memory.begin({p: getattr(snapshot, p) for p in PARTS})
        self._writing = self._writer.submit(self._write, dataclasses.replace(snapshot, **begun))

    def wait_until_copied(self) -> None:
        """Let the GPU do nothing that changes weights before they have been copied."""
        self._memory.hold_back()

    def finish(self) -> None:
        """Wait for the checkpoint under way.

        Errors:
            SevenfoldError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Checkpoints:
        """Return itself; at the end nothing is under way any more."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        """Wait for the checkpoint under way; its error does not hide the one that came before.

        Errors:
            SevenfoldError: it could not be written, and nothing else was wrong.
        """
        try:
            self.finish()
        except (SevenfoldError, RuntimeError, OSError) as failure:  # the disk, or a GPU
            if error is None:
                raise
            log.error("%s", failure)

    def check(self) -> None:
        """Raise what went wrong with the checkpoint under way, if it has ended."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def _write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint durably, read it again, then remove those that need not be kept."""
        tensors = self._memory.complete({part: getattr(snapshot, part) for part in PARTS})
        target = self.path(snapshot.step)
        size = sum(tensor.nbytes for part in PARTS for tensor in tensors[part].values())
        with storage.new_folder(
            target, kind="checkpoint", needed_bytes=size, step=snapshot.step
        ) as folder:
            tensor_files.write(folder, {part: tensors[part] for part in PARTS})
            storage.write_json(folder / "state.json", snapshot.state)
        self.verify(snapshot.step)
        kept = self._to_keep(snapshot.step)
        for step in self.steps():
            if step < snapshot.step and step not in kept:
                storage.remove_folder(self.path(step))

    def _to_keep(self, newest: int) -> set[int]:
        """Return the steps up to ``newest`` that stay; later ones are not this line's to judge."""
        steps = [step for step in self.steps() if step <= newest]
        kept = set(steps[-self.keep :])
        if best := self.best(steps) if self.keep_best else None:
            kept.add(best)
        return kept

    def best(self, steps: list[int]) -> int | None:
        """Return the step among ``steps`` with the lowest held-out loss, None if none has one."""
        losses = {step: self.held_out_loss(step) for step in steps}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=lambda step: (measured[step], -step), default=None)

    def held_out_loss(self, step: int) -> float | None:
        """Return the held-out loss that was measured at the step of a checkpoint."""
        with contextlib.suppress(CheckpointError):
            state = storage.read_json(self.path(step) / "state.json", CheckpointError)
            loss = state.get("validation_loss")
            if isinstance(loss, float) and math.isfinite(loss):
                return loss
        return None

    def load_latest(self) -> Snapshot | None:
        """Return the newest checkpoint whose every byte is as it was written, or None.

        Errors:
            CheckpointError: there are checkpoints, and all are damaged; each is named.
        """
        self.finish()
        storage.sweep(self.folder)
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step)
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

    def verify(self, step: int) -> list[str]:
        """Check every byte of one checkpoint and return the names of its files.

        Errors:
            CheckpointError: it is not complete, or not as it was written.
        """
        manifest = self.path(step) / storage.MANIFEST
        if not manifest.is_file():
            raise CheckpointError(f"{manifest}: missing")
        listed = storage.verify_folder(self.path(step), CheckpointError)["files"]
        return [file["path"] for file in listed]

    def load(self, step: int) -> Snapshot:
        """Read one checkpoint, every byte checked.

        Errors:
            CheckpointError: it is not complete, or not as it was written.
        """
        folder = self.path(step)
        started = time.perf_counter()
        names = self.verify(step)
        log.info("%s: read and checked in %.1f s", folder, time.perf_counter() - started)
        try:
            tensors = {part: tensor_files.read(folder, part, names) for part in PARTS}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder}: not readable: {error}") from None
        state = storage.read_json(folder / "state.json", CheckpointError)
        return Snapshot(step=step, state=state, **tensors)

    def _set_aside(self, step: int, reason: str) -> None:
        log.warning("checkpoint set aside as damaged: %s", reason)
        damaged = self.folder / f"damaged-step-{step:08d}"
        storage.remove_folder(damaged)
        storage.move_folder(self.path(step), damaged)


Parts = dict[str, dict[str, Tensor]]


class _MainMemory:
    """Copies of tensors in main memory; page-locked and reused where they come from a GPU.

    The training thread begins a copy, the writer's thread completes it: page-locking tens of GiB
    for the first checkpoint takes longer than copying them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._warned = False
        self._stream: torch.cuda.Stream | None = None
        self._ready: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None
        self._under_way = threading.Event()
        self._under_way.set()

    def make_stream(self) -> torch.cuda.Stream:
        """Make the stream that copies are made on, if there is none."""
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream

    def begin(self, parts: Parts) -> Parts:
        """Copy what is in main memory; of GPU tensors, note from when on they may be copied."""
        if any(tensor.is_cuda for tensors in parts.values() for tensor in tensors.values()):
            self._ready = torch.cuda.current_stream().record_event()
            self._under_way.clear()
        return {
            part: {n: t.detach() if t.is_cuda else t.detach().clone() for n, t in tensors.items()}
            for part, tensors in parts.items()
        }

    def complete(self, parts: Parts) -> Parts:
        """Copy the GPU tensors, and return when all copies are complete."""
        if self._under_way.is_set():
            return parts
        try:
            copies = self._copy(parts)
        finally:
            self._under_way.set()
        assert self._copied is not None
        self._copied.synchronize()
        return copies

    def _copy(self, parts: Parts) -> Parts:
        device = next(t.device for tensors in parts.values() for t in tensors.values() if t.is_cuda)
        with torch.cuda.device(device):
            stream = self.make_stream()
            with torch.cuda.stream(stream):
                assert self._ready is not None
                stream.wait_event(self._ready)
                copies = {
                    part: {n: self._to_host(f"{part}/{n}", t) for n, t in tensors.items()}
                    for part, tensors in parts.items()
                }
                self._copied = stream.record_event()
        return copies

    def _to_host(self, key: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        held = self._buffer(key, tensor.shape, tensor.dtype)
        held.copy_(tensor, non_blocking=True)
        assert self._stream is not None
        tensor.record_stream(self._stream)
        return held

    def _buffer(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        held = self._buffers.get(key)
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self._buffers[key] = self._page_locked(shape, dtype)
        return held

    def _page_locked(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            if not self._warned:
                log.warning("checkpoints will hold training up: no page-locked memory (%s)", error)
            self._warned = True
            return torch.empty(shape, dtype=dtype)

    def reserve(self, shapes: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
        """Have a buffer ready for each of these tensors."""
        for key, (shape, dtype) in shapes.items():
            self._buffer(key, shape, dtype)

    def hold_back(self) -> None:
        """Let the GPU's next work wait for the copies, this thread until they are asked for."""
        self._under_way.wait()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def digest(*parts: dict[str, Tensor]) -> str:
    """Return a SHA-256 of the names, types, shapes and values of all tensors, part by part."""
    with ThreadPoolExecutor(storage.MOST_READERS) as pool:
        found = [list(pool.map(_digest, part, part.values())) for part in parts]
    return hashlib.sha256(repr([sorted(each) for each in found]).encode()).hexdigest()


def _digest(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], str]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    values = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    return name, str(tensor.dtype), tuple(tensor.shape), values


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
