"""Random kills of the real commands: the demo's village made small, ten kills a stage.

Each stage is trained once undisturbed and once with kills, from the same inputs, by the command
that people type. Both must end with the same bytes: model, last checkpoint, and every logged loss.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sevenfold.base import faults, storage
from sevenfold.base.errors import SevenfoldError
from sevenfold.base.faults import PHASES
from sevenfold.base.records import GATED_STAGES
from sevenfold.train.checkpoint import Checkpoints
from sevenfold.workflow import damage
from sevenfold.workflow.attempts import Result
from sevenfold.workflow.selftest import Line

SEED, NUM_KILLS, NUM_STEPS = 7, 10, 60
PREPARATION = ("download", "clean", "tokenize", "init", "prepare-sft", "prepare-dpo")
TRAINING = {
    "duration": f"{{steps: {NUM_STEPS}}}",
    "checkpoint_every": "7",
    "validate_every": "10",
    "validation_batches": "1",
    "log_every": "1",
}
SETTINGS = {
    "tracking": "none",
    "data.village.num_documents": "900",
    "data.village.num_validation_documents": "60",
    "data.village.num_instructions": "400",
    "data.village.num_preferences": "200",
    "data.village.num_domain_rows": "200",
    "data.village.num_evaluation_items": "20",
}
EARLY_OPERATIONS = 20
FORCE = ("--force", "self-test")  # so short a training passes no gate


def break_stages(folder: Path) -> Iterator[Line]:
    """Yield what came of the kills in each stage."""
    whole, chosen = folder / "unbroken", _settings()
    for verb in PREPARATION:
        _require(whole, verb, *chosen[verb])
    yield Line(
        name=f"preparation: kill -9 of the commands at {NUM_KILLS} random moments",
        rows=("A02", "A04"),
        results=tuple(_break_preparation(whole, folder / "broken-preparation", chosen)),
    )
    for stage in GATED_STAGES:
        copy = folder / f"broken-{stage}"
        damage.copy_folder(whole, copy)
        _require(whole, stage, *FORCE)
        results = tuple(_break(whole, copy, stage))
        name = f"{stage}: kill -9 of the command at {NUM_KILLS} random moments"
        yield Line(name=name, rows=("A02", "C01"), results=results)
        damage.remove_folder(copy)


def _settings() -> dict[str, list[str]]:
    """Return the flags of each command of the preparation; the run remembers the first's."""
    sections = ("pretrain", *(f"{stage}.train" for stage in GATED_STAGES[1:]))
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    settings += [f"{part}.{name}={value}" for part in sections for name, value in TRAINING.items()]
    chosen = [word for setting in settings for word in ("--set", setting)]
    return {verb: chosen if verb == PREPARATION[0] else [] for verb in PREPARATION}


def _break_preparation(whole: Path, copy: Path, chosen: dict[str, list[str]]) -> Iterator[Result]:
    """Kill each command of the preparation at early file operations, let it finish, compare."""
    dice = random.Random(SEED)
    why, num_kills = "", 0
    for index, verb in enumerate(PREPARATION):
        while num_kills * len(PREPARATION) < NUM_KILLS * (index + 1):
            fault = f"kill@fs:{dice.randint(1, EARLY_OPERATIONS // 2)}"
            code, _ = _run(copy, verb, *chosen[verb], fault=fault)
            why = why or ("" if code == -9 else f"{verb}, {fault}: exit code {code} instead")
            num_kills += 1
        code, complaint = _run(copy, verb, *chosen[verb])
        why = why or (f"{verb} ended with exit code {code}: {complaint}" if code else "")
    left = "" if why else ", ".join(damage.hidden_files(copy))
    why = why or (f"left behind: {left}" if left else "")
    recovered = not why
    odd = [name for name, found in _made(whole).items() if _made(copy).get(name) != found]
    why = why or (f"{odd[0]} is not as in the unbroken run" if odd else "")
    for _ in range(num_kills):
        yield Result(recovered=recovered, identical=recovered and not why, why=why)


def _made(run: Path) -> dict[str, str]:
    """Return the fingerprint of every folder that a run holds."""
    return {
        path.parent.relative_to(run).as_posix(): storage.read_manifest(path.parent)["fingerprint"]
        for path in sorted(run.rglob(storage.MANIFEST))
    }


