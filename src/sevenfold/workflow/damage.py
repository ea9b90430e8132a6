"""What the self-test does to files on purpose; nothing else in the package writes like this."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sevenfold.train.checkpoint import Checkpoints

Damage = Callable[[Path], None]
PARTS = (
    "model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)


def copy_folder(folder: Path, target: Path) -> None:
    """Copy a whole folder."""
    shutil.copytree(folder, target)


def remove_folder(folder: Path) -> None:
    """Remove a whole folder."""
    shutil.rmtree(folder)


def newest(stage: Path) -> Path:
    """Folder of the newest checkpoint of a stage."""
    checkpoints = Checkpoints(stage / "checkpoints", keep=1)
    return checkpoints.path(checkpoints.steps()[-1])


def truncated(name: str, share: float) -> Damage:
    """Cut a file of the newest checkpoint down to ``share`` of its bytes."""

    def damage(stage: Path) -> None:
        data = (newest(stage) / name).read_bytes()
        (newest(stage) / name).write_bytes(data[: int(len(data) * share)])

    return damage


def flipped(name: str, place: float) -> Damage:
    """Flip one bit of a file of the newest checkpoint, ``place`` of the way through it."""

    def damage(stage: Path) -> None:
        data = bytearray((newest(stage) / name).read_bytes())
        bit = int(len(data) * 8 * place)
        data[bit // 8] ^= 1 << bit % 8
        (newest(stage) / name).write_bytes(data)

    return damage


def missing(name: str) -> Damage:
    """Remove a file of the newest checkpoint."""
    return lambda stage: (newest(stage) / name).unlink()


def renamed(name: str) -> Damage:
    """Rename a file of the newest checkpoint."""

    def damage(stage: Path) -> None:
        path = newest(stage) / name
        path.rename(path.with_name(f"{name}.old"))

    return damage


def extra(stage: Path) -> None:
    """Put a file into the newest checkpoint that its manifest does not know."""
    (newest(stage) / "notes.txt").write_text("not ours")


def leftovers(stage: Path) -> None:
    """Leave what processes killed in every way leave: halves of files and of folders."""
    checkpoints = stage / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    half = checkpoints / f".{names[0]}.partial-removed"
    (checkpoints / names[0]).rename(half)
    (half / "model.safetensors").unlink()
    orphan = checkpoints / ".step-00000006.partial-77"
    shutil.copytree(checkpoints / names[-1], orphan)
    (orphan / "manifest.json").unlink()
    (checkpoints / names[-1]).rename(checkpoints / f".{names[-1]}.replaced")
    (stage / ".metrics.jsonl.partial-77").write_text('{"step"')
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')


def hidden_files(stage: Path) -> list[str]:
    """Return the names of what unfinished work has left in a stage's folder."""
    found = (path.name for path in stage.rglob(".*") if path.name != ".lock")
    return sorted(name for name in found if ".partial-" in name or name.endswith(".replaced"))
