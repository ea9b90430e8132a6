"""A judge model's opinion of a stage's answers, ``judge.json``: beside the evidence, not in it.

No gate reads it. It says of which bytes it speaks, and ``record.json`` holds its SHA-256.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import to_plain
from sevenfold.base.console import print_table, working
from sevenfold.base.records import Run
from sevenfold.verify.config import EvaluateConfig, JudgeConfig
from sevenfold.verify.judge import (
    ITEMS,
    JUDGED,
    SHA256,
    judge_answers,
    problems,
    read_judged,
    read_key,
)
from sevenfold.verify.safety import is_refusal
from sevenfold.verify.statistics import estimate

log = logging.getLogger(__name__)


def require_key(config: EvaluateConfig) -> None:
    """Check, before anything is measured, that the judge's key is there.

    Errors:
        UsageError: it is not.
    """
    if config.judge is not None:
        read_key(config.judge)


def judge_stage(run: Run, config: EvaluateConfig, stage: str) -> None:
    """Ask the judge about the answers that ``stage`` gave to safety tasks, and write what it said.

    Nothing is asked again where answers and judge are the same and the judge was heard to the end.
    """
    names = [task.name for task in config.tasks_of(stage) if task.kind == "safety"]
    if config.judge is None or not names:
        return
    key = read_key(config.judge)
    path = run.stage(stage) / ITEMS
    of = {"items_sha256": storage.sha256_file(path), "judge": _described(config.judge)}
    known = read_judged(run, stage)
    if known is not None and of.items() <= known.items() and not known["problems"]:
        return
    items = [json.loads(line) for line in path.read_bytes().splitlines()]
    items = [item for item in items if item["task"] in names]
    with working(f"{stage}: {config.judge.model} judges {len(items)} answers"):
        judged = judge_answers(config.judge, [item["answer"] for item in items], key)
    found = {
        **of,
        "instruction_sees": "the answer alone",
        "num_asked": len(items),
        "problems": problems(judged),
        "tasks": {name: _summary(name, items, judged, config) for name in names},
        "verdicts": [
            {"task": item["task"], "id": item["id"], "refuses": said}
            for item, said in zip(items, judged, strict=True)
        ],
    }
    storage.write_json(run.stage(stage) / JUDGED, found)
    record = run.record(stage)
    evidence = record.get("evidence", {})
    evidence = {**evidence, SHA256: storage.sha256_file(run.stage(stage) / JUDGED)}
    run.write_record(stage, {**record, "evidence": evidence})
    _show(stage, config.judge, found)


def _described(config: JudgeConfig) -> dict[str, Any]:
    """Return which judge it is: what decides its opinion, and no key."""
    plain = to_plain(config)
    return {name: plain[name] for name in ("address", "model")}


def _summary(
    name: str,
    items: Sequence[Mapping[str, Any]],
    judged: Sequence[bool | str],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Return the rates that the judge sees, and how often it agrees with our detector."""
    pairs = [
        (item, said)
        for item, said in zip(items, judged, strict=True)
        if item["task"] == name and isinstance(said, bool)
    ]
    given = {
        "refusal_rate": [[float(said)] for item, said in pairs if item["unsafe"]],
        "over_refusal_rate": [[float(said)] for item, said in pairs if not item["unsafe"]],
        "agreement": [[float(said == is_refusal(item["answer"]))] for item, said in pairs],
    }
    summary = {}
    for metric, scores in given.items():
        if scores:
            found = estimate("proportion", scores, confidence=config.confidence, seed=config.seed)
            numbers = {"value": found.value, "low": found.low, "high": found.high}
            summary[metric] = {**numbers, "n": len(scores)}
    return summary


def _show(stage: str, judge: JudgeConfig, found: Mapping[str, Any]) -> None:
    columns = ("task", "metric", "value", "low", "high", "n")
    rows = [
        [task, metric, *(numbers[column] for column in columns[2:])]
        for task, metrics in found["tasks"].items()
        for metric, numbers in metrics.items()
    ]
    print_table(f"{stage}: judged by {judge.model}; no gate reads this", columns, rows)
    if found["problems"]:
        told = ", ".join(f"{kind}: {number}" for kind, number in found["problems"].items())
        log.warning(
            "the judge %s gave no opinion of %d of %d answers (%s); the evaluation stands",
            judge.model,
            sum(found["problems"].values()),
            found["num_asked"],
            told,
        )
