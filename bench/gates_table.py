"""The demo's gates against models that must fail and models that must pass, as a table.

For every seed: the whole demo, then each stage judged with the untrained model, with the previous
stage's model, and (lora) with an adapter trained without replay in the trained model's place.

    python bench/gates_table.py runs/gates 201 202 203 > table.md

One seed takes about six minutes on two cores. Finished parts are kept, so it may be stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PREVIOUS = {"pretrain": "init", "sft": "pretrain", "dpo": "sft", "lora": "dpo"}
EVIDENCE = ("evaluation.json", "evaluation_items.jsonl", "verdict.json")


def sevenfold(*arguments: str | Path, allowed: tuple[int, ...] = (0,)) -> None:
    """Run one verb; its output goes to standard error."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "sevenfold.workflow.cli", *map(str, arguments)],
        stdout=sys.stderr,
        env=environment,
        check=False,
    )
    if done.returncode not in allowed:
        raise SystemExit(f"{arguments}: exit code {done.returncode}")


def put_in_place(run: Path, stage: str, model: Path) -> dict[str, Any]:
    """Judge ``stage`` of a copy of ``run`` with ``model`` in its model's place."""
    copy = run.parent / f"{run.name}-{stage}-{model.parent.name}"
    if not (copy / stage / "verdict.json").is_file():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        shutil.rmtree(copy / stage / "model")
        shutil.copytree(model, copy / stage / "model")
        for name in EVIDENCE:
            (copy / stage / name).unlink(missing_ok=True)
        judge(copy, stage)
    return verdict(copy, stage)


def judge(run: Path, stage: str) -> None:
    """Measure and judge ``stage``, whatever the answer."""
    sevenfold("evaluate", stage, "--run", run)
    sevenfold("check", stage, "--run", run, allowed=(0, 3))


def naive_adapter(run: Path) -> dict[str, Any]:
    """Judge an adapter that was trained on the new domain alone."""
    copy = run.parent / f"{run.name}-naive"
    if not (copy / "lora" / "verdict.json").is_file() or not (copy / "lora.old-1").is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        lines = (run / "data" / "raw" / "domain.jsonl").read_text(encoding="utf-8").split("\n")
        ships = [line for line in lines if line and json.loads(line)["kind"].startswith("ship")]
        path = run.parent / f"{run.name}-ships.jsonl"
        path.write_text("\n".join(ships) + "\n", encoding="utf-8")
        source = json.dumps([{"name": "ships", "path": str(path.resolve()), "licence": "CC0-1.0"}])
        sevenfold("prepare-sft", "--run", copy, "--set", f"lora.data.sources={source}")
        sevenfold("lora", "--run", copy, "--no-resume")
        judge(copy, "lora")
    return verdict(copy, "lora")


def verdict(run: Path, stage: str) -> dict[str, Any]:
    """Return a verdict."""
    found: dict[str, Any] = json.loads((run / stage / "verdict.json").read_text())
    return found


def measure(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Run and judge everything for one seed; return verdicts by stage and model."""
    run = folder / f"seed-{seed}"
    seeds = ["--set", f"seed={seed}", "--set", f"data.village.seed={seed}"]
    reason = ["--force", "measuring the gates themselves"]
    sevenfold("run", "--run", run, *seeds, "--set", "tracking=none", *reason)
    verdicts: dict[str, dict[str, Any]] = {}
    for stage, previous in PREVIOUS.items():
        verdicts[stage] = {
            "untrained": put_in_place(run, stage, run / "init" / "model"),
            "previous": put_in_place(run, stage, run / previous / "model"),
            "trained": verdict(run, stage),
        }
    verdicts["lora"]["without replay"] = naive_adapter(run)
    return verdicts


def table(found: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Return the table in Markdown: a row per check, the seeds' values in each cell."""
    lines = []
    for stage in PREVIOUS:
        models = list(next(iter(found.values()))[stage])
        lines += [f"### {stage}", "", "| metric | threshold | " + " | ".join(models) + " |"]
        lines.append("| --- | --- |" + " --- |" * len(models))
        checks = next(iter(found.values()))[stage]["trained"]["checks"]
        for index, check in enumerate(checks):
            cells = [
                ", ".join(_cell(found[seed][stage][model]["checks"][index]) for seed in found)
                for model in models
            ]
            limit = f"{check['direction'].partition(':')[0]} {check['threshold']:g}"
            lines.append(f"| {check['metric']} | {limit} | " + " | ".join(cells) + " |")
        promoted = [
            ", ".join("yes" if found[seed][stage][m]["promoted"] else "no" for seed in found)
            for m in models
        ]
        lines += ["| **promoted** | | " + " | ".join(promoted) + " |", ""]
    return "\n".join(lines)


def _cell(check: dict[str, Any]) -> str:
    value = "-" if check["value"] is None else f"{check['value']:.3g}"
    mark = {"pass": "", "fail": " ✗", "inconclusive": " ?"}[check["result"]]
    return value + mark


def main() -> None:
    """Measure all seeds, two at a time, and print the table."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(text) for text in sys.argv[2:]]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(seeds, pool.map(lambda seed: measure(folder, seed), seeds), strict=True))
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
