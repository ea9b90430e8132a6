"""A gate answers pass, fail or inconclusive; only pass promotes.

Judged are the per-item results, not the summary beside them: value and interval are computed here
again at the gate file's confidence, and must agree with what ``evaluation.json`` says. Every check
of a stage has to pass, so adding checks can only lower the chance of a false promotion; it needs
no correction for their number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from sevenfold.base.config import Document, build, configuration, read_yaml
from sevenfold.base.errors import UsageError, nearest
from sevenfold.base.records import GATED_STAGES
from sevenfold.verify.statistics import (
    Estimate,
    Kind,
    estimate,
    metric_seed,
    paired_loss,
    samples_needed,
)

Result = Literal["pass", "fail", "inconclusive"]
_AGREEMENT = 1e-9


@configuration
class Check:
    """One line of a gate: a metric, one threshold, and the least number of samples.

    ``min`` and ``max`` bound the metric itself. ``not_worse_than`` names an earlier stage, and
    ``margin`` how much worse than it the metric may be, in the metric's own unit.
    """

    metric: str
    min_samples: int
    min: float | None = None
    max: float | None = None
    not_worse_than: Literal["pretrain", "sft", "dpo"] | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        """Refuse a line that says nothing, or two things at once."""
        bounds = [value for value in (self.min, self.max, self.not_worse_than) if value is not None]
        if len(bounds) != 1:
            raise ValueError("write exactly one of min, max and not_worse_than")
        if (self.margin is None) != (self.not_worse_than is None):
            raise ValueError("not_worse_than and margin belong together")
        if self.margin is not None and self.margin < 0:
            raise ValueError("margin must not be below 0")
        if self.min_samples < 1:
            raise ValueError("min_samples must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Gates:
    """A gate file: ``sections[preset][stage]`` are the checks of a stage."""

    path: str
    confidence: float
    sections: Mapping[str, Mapping[str, tuple[Check, ...]]]

    def checks(self, preset: str, stage: str) -> tuple[Check, ...]:
        """Return the checks of a stage.

        Errors:
            UsageError: the file has no such section; a gate without checks promotes nothing.
        """
        if preset not in self.sections:
            raise UsageError(f"{self.path}: no section '{preset}'{nearest(preset, self.sections)}")
        if stage not in self.sections[preset]:
            raise UsageError(
                f"{self.path}: section '{preset}' has no checks for stage '{stage}'; "
                "write at least one"
            )
        return self.sections[preset][stage]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured of one model: evaluation.json and its per-item results.

    ``problem`` says why nothing of it may be used; ``stale_tasks`` why the results of a task may
    not.
    """

    evaluation: Mapping[str, Any] = field(default_factory=dict)
    items: Sequence[Mapping[str, Any]] = ()
    problem: str | None = None
    stale_tasks: Mapping[str, str] = field(default_factory=dict)


def read_gates(path: Path) -> Gates:
    """Read a gate file strictly.

    Errors:
        UsageError: anything but ``confidence`` and ``<preset>.<stage>`` lists of checks, as
            ``file:line:field: what, and what was expected``.
    """
    values = read_yaml(path)
    confidence = values.get("confidence")
    if not isinstance(confidence, int | float) or not 0.5 <= confidence < 1:
        line = values.lines.get(("confidence",), 1)
        raise UsageError(
            f"{path}:{line}:confidence: found {confidence}; expected a number from 0.5 to below 1"
        )
    sections = {
        preset: _read_section(values, preset) for preset in values if preset != "confidence"
    }
    if not sections:
        raise UsageError(f"{path}: no section; expected <preset>: <stage>: - metric: ...")
    return Gates(path=str(path), confidence=float(confidence), sections=sections)


def _read_section(values: Document, preset: str) -> dict[str, tuple[Check, ...]]:
    where = f"{values.path}:{values.lines.get((preset,), 1)}:{preset}"
    section = values[preset]
    if not isinstance(section, dict) or not section:
        raise UsageError(f"{where}: expected a mapping of stages to lists of checks")
    checks = {}
    for stage, entries in section.items():
        where = f"{values.path}:{values.lines.get((preset, stage), 1)}:{preset}.{stage}"
        if stage not in GATED_STAGES:
            raise UsageError(f"{where}: no such stage{nearest(str(stage), GATED_STAGES)}")
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"{where}: expected a list of checks; an empty gate checks nothing")
        checks[stage] = tuple(
            _read_check(values, (preset, stage, index)) for index in range(len(entries))
        )
        for check in checks[stage]:
            earlier = check.not_worse_than
            if earlier and GATED_STAGES.index(earlier) >= GATED_STAGES.index(stage):
                raise UsageError(f"{where}: '{earlier}' is not a stage before '{stage}'")
    return checks


