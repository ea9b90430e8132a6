"""What a long step has finished of a folder so far, kept for the process that goes on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sevenfold.base import disk, storage
from sevenfold.base.errors import BadDataError, SevenfoldError

STATE = "state.json"


class UnfinishedFolder:
    """Files beside ``target`` that stay where a process is stopped, with a state after the last.

    What was begun for another ``identity`` (other inputs or settings) is removed, and so is a file
    that is not listed, or not what is listed, with all after it.
    """

    def __init__(self, target: Path, identity: str) -> None:
        """Open what is there, or begin."""
        self.target = target
        self.folder = target.parent / f".{target.name}.unfinished"
        self._identity = identity
        self._steps: list[dict[str, Any]] = []

    @property
    def files(self) -> list[str]:
        """Names of the finished files, in the order in which they were finished."""
        return [step["name"] for step in self._steps]

    @property
    def state(self) -> Any:
        """What to go on from after the last of them; None at the beginning."""
        return self._steps[-1]["state"] if self._steps else None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Open the folder; keep what is finished where the block fails, but not for bad data.

        Errors:
            SevenfoldError: the disk is full or refuses.
            BadDataError: a file outside that the block reads cannot be read.
        """
        try:
            self._open()
            yield
        except OSError as error:
            self._close()
            raise disk.refusal(self.target, error, temporary=self.folder) from error
        except BadDataError:
            disk.remove_tree(self.folder)
            raise
        except SevenfoldError:
            self._close()
            raise

    def _open(self) -> None:
        path = self.folder / STATE
        known = storage.read_json(path) if path.is_file() else {}
        if known.get("identity") == self._identity:
            self._steps = list(itertools.takewhile(self._is_whole, known["steps"]))
        elif self.folder.exists():
            disk.remove_tree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_half_written()

    def _is_whole(self, step: dict[str, Any]) -> bool:
        path = self.folder / step["name"]
        return path.is_file() and storage.sha256_file(path) == str(step["sha256"])

    def _remove_half_written(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.name not in (*self.files, STATE):
                disk.unlink(path)

    def _close(self) -> None:
        """Keep finished files only, and no folder without any."""
        with contextlib.suppress(OSError):
            self._remove_half_written()
            if not self.files:
                disk.remove_tree(self.folder)

    def finished(self, name: str, state: Any) -> None:
        """Note that ``name`` is written, and what to go on from after it; durable on return."""
        disk.sync_file(self.folder / name)
        disk.sync_directory(self.folder)
        sha256 = storage.sha256_file(self.folder / name)
        self._steps.append({"name": name, "sha256": sha256, "state": state})
        facts = {"identity": self._identity, "steps": self._steps}
        storage.write_json(self.folder / STATE, facts)

    def hand_over(self, folder: Path) -> None:
        """Put the finished files into ``folder`` too; no byte is copied."""
        for name in self.files:
            disk.link(self.folder / name, folder / name)

    def remove(self) -> None:
        """Remove the folder, once its files are elsewhere."""
        if self.folder.exists():
            disk.remove_tree(self.folder)
