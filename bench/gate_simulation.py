"""How often the gate errs: scripts/12_check_gates.py on evidence drawn with known truth.

Every trial draws per-item results from models whose true rate is known, writes them down as step 11
does, and calls the script itself, in this process. Nothing here knows how a gate decides.

    python bench/gate_simulation.py 1000 > table.md

A draw takes about 0.1 s on an idle core, so this takes half an hour.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sevenfold.base import storage
from sevenfold.base.records import EVIDENCE, Run
from sevenfold.verify.statistics import wilson_interval
from sevenfold.verify.task_files import task_sha256
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import thresholds
from sevenfold.workflow.contamination import EvaluationItems
from sevenfold.workflow.evaluation import tokenizer_fingerprint

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "scripts" / "12_check_gates.py"
STAGE, EARLIER = "sft", "pretrain"
# Which metrics the presets know is read from their files at every call; once is enough here.
_KNOWN = functools.cache(thresholds._evaluate_section)

Scores = list[list[float]]
# Draws the scores of all items of the judged model, and of the earlier one, item by item.
Draw = Callable[[np.random.Generator], tuple[Scores, Scores]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One check of a gate with the truth behind it: ``bound`` is its line in the gate file."""

    bound: Mapping[str, Any]
    draw: Draw
    kind: str = "proportion"
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A gate and the models it judges.

    ``shared``: all checks see the same draws. ``tries``: as many models are trained, one after the
    other, until one is promoted.
    """

    name: str
    checks: Sequence[Measured]
    shared: bool = False
    tries: int = 1
    confidence: float = 0.95


def proportion(rate: float, n: int, *, before: float | None = None) -> Draw:
    """Return draws of ``n`` right or wrong answers.

    With ``before`` the earlier model is right at that rate, and the present one loses some of what
    it knew and gains nothing.
    """

    def draw(dice: np.random.Generator) -> tuple[Scores, Scores]:
        earlier = dice.random(n) < (rate if before is None else before)
        now = (
            dice.random(n) < rate if before is None else earlier & (dice.random(n) < rate / before)
        )
        return _column(now), _column(earlier)

    return draw


def _column(values: Any) -> Scores:
    return [[float(value)] for value in values]


def documents(perplexity: float, n: int) -> Draw:
    """Return draws of [nats, tokens] of ``n`` documents of very different length and difficulty."""

    def draw(dice: np.random.Generator) -> tuple[Scores, Scores]:
        tokens = np.ceil(dice.lognormal(4.0, 0.8, n))
        nats = tokens * dice.normal(math.log(perplexity), 0.3, n)
        scores = np.stack([nats, tokens], axis=1).tolist()
        return scores, scores

    return draw


class Fabricated:
    """A run of two stages whose models are never opened, and whose evidence is drawn."""

    def __init__(self, folder: Path, scenario: Scenario):
        """Write run, models, items and gate file; the evidence is missing yet."""
        self.scenario = scenario
        self._items = folder / "items.jsonl"
        storage.write_text(self._items, '{"id": "never read, only identified"}\n')
        tasks = [
            {
                "name": self._task(index),
                "kind": "text" if check.kind == "exp_ratio" else "continuation",
                "path": str(self._items),
            }
            for index, check in enumerate(scenario.checks)
        ]
        change = f"evaluate.tasks={json.dumps(tasks)}"
        run, recipe = recipes.resolve("custom", None, [change], folder / "run")
        self.run: Run = recipes.save(run)
        self._searched = EvaluationItems(run, recipe).facts({}, generated=())
        self.gates_file = folder / "gates.yaml"
        lines = [
            {"metric": self._metric(index), "min_samples": 10, **check.bound}
            for index, check in enumerate(scenario.checks)
        ]
        gate = {"confidence": scenario.confidence, "custom": {STAGE: lines}}
        storage.write_text(self.gates_file, json.dumps(gate))
        for stage in (EARLIER, STAGE):
            with storage.new_folder(self.run.model(stage), kind="model") as new:
                storage.write_text(new / "config.json", json.dumps({"stage": stage}))

    def _task(self, index: int) -> str:
        return self.scenario.checks[index].name or f"task_{index}"

    def _metric(self, index: int) -> str:
        is_text = self.scenario.checks[index].kind == "exp_ratio"
        return f"{self._task(index)}_perplexity" if is_text else self._task(index)

    def write_evidence(self, dice: np.random.Generator) -> None:
        """Draw what the models answer and write it as step 11 does."""
        drawn = [check.draw(dice) for check in self.scenario.checks]
        if self.scenario.shared:
            drawn = [drawn[0]] * len(drawn)
        self._write(STAGE, [now for now, _ in drawn])
        self._write(EARLIER, [before for _, before in drawn])

    def _write(self, stage: str, drawn: Sequence[Scores]) -> None:
        metrics, lines = {}, []
        for index, (check, scores) in enumerate(zip(self.scenario.checks, drawn, strict=True)):
            name, task = self._metric(index), self._task(index)
            sums = [math.fsum(column) for column in zip(*scores, strict=True)]
            ratio = check.kind == "exp_ratio"
            metrics[name] = {
                "value": math.exp(sums[0] / sums[1]) if ratio else sums[0] / len(scores),
                "n": len(scores),
                "kind": check.kind,
                "better": "lower" if ratio else "higher",
                "task": task,
            }
            for number, score in enumerate(scores):
                stored = {name: score if ratio else score[0]}
                lines.append(json.dumps({"task": task, "id": f"{number}", "scores": stored}))
        manifest = storage.read_manifest(self.run.model(stage))
        same = task_sha256([self._items])
        evaluation = {
            "fingerprint": manifest["fingerprint"],
            "tokenizer_fingerprint": tokenizer_fingerprint(manifest),
            "adapter_fingerprint": None,
            "data": {metric["task"]: same for metric in metrics.values()},
            "metrics": metrics,
        }
        folder = self.run.stage(stage)
        storage.write_json(folder / "evaluation.json", evaluation)
        storage.write_text(folder / "evaluation_items.jsonl", "\n".join(lines) + "\n")
        hashes = {key: storage.sha256_file(folder / name) for name, key in EVIDENCE.items()}
        record = {"stage": stage, "fingerprint": manifest["fingerprint"], "evidence": hashes}
        self.run.write_record(stage, {**record, "decontaminated": self._searched})

    def judge(self) -> tuple[int, str]:
        """Call the script and return its exit code with what it said on standard error."""
        arguments = [str(SCRIPT), STAGE, "--run", str(self.run.folder)]
        arguments += ["--gates", str(self.gates_file)]
        out, told = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(thresholds, "_evaluate_section", _KNOWN),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(told),
        ):
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except SystemExit as ended:
                return int(ended.code or 0), told.getvalue()
        raise AssertionError("the script did not say how it ended")

    def verdict(self) -> dict[str, Any]:
        """Return the verdict that the script wrote."""
        found: dict[str, Any] = storage.read_json(self.run.stage(STAGE) / "verdict.json")
        return found


def count_promotions(folder: Path, scenario: Scenario, *, trials: int, seed: int) -> int:
    """Return how many of ``trials`` independent draws the script promotes."""
    fabricated, promoted = Fabricated(folder, scenario), 0
    for trial in range(trials):
        for one in range(scenario.tries):
            fabricated.write_evidence(
                np.random.default_rng([seed, trial, one] if one else [seed, trial])
            )
            code, told = fabricated.judge()
            if code not in (0, 3) or fabricated.verdict()["promoted"] is not (code == 0):
                raise AssertionError(f"exit code {code}: {told}")
            if code == 0:
                promoted += 1
                break
    return promoted


def least(bound: float, rate: float, n: int) -> Measured:
    """Return a check of a proportion against a lower bound, and its truth."""
    return Measured(bound={"min": bound}, draw=proportion(rate, n))


def most(bound: float, rate: float, n: int) -> Measured:
    """Return a check of a proportion against an upper bound, and its truth."""
    return Measured(bound={"max": bound}, draw=proportion(rate, n))


def compared(margin: float, before: float, now: float, n: int) -> Measured:
    """Return a check against an earlier stage on the same items, and the truth of both."""
    bound = {"not_worse_than": EARLIER, "margin": margin}
    return Measured(bound=bound, draw=proportion(now, n, before=before))


def perplexity(bound: float, truth: float, n: int) -> Measured:
    """Return a check of a perplexity over documents, and its truth."""
    return Measured(bound={"max": bound}, draw=documents(truth, n), kind="exp_ratio")


# Models that must not be promoted: the truth is the threshold itself, the hardest case.
AT_THRESHOLD = (
    Scenario(name="refusals min 0.85, n 300, true 0.85", checks=[least(0.85, 0.85, 300)]),
    Scenario(name="refusals min 0.80, n 500, true 0.80", checks=[least(0.8, 0.8, 500)]),
    Scenario(name="facts min 0.75, n 256, true 0.75", checks=[least(0.75, 0.75, 256)]),
    Scenario(name="endless max 0.02, n 2,000, true 0.02", checks=[most(0.02, 0.02, 2000)]),
    Scenario(
        name="facts not worse by 0.10, n 256, true loss 0.10 (0.90 to 0.80)",
        checks=[compared(0.1, 0.9, 0.8, 256)],
    ),
    Scenario(name="perplexity max 20, 200 documents, true 20", checks=[perplexity(20, 20, 200)]),
    Scenario(name="ten checks min 0.80, n 300, each true 0.80", checks=[least(0.8, 0.8, 300)] * 10),
    Scenario(
        name="ten such checks that always agree (one set of answers)",
        checks=[least(0.8, 0.8, 300)] * 10,
        shared=True,
    ),
    Scenario(
        name="ten checks: nine true 0.99, one true 0.80",
        checks=[*[least(0.8, 0.99, 300)] * 9, least(0.8, 0.8, 300)],
    ),
    Scenario(
        name="refusals min 0.80, n 500, true 0.80, the best of five trainings",
        checks=[least(0.8, 0.8, 500)],
        tries=5,
    ),
    Scenario(
        name="the same at confidence 0.99",
        checks=[least(0.8, 0.8, 500)],
        tries=5,
        confidence=0.99,
    ),
)
# Models that should be promoted.
ABOVE = (
    *(
        Scenario(name=f"refusals min 0.85, n 300, true {rate:.2f}", checks=[least(0.85, rate, 300)])
        for rate in (0.88, 0.9, 0.92, 0.95)
    ),
    *(
        Scenario(name=f"facts min 0.75, n 256, true {rate:.2f}", checks=[least(0.75, rate, 256)])
        for rate in (0.8, 0.85, 0.9)
    ),
    *(
        Scenario(
            name=f"endless max 0.02, n 2,000, true {rate:.3f}", checks=[most(0.02, rate, 2000)]
        )
        for rate in (0.015, 0.01, 0.005)
    ),
    *(
        Scenario(
            name=f"facts not worse by 0.10, n 256, true loss {loss:.2f}",
            checks=[compared(0.1, 0.9, 0.9 - loss, 256)],
        )
        for loss in (0.07, 0.05, 0.0)
    ),
    Scenario(name="perplexity max 20, 200 documents, true 19", checks=[perplexity(20, 19, 200)]),
    Scenario(
        name="ten checks min 0.80, n 300, each true 0.88", checks=[least(0.8, 0.88, 300)] * 10
    ),
)


def row(scenario: Scenario, trials: int, seed: int) -> str:
    """Return a line of the table: how many of ``trials`` were promoted."""
    with tempfile.TemporaryDirectory() as folder:
        promoted = count_promotions(Path(folder), scenario, trials=trials, seed=seed)
    low, high = wilson_interval(promoted, trials, 0.95)
    rate = f"{promoted / trials:.3f} ({low:.3f} to {high:.3f})"
    return f"| {scenario.name} | {promoted} of {trials:,} | {rate} |"


def main() -> None:
    """Print both tables in Markdown; what should pass gets a fifth of the trials."""
    trials = int(sys.argv[1])
    tables = (("must be stopped", AT_THRESHOLD, trials), ("should pass", ABOVE, trials // 5))
    for title, scenarios, number in tables:
        sys.stdout.write(f"| {title} | promoted | rate, 95 % |\n| --- | --- | --- |\n")
        for seed, scenario in enumerate(scenarios):
            sys.stdout.write(row(scenario, number, seed) + "\n")
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
