"""Where a stage stands: what its verdict says, and whether that verdict still counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sevenfold.base import storage
from sevenfold.base.records import STAGES, Run
from sevenfold.verify import charts, intervals, lineage, report_text


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One word on a stage (pass, fail, inconclusive, not judged, ...), and why."""

    word: str
    why: str = ""
    forced: str = ""

    @property
    def symbol(self) -> str:
        """Name of the template's symbol for the word."""
        known = ("pass", "fail", "inconclusive", "built", "unfinished")
        return self.word if self.word in known else "none"


def judge(
    run: Run, stage: str, *, record: Mapping[str, Any], verdict: Mapping[str, Any], started: bool
) -> Standing:
    """Say where ``stage`` stands; ``started`` means that it has metrics.

    A verdict on other bytes, or one that was edited, does not count as one.
    """
    if not record:
        word = "unfinished" if started else "not run"
        return Standing(word=word, why="stopped before its end" if started else "")
    if stage == STAGES[0]:
        return Standing(word="built", why="has no gate")
    forced = _forced_past(run, stage)
    if not verdict:
        return Standing(word="not judged", why="there is no verdict", forced=forced)
    doubt = _doubt(run, stage, record, verdict)
    if doubt:
        return Standing(word="not judged", why=doubt, forced=forced)
    results = [
        str(check.get("result")) for check in verdict.get("checks") or () if check is not None
    ]
    passed = sum(result == "pass" for result in results)
    told = f"{passed} of {len(results)} checks pass"
    if verdict.get("promoted") is True:
        return Standing(word="pass", why=told)
    searched = verdict.get("decontamination")
    if isinstance(searched, Mapping) and searched.get("problem"):
        return Standing(word="fail", why=f"{told}; {searched['problem']}", forced=forced)
    word = "fail" if "fail" in results or "inconclusive" not in results else "inconclusive"
    return Standing(word=word, why=told, forced=forced)


def _doubt(run: Run, stage: str, record: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    manifest = lineage.read_manifest_if_there(run.model(stage))
    if manifest is None:
        return "the judged model is no longer there"
    if verdict.get("fingerprint") != manifest["fingerprint"]:
        return "the verdict is about another model"
    evidence = record.get("evidence")
    evidence = evidence if isinstance(evidence, Mapping) else {}
    if evidence.get("verdict_sha256") != storage.sha256_file(run.stage(stage) / "verdict.json"):
        return "the verdict was changed after the gate wrote it"
    return ""


def _forced_past(run: Run, stage: str) -> str:
    """Return the reason with which the gate of ``stage`` was gone past, if it was."""
    own = lineage.read_record_if_there(run, stage)
    if own and own.get("forced_past"):
        return str(own["forced_past"])
    for following in STAGES[STAGES.index(stage) + 1 :]:
        record = lineage.read_record_if_there(run, following)
        if record:
            return str(record.get("forced") or "")
    return ""


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one check of a verdict as the report shows it, with its drawing if it has numbers."""
    value, low, high, threshold = (
        charts.finite(values.get(key)) for key in ("value", "low", "high", "threshold")
    )
    direction = str(values.get("direction", ""))
    # A comparison's value is the loss against that stage: more is worse, 0 is no change.
    compared = direction.removeprefix("not_worse_than").split(":")[0].strip()
    compared = compared if direction.startswith("not_worse_than") else ""
    at_least = direction == "min"
    drawing = None
    if value is not None and low is not None and high is not None and threshold is not None:
        drawing = intervals.draw_interval(
            value=value,
            low=low,
            high=high,
            threshold=threshold,
            at_least=at_least,
            include_zero=bool(compared),
            write=report_text.plain,
        )
    result = str(values.get("result", "none"))
    return {
        "metric": str(values.get("metric", "")),
        "value": value,
        "low": low,
        "high": high,
        "n": charts.finite(values.get("n")),
        "bound": threshold,
        "sign": "≥" if at_least else "≤",
        "compared": f"loss against {compared}" if compared else "",
        "result": result,
        "symbol": result if result in ("pass", "fail", "inconclusive") else "none",
        "why": str(values.get("why") or ""),
        "drawing": drawing,
    }
