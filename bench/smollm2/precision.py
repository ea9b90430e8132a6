"""What does FP8 do to the result of DPO? SmolLM2, the same pairs, once in bf16 and once in FP8.

    PYTHONPATH=src python bench/smollm2/precision.py MODEL DATA FOLDER [--seeds N] [FLAGS...]

As run.py up to SFT. Then DPO of that one model, with several seeds (which draw the order of the
pairs) in each precision, all seeds at the same time, and everything that is measured of DPO.
The runs of one precision say how far apart chance alone puts them. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import run as whole
import table

from sevenfold.base import storage

PRECISIONS = ("bf16", "fp8")
STEPS = ("loss", "margin", "kl")
TITLES = {
    "validation_loss": "loss of the pairs held out",
    "loss": "logged steps: loss",
    "margin": "logged steps: margin of the rewards",
    "kl": "logged steps: divergence, nats a token",
    **{name: title for name, title in table.METRICS.items() if "merge" not in name},
}


def main() -> None:
    """Train SFT, then all others at the same time; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "folder"):
        parser.add_argument(name)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--precision", action="append", help="default: bf16 and fp8")
    parser.add_argument("--only", type=int, help="this seed, in FOLDER as it is")
    options, flags = parser.parse_known_args()
    precisions = options.precision or PRECISIONS
    if options.only is not None:
        for precision in precisions:
            train(Path(options.folder), precision, options.only, flags)
        return
    program = [sys.executable, str(Path(__file__).resolve()), options.model, options.data, "."]
    program += [part for precision in precisions for part in ("--precision", precision)] + flags
    whole.begin(options.model, options.data, options.folder, flags)
    running = [subprocess.Popen([*program, "--only", str(seed)]) for seed in range(options.seeds)]
    if any([each.wait() for each in running]):
        sys.exit("a run has failed; call again to go on")
    found = {
        precision: [measured(folder(Path(), precision, seed)) for seed in range(options.seeds)]
        for precision in precisions
    }
    sys.stdout.write(compared(found))


def folder(where: Path, precision: str, seed: int) -> Path:
    """Return where a run is kept."""
    return where / f"{precision}-{seed}"


def train(where: Path, precision: str, seed: int, flags: list[str]) -> None:
    """Train DPO from the SFT model that all share, and measure it."""
    target = folder(where, precision, seed)
    if not target.exists():
        begun = target.with_suffix(".begun")
        shutil.copytree(where / "run", begun, dirs_exist_ok=True)
        begun.rename(target)
    changed = ["--set", f"seed={seed}", "--set", f"dpo.train.precision={precision}"]
    told = ["--run", str(target), *flags, *changed]
    whole.do("dpo", *whole.TRAINING, *told)
    whole.do("evaluate", "dpo", *told)


def measured(run: Path) -> dict[str, float]:
    """Return what is known of a run's DPO: by its steps and by its evaluation."""
    lines = (run / "dpo" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    steps = [json.loads(line) for line in lines if line]
    means = {name: statistics.mean(step[name] for step in steps) for name in STEPS}
    last = storage.read_json(run / "dpo" / "record.json")["metrics"]
    facts: dict[str, Any] = storage.read_json(run / "dpo" / "evaluation.json")["metrics"]
    values = {name: each["value"] for name, each in facts.items()}
    return {name: value for name, value in {**last, **means, **values}.items() if name in TITLES}


def compared(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the table: of each precision the mean and all values."""
    lines = [f"| | {' | '.join(found)} |\n", f"| --- |{' --- |' * len(found)}\n"]
    for name, title in TITLES.items():
        cells = []
        for runs in found.values():
            values = [each[name] for each in runs if each.get(name) is not None]
            every = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"**{statistics.mean(values):.3f}** ({every})" if values else "")
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