def _read_check(values: Document, location: tuple[Any, ...]) -> Check:
    preset, stage, index = location
    entry, line = values[preset][stage][index], values.lines.get(location, 1)
    if not isinstance(entry, dict):
        name = f"{preset}.{stage}.{index}"
        raise UsageError(f"{values.path}:{line}:{name}: expected '- metric: NAME' and its bounds")
    depth = len(location)
    lines = {at[depth:]: n for at, n in values.lines.items() if at[:depth] == location}
    return build(Check, Document(entry, values.path, lines))


def check_names(gates: Gates, known_metrics: Mapping[str, Mapping[str, Collection[str]]]) -> None:
    """Refuse a metric that its preset and stage do not measure, in every section of the file.

    ``known_metrics[preset][stage]`` are the names; it must know every section.

    Errors:
        UsageError: an unknown name, with the nearest known ones; a section nobody knows.
    """
    for preset, section in gates.sections.items():
        if preset not in known_metrics:
            raise UsageError(
                f"{gates.path}: section '{preset}' belongs to no preset"
                f"{nearest(preset, known_metrics)}"
            )
        for stage, checks in section.items():
            for check in checks:
                for at in filter(None, (stage, check.not_worse_than)):
                    names = known_metrics[preset].get(at, ())
                    if check.metric not in names:
                        raise UsageError(
                            f"{gates.path}: {preset}.{stage}: metric '{check.metric}' is not "
                            f"measured at stage {at}{nearest(check.metric, names)}"
                        )