def _break(whole: Path, copy: Path, stage: str) -> Iterator[Result]:
    """Kill the stage of ``copy`` again and again, let it finish, and compare."""
    metrics = storage.JsonLines(copy / stage / "metrics.jsonl")
    costs, why = [], ""
    for fault in _moments(stage):
        reached = _last_step(metrics)
        code, _ = _run(copy, stage, *FORCE, fault=fault)
        why = why or (f"{fault}: exit code {code} instead of a kill" if code != -9 else "")
        costs.append(_steps_lost(metrics, reached))
    reached = _last_step(metrics)
    code, seconds = _finish(copy, stage, metrics)
    costs = [*costs[1:], _steps_lost(metrics, reached)]
    why = why or (f"the last start ended with exit code {code}" if code else "")
    left = "" if why else ", ".join(damage.hidden_files(copy / stage))
    why = why or (f"left behind: {left}" if left else "")
    recovered = not why
    why = why or _difference(whole / stage, copy / stage)
    for lost in costs:
        yield Result(
            recovered=recovered,
            identical=recovered and not why,
            num_steps_lost=lost,
            recovery_s=seconds,
            why=why,
        )


def _moments(stage: str) -> list[str]:
    """Return ten faults: later and later steps in any phase, and early file operations."""
    dice = random.Random(f"{SEED} {stage}")
    steps = sorted(dice.sample(range(2, NUM_STEPS), NUM_KILLS - 3))
    always = [phase for phase in PHASES if phase not in ("evaluate", "save")]
    kills = [f"kill@step={step}:phase={dice.choice(always)}" for step in steps]
    for _ in range(NUM_KILLS - len(steps)):
        kill = f"kill@fs:{dice.randint(1, EARLY_OPERATIONS)}"
        kills.insert(dice.randint(0, len(kills)), kill)
    return kills


def _run(run: Path, *arguments: str, fault: str = "") -> tuple[int, str]:
    """Do one command; return its exit code and the last line of what it complained."""
    done = subprocess.run(
        _command(run, *arguments),
        env=_environment(fault),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def _finish(run: Path, stage: str, metrics: storage.JsonLines) -> tuple[int, float | None]:
    """Let the stage finish; return the exit code and the seconds until it did something new."""
    reached, started_s, passed_s = _last_step(metrics), time.monotonic(), None
    with subprocess.Popen(
        _command(run, stage, *FORCE),
        env=_environment(""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None:
            if passed_s is None and _last_step(metrics) > reached:
                passed_s = time.monotonic() - started_s
            time.sleep(0.05)
    return process.returncode, passed_s


def _command(run: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "sevenfold.workflow.cli", *arguments, "--run", str(run)]


def _environment(fault: str) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, faults.VARIABLE: fault}


def _require(run: Path, *arguments: str) -> None:
    code, complaint = _run(run, *arguments)
    if code:
        raise SevenfoldError(
            f"selftest: '{arguments[0]}' of a small run ended with exit code {code} though nothing "
            f"was done to it; mend this first: {complaint}"
        )


def _last_step(metrics: storage.JsonLines) -> int:
    return max((row["step"] for row in metrics.read() if "event" not in row), default=0)


def _steps_lost(metrics: storage.JsonLines, reached: int) -> int | None:
    """Return how many logged steps the last start did again; None if it did not come that far."""
    resumed = [row["step"] for row in metrics.read() if row.get("event") == "resume"]
    return reached - resumed[-1] if resumed else None


def _difference(whole: Path, copy: Path) -> str:
    """Name the first thing in which two finished stages differ."""
    ended = [_ending(whole), _ending(copy)]
    odd = [name for name in ended[0] if ended[0][name] != ended[1].get(name)]
    return f"{odd[0]} is not as in the unbroken stage" if odd else ""


def _ending(stage: Path) -> dict[str, Any]:
    rows = [row for row in storage.JsonLines(stage / "metrics.jsonl").read() if "event" not in row]
    checkpoints = Checkpoints(stage / "checkpoints", keep=1)
    last = checkpoints.path(checkpoints.steps()[-1])
    files = {path.name: storage.sha256_file(path) for path in last.glob("*.safetensors")}
    return {
        "the model": storage.read_manifest(stage / "model")["fingerprint"],
        "a logged loss": [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows],
        **{f"the last checkpoint's {name}": found for name, found in files.items()},
    }
