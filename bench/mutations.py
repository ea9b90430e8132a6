"""Do the tests notice when a protection is taken out? Takes fourteen out, one at a time, and looks.

Each mutation changes one line of a copy of the project and runs the tests that guard it there:
they must fail. Prints a table; the exit code is 0 only if every mutation was noticed.

    python bench/mutations.py          # about five minutes
    python bench/mutations.py K08 B02  # these rows of the fault matrix only
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PARTS = ("src", "tests", "configs", "scripts", "docs", "pyproject.toml", "README.md")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A protection: where it stands, what is put in its place, and the tests that guard it."""

    row: str
    protection: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


TRAIN = "src/sevenfold/train"
MUTATIONS = (
    Mutation(
        "B02",
        "checksums are compared",
        "src/sevenfold/base/storage.py",
        'if found != file["sha256"]:',
        "if False:",
        ("tests/unit/train/test_checkpoint.py", "-k", "flip"),
    ),
    Mutation(
        "C01",
        "random states come back",
        f"{TRAIN}/resuming.py",
        "    checkpoint.restore_random_state(snapshot.random)\n",
        "",
        ("tests/unit/train/test_loop.py", "-k", "bit_identical"),
    ),
    Mutation(
        "C15",
        "the guard's memory comes back",
        f"{TRAIN}/recovery.py",
        '        self._losses = deque(state["losses"], maxlen=WINDOW)\n',
        "",
        ("tests/unit/train/test_recovery.py", "-k", "restored_guard"),
    ),
    Mutation(
        "D01",
        "numbers that are not finite are refused",
        f"{TRAIN}/recovery.py",
        "        if not math.isfinite(value):\n",
        "        if value < -1e9:\n",
        ("tests/unit/train/test_recovery.py", "-k", "not_finite or finite_is_named"),
    ),
    Mutation(
        "B12",
        "weights are looked at before they are saved",
        f"{TRAIN}/loop.py",
        "    if bad := parallel.not_finite(bench.trained, bench.processes):\n",
        "    if bad := []:\n",
        ("tests/unit/train/test_recovery.py", "-k", "never_saved"),
    ),
    Mutation(
        "E01",
        "the size that fits is remembered with its step",
        f"{TRAIN}/loop.py",
        "        bench.decisions.save()\n        event = {",
        "        event = {",
        ("tests/unit/train/test_recovery.py", "-k", "steps_done_again"),
    ),
    Mutation(
        "B10",
        "weights are copied before training goes on",
        f"{TRAIN}/checkpoint.py",
        "t.detach() if t.is_cuda else t.detach().clone()",
        "t.detach()",
        ("tests/unit/train/test_recovery.py", "-k", "being_written"),
    ),
    Mutation(
        "B11",
        "the newest are kept",
        f"{TRAIN}/checkpoint.py",
        "kept = set(steps[-self.keep :])",
        "kept = set(steps[: self.keep])",
        ("tests/unit/train/test_checkpoint.py", "-k", "newest_are_kept"),
    ),
    Mutation(
        "C11",
        "a checkpoint of other settings is refused",
        f"{TRAIN}/resuming.py",
        "    if changes and force is None:\n",
        "    if False:\n",
        ("tests/unit/train/test_loop.py", "-k", "refused_by_field"),
    ),
    Mutation(
        "K08",
        "a run has one owner at a time",
        "src/sevenfold/base/storage.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        ("tests/unit/base/test_storage.py", "-k", "run_in_use"),
    ),
    Mutation(
        "B05",
        "a damaged checkpoint is set aside",
        f"{TRAIN}/checkpoint.py",
        "                self._set_aside(step, str(error))\n",
        "",
        ("tests/unit/train/test_checkpoint.py", "-k", "damaged_file_is_named"),
    ),
    Mutation(
        "A08",
        "all processes learn of one's signal",
        f"{TRAIN}/loop.py",
        "    stop.agreed = stops > 0\n",
        "    stop.agreed = asked > 0\n",
        ("tests/unit/train/test_parallel.py", "-k", "a_signal_to_one"),
    ),
    Mutation(
        "K07",
        "a changed record is refused where it is read",
        "src/sevenfold/base/seals.py",
        'look(data) == "wrong":',
        "False:",
        ("tests/unit/base/test_seals.py", "-k", "changed_field"),
    ),
    Mutation(
        "K07",
        "verify compares files with the record beside them",
        "src/sevenfold/verify/integrity.py",
        "        elif storage.sha256_file(stage / name) != sha256:\n",
        "        elif False:\n",
        ("tests/unit/verify/test_integrity.py", "-k", "replaced_by_another"),
    ),
)


def is_noticed(mutation: Mutation, folder: Path) -> bool:
    """Apply ``mutation`` to a copy of the project and return whether its tests fail."""
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".mypy_cache")
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copyfile(source, folder / part)
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: {mutation.old!r} does not stand there exactly once")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *mutation.tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    # 1: tests ran and failed; anything else (0 passed, 5 nothing collected) is not a failure.
    return done.returncode == 1


def main() -> None:
    """Try all mutations and print the table."""
    results = []
    for mutation in MUTATIONS:
        if sys.argv[1:] and mutation.row not in sys.argv[1:]:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            noticed = is_noticed(mutation, Path(folder))
        results.append(noticed)
        sys.stdout.write(
            f"| {mutation.row} | {mutation.protection} | {'noticed' if noticed else 'MISSED'} | "
            f"{time.monotonic() - started:.0f} s |\n"
        )
        sys.stdout.flush()
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