def judge(
    checks: Sequence[Check],
    *,
    stage: str,
    confidence: float,
    fingerprint: str,
    evidence: Evidence,
    earlier: Mapping[str, Evidence],
    decontamination: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the verdict on the model ``fingerprint``; the same input gives the same bytes.

    ``evidence``, ``earlier`` (by stage) and ``decontamination`` carry their own problems; each is
    a refusal here.
    """
    outcomes = [_judge_check(check, confidence, fingerprint, evidence, earlier) for check in checks]
    passed = bool(outcomes) and all(outcome["result"] == "pass" for outcome in outcomes)
    return {
        "stage": stage,
        "promoted": passed and decontamination["problem"] is None,
        "fingerprint": fingerprint,
        "confidence": confidence,
        "decontamination": dict(decontamination),
        "checks": outcomes,
    }


class _RefusedError(Exception):
    """The evidence for one check cannot be used; the message says why."""


def _judge_check(
    check: Check,
    confidence: float,
    fingerprint: str,
    evidence: Evidence,
    earlier: Mapping[str, Evidence],
) -> dict[str, Any]:
    outcome = {
        "metric": check.metric,
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "threshold": next(v for v in (check.min, check.max, check.margin) if v is not None),
        "direction": _direction(check),
        "result": "fail",
        "why": "",
    }
    try:
        if not evidence.problem and evidence.evaluation.get("fingerprint") != fingerprint:
            raise _RefusedError("foreign evidence: it was measured on another model")
        facts = _facts(check.metric, evidence)
        measured = _measure(check.metric, facts, evidence, confidence)
        if check.not_worse_than:
            before = earlier.get(check.not_worse_than) or Evidence(problem="not measured")
            measured = _compare(check, facts, evidence, before, confidence)
    except _RefusedError as refusal:
        return {**outcome, "why": str(refusal)}
    result, why = _decide(check, cast(Kind, facts["kind"]), measured, confidence)
    return {**outcome, **dataclasses.asdict(measured), "result": result, "why": why}


def _direction(check: Check) -> str:
    if check.not_worse_than:
        return f"not_worse_than {check.not_worse_than}: the loss may be at most the margin"
    return "min" if check.min is not None else "max"


def _facts(metric: str, evidence: Evidence) -> Mapping[str, Any]:
    """Return what evaluation.json says of a metric, if it is fit to be judged."""
    if evidence.problem:
        raise _RefusedError(evidence.problem)
    metrics = evidence.evaluation.get("metrics")
    facts = metrics.get(metric) if isinstance(metrics, dict) else None
    if not isinstance(facts, dict):
        raise _RefusedError("missing: evaluation.json does not hold this metric")
    if facts.get("kind") not in get_args(Kind):
        raise _RefusedError(f"its kind {facts.get('kind')!r} is none that a gate can judge")
    value = facts.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _RefusedError(f"its value is {value!r}, not a number")
    if not math.isfinite(value):
        raise _RefusedError(f"its value is {value}, not a finite number")
    if facts.get("task") in evidence.stale_tasks:
        raise _RefusedError(evidence.stale_tasks[facts["task"]])
    return facts


def _measure(
    metric: str, facts: Mapping[str, Any], evidence: Evidence, confidence: float
) -> Estimate:
    """Compute the metric again from the items, and hold it against evaluation.json."""
    value, n = float(facts["value"]), facts.get("n")
    if facts["kind"] == "measured":
        if not isinstance(n, int) or n < 1:
            raise _RefusedError(f"its number of samples is {n!r}")
        return Estimate(value=value, low=value, high=value, n=n)
    scores = list(_scores(metric, evidence).values())
    try:
        again = estimate(facts["kind"], scores, confidence=confidence, seed=metric_seed(metric))
    except (ValueError, TypeError, IndexError) as error:
        raise _RefusedError(f"its items cannot be summed: {error}") from None
    if again.value is None:
        raise _RefusedError("an item has no finite score")
    if again.n != n or abs(again.value - value) > _AGREEMENT * max(1.0, abs(value)):
        raise _RefusedError(
            f"evaluation.json says {value:g} from {n}, its items say {again.value:g} from {again.n}"
        )
    return again


def _compare(
    check: Check,
    facts: Mapping[str, Any],
    evidence: Evidence,
    before: Evidence,
    confidence: float,
) -> Estimate:
    """Estimate the loss against an earlier stage on the same items."""
    try:
        earlier_facts = _facts(check.metric, before)
    except _RefusedError as refusal:
        raise _RefusedError(f"{check.not_worse_than}: {refusal}") from None
    if facts.get("better") not in ("higher", "lower"):
        raise _RefusedError("evaluation.json does not say whether higher or lower is better")
    task = facts.get("task")
    hashes = [e.evaluation.get("data", {}).get(task) for e in (evidence, before)]
    now, then = _scores(check.metric, evidence), _scores(check.metric, before)
    if hashes[0] != hashes[1] or list(now) != list(then) or facts["kind"] != earlier_facts["kind"]:
        raise _RefusedError(f"{check.not_worse_than} was measured on other items of {task}")
    measured = paired_loss(
        facts["kind"],
        list(now.values()),
        list(then.values()),
        higher_is_better=facts["better"] == "higher",
        confidence=confidence,
        seed=metric_seed(check.metric),
    )
    if measured.value is None:
        raise _RefusedError("an item has no finite score")
    return measured


def _scores(metric: str, evidence: Evidence) -> dict[tuple[str, str], list[float]]:
    """Return the scores of the items that count for a metric, by task and id."""
    scores: dict[tuple[str, str], list[float]] = {}
    for item in evidence.items:
        score = item.get("scores", {}).get(metric, ())
        if score == ():
            continue
        key = (str(item.get("task")), str(item.get("id")))
        if key in scores:
            raise _RefusedError(f"item {key[1]} of {key[0]} stands twice")
        parts = score if isinstance(score, list) else [score]
        scores[key] = [math.nan if part is None else part for part in parts]
    if not scores:
        raise _RefusedError("missing: no item holds a score for it")
    return scores


def _decide(check: Check, kind: Kind, measured: Estimate, confidence: float) -> tuple[Result, str]:
    """Hold the interval against the threshold: pass and fail both need all of it on one side."""
    low, high, n = measured.low, measured.high, measured.n
    if n < check.min_samples:
        return "inconclusive", f"{n} samples; this check needs at least {check.min_samples}"
    if low is None or high is None:
        return "inconclusive", f"{n} samples give no interval"
    if check.min is not None:
        passes, fails, threshold = low >= check.min, high < check.min, check.min
    else:
        threshold = cast(float, check.max if check.max is not None else check.margin)
        passes, fails = high <= threshold, low > threshold
    interval = f"the interval {low:.4g} to {high:.4g}"
    if passes:
        return "pass", f"{interval} is on the right side of {threshold:g}"
    if fails:
        return "fail", f"{interval} is on the wrong side of {threshold:g}"
    sampled: Kind = "mean" if check.not_worse_than else kind
    needed = samples_needed(sampled, measured, threshold, confidence=confidence)
    if needed is None:
        return "inconclusive", f"{interval} contains {threshold:g}; no number of samples decides"
    return (
        "inconclusive",
        f"{interval} contains {threshold:g}; about {max(needed, n + 1):,} samples would decide "
        "if the value stays",
    )
