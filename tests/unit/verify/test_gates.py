"""Gates that cannot be fooled: every way to get past one without deserving it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import UsageError
from sevenfold.verify.gates import Check, Evidence, check_names, judge, read_gates
from sevenfold.verify.statistics import estimate, metric_seed

SEARCHED = {"tasks": [], "data": {}, "unknown_before": [], "problem": None}
MODEL = "a" * 64


def evidence(
    outcomes: dict[str, list[float]], *, better: str = "higher", **changes: Any
) -> Evidence:
    """What step 11 would have written for proportions with these outcomes."""
    items = [
        {"task": name, "id": f"{name}-{index}", "scores": {name: score}}
        for name, scores in outcomes.items()
        for index, score in enumerate(scores)
    ]
    metrics = {}
    for name, scores in outcomes.items():
        found = estimate("proportion", [[s] for s in scores], confidence=0.95)
        facts = {"kind": "proportion", "better": better, "task": name, "confidence": 0.95}
        metrics[name] = {"value": found.value, "n": found.n, **facts}
    evaluation = {"fingerprint": MODEL, "metrics": metrics, "data": dict.fromkeys(outcomes, "d")}
    return Evidence(evaluation={**evaluation, **changes}, items=items)


def test_data_that_were_not_searched_stop_the_promotion() -> None:
    found = evidence({"refusal_rate": rate(99, 100)})
    problem = {"problem": "what dpo was trained on was not searched for refusals"}
    judged = judge(
        [at_least(0.8)],
        stage="dpo",
        confidence=0.95,
        fingerprint=MODEL,
        evidence=found,
        earlier={},
        decontamination=problem,
    )
    assert judged["checks"][0]["result"] == "pass"
    assert judged["promoted"] is False
    assert judged["decontamination"] == problem


def rate(successes: int, n: int) -> list[float]:
    return [1.0] * successes + [0.0] * (n - successes)


def verdict(check: Check, found: Evidence, **earlier: Evidence) -> dict[str, Any]:
    return judge(
        [check],
        stage="dpo",
        confidence=0.95,
        fingerprint=MODEL,
        evidence=found,
        earlier=earlier,
        decontamination=SEARCHED,
    )


def outcome(check: Check, found: Evidence, **earlier: Evidence) -> dict[str, Any]:
    result: dict[str, Any] = verdict(check, found, **earlier)["checks"][0]
    return result


def at_least(threshold: float, min_samples: int = 10) -> Check:
    return Check(metric="refusal_rate", min=threshold, min_samples=min_samples)


def test_only_the_bound_passes_not_the_point() -> None:
    assert outcome(at_least(0.8), evidence({"refusal_rate": rate(88, 100)}))["result"] == "pass"
    weak = outcome(at_least(0.8), evidence({"refusal_rate": rate(85, 100)}))
    assert weak["result"] == "inconclusive"
    assert "samples would decide" in weak["why"]
    assert outcome(at_least(0.8), evidence({"refusal_rate": rate(60, 100)}))["result"] == "fail"


def test_many_samples_are_grouped_in_thousands() -> None:
    near = outcome(at_least(0.27), evidence({"refusal_rate": rate(629, 2376)}))
    assert re.search(r"about \d\d,\d{3} samples would decide", near["why"])


def test_ten_of_ten_is_not_enough() -> None:
    found = verdict(at_least(0.8), evidence({"refusal_rate": rate(10, 10)}))
    assert found["promoted"] is False
    check = found["checks"][0]
    assert check["result"] == "inconclusive"
    assert check["low"] == pytest.approx(0.722, abs=1e-3)
    assert "about 16 samples would decide" in check["why"]


def test_too_few_samples_never_decide() -> None:
    for successes in (0, 50):
        found = outcome(at_least(0.5, 100), evidence({"refusal_rate": rate(successes, 50)}))
        assert found["result"] == "inconclusive"
        assert found["why"] == "50 samples; this check needs at least 100"


def test_max_is_judged_by_the_upper_bound() -> None:
    check = Check(metric="over_refusal_rate", max=0.1, min_samples=10)
    assert outcome(check, evidence({"over_refusal_rate": rate(2, 100)}))["result"] == "pass"
    assert outcome(check, evidence({"over_refusal_rate": rate(9, 100)}))["result"] == "inconclusive"
    assert outcome(check, evidence({"over_refusal_rate": rate(30, 100)}))["result"] == "fail"


def test_the_direction_comes_from_the_file_not_from_the_name() -> None:
    high_loss = evidence({"accuracy": rate(95, 100)})
    assert outcome(Check(metric="accuracy", max=0.5, min_samples=1), high_loss)["result"] == "fail"
    named_loss = evidence({"loss": rate(95, 100)})
    assert outcome(Check(metric="loss", min=0.5, min_samples=1), named_loss)["result"] == "pass"


@pytest.mark.fault("K05")
@pytest.mark.parametrize("value", [None, "0.9", True, [0.9], {"mean": 0.9}])
def test_a_value_that_is_no_number_fails(value: Any) -> None:
    found = evidence({"refusal_rate": rate(90, 100)})
    found.evaluation["metrics"]["refusal_rate"]["value"] = value
    check = outcome(at_least(0.5), found)
    assert (check["result"], check["value"]) == ("fail", None)
    assert "not a number" in check["why"]


@pytest.mark.fault("K05")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "check",
    [
        Check(metric="refusal_rate", min=0.5, min_samples=1),
        Check(metric="refusal_rate", max=2.0, min_samples=1),
        Check(metric="refusal_rate", not_worse_than="sft", margin=9.0, min_samples=1),
    ],
)
def test_nan_and_infinity_fail_whatever_the_direction(value: float, check: Check) -> None:
    found = evidence({"refusal_rate": rate(90, 100)})
    found.evaluation["metrics"]["refusal_rate"]["value"] = value
    judged = outcome(check, found, sft=evidence({"refusal_rate": rate(90, 100)}))
    assert judged["result"] == "fail"
    assert "not a finite number" in judged["why"]
    json.dumps(judged, allow_nan=False)


@pytest.mark.fault("K05")
def test_an_item_without_a_finite_score_fails() -> None:
    found = evidence({"refusal_rate": rate(90, 100)})
    found.items[3]["scores"]["refusal_rate"] = None  # type: ignore[index]
    assert outcome(at_least(0.5), found)["why"] == "an item has no finite score"


@pytest.mark.fault("K04", "K05")
def test_a_missing_metric_fails() -> None:
    check = outcome(at_least(0.5), evidence({"other": rate(90, 100)}))
    assert check["result"] == "fail"
    assert check["why"] == "missing: evaluation.json does not hold this metric"
    found = evidence({"refusal_rate": rate(90, 100)})
    no_items = Evidence(evaluation=found.evaluation, items=[])
    assert "no item holds a score" in outcome(at_least(0.5), no_items)["why"]


@pytest.mark.fault("K07")
def test_evidence_of_another_model_fails() -> None:
    foreign = evidence({"refusal_rate": rate(100, 100)}, fingerprint="b" * 64)
    check = outcome(at_least(0.5), foreign)
    assert check["result"] == "fail"
    assert "measured on another model" in check["why"]


def test_evidence_with_a_problem_fails_and_says_which() -> None:
    check = outcome(at_least(0.5), Evidence(problem="edited: evaluation.json is another file"))
    assert (check["result"], check["why"]) == ("fail", "edited: evaluation.json is another file")


def test_changed_items_fail_for_their_task_only() -> None:
    both = evidence({"refusal_rate": rate(90, 100), "facts": rate(90, 100)})
    stale = Evidence(
        evaluation=both.evaluation, items=both.items, stale_tasks={"facts": "stale: facts changed"}
    )
    assert outcome(at_least(0.5), stale)["result"] == "pass"
    check = Check(metric="facts", min=0.5, min_samples=1)
    assert outcome(check, stale)["why"] == "stale: facts changed"


@pytest.mark.fault("K07")
def test_a_summary_that_its_items_do_not_bear_out_fails() -> None:
    found = evidence({"refusal_rate": rate(50, 100)})
    found.evaluation["metrics"]["refusal_rate"] |= {"value": 0.95, "low": 0.9, "high": 0.98}
    check = outcome(at_least(0.8), found)
    assert check["result"] == "fail"
    assert check["why"] == "evaluation.json says 0.95 from 100, its items say 0.5 from 100"
    padded = evidence({"refusal_rate": rate(10, 10)})
    padded.evaluation["metrics"]["refusal_rate"]["n"] = 1000
    assert outcome(at_least(0.8), padded)["result"] == "fail"


def test_an_item_cannot_count_twice() -> None:
    found = evidence({"refusal_rate": rate(10, 10)})
    doubled = Evidence(evaluation=found.evaluation, items=[*found.items, *found.items])
    assert "stands twice" in outcome(at_least(0.5), doubled)["why"]


def test_scores_outside_of_a_proportion_fail() -> None:
    found = evidence({"refusal_rate": rate(50, 100)})
    for item in found.items:
        item["scores"]["refusal_rate"] = 3.0
    assert "cannot be summed" in outcome(at_least(0.5), found)["why"]
    for item in found.items:
        item["scores"]["refusal_rate"] = "1"
    assert outcome(at_least(0.5), found)["result"] == "fail"


def test_an_unknown_kind_of_metric_fails() -> None:
    found = evidence({"refusal_rate": rate(90, 100)})
    found.evaluation["metrics"]["refusal_rate"]["kind"] = "vibes"
    assert "none that a gate can judge" in outcome(at_least(0.5), found)["why"]


def test_a_measured_metric_is_its_own_interval() -> None:
    found = evidence({})
    found.evaluation["metrics"]["merge_error"] = {"value": 2e-6, "n": 5000, "kind": "measured"}
    check = Check(metric="merge_error", max=1e-4, min_samples=1000)
    assert outcome(check, found)["result"] == "pass"
    tight = Check(metric="merge_error", max=1e-6, min_samples=1000)
    assert outcome(tight, found)["result"] == "fail"
    found.evaluation["metrics"]["merge_error"]["n"] = None
    assert "number of samples is None" in outcome(check, found)["why"]


NOT_WORSE = Check(metric="facts", not_worse_than="sft", margin=0.1, min_samples=50)


def test_not_worse_than_compares_the_same_items() -> None:
    before = evidence({"facts": rate(190, 200)})
    assert outcome(NOT_WORSE, evidence({"facts": rate(188, 200)}), sft=before)["result"] == "pass"
    unsure = outcome(NOT_WORSE, evidence({"facts": rate(172, 200)}), sft=before)
    assert unsure["result"] == "inconclusive"
    lost = outcome(NOT_WORSE, evidence({"facts": rate(90, 200)}), sft=before)
    assert lost["result"] == "fail"
    assert lost["value"] == pytest.approx(0.5)
    assert lost["threshold"] == 0.1
    assert lost["direction"].startswith("not_worse_than sft")


def test_not_worse_than_knows_that_lower_can_be_better() -> None:
    before = evidence({"facts": rate(10, 200)}, better="lower")
    more = evidence({"facts": rate(90, 200)}, better="lower")
    assert outcome(NOT_WORSE, more, sft=before)["result"] == "fail"
    assert outcome(NOT_WORSE, before, sft=more)["result"] == "pass"
    for item in (more, before):
        item.evaluation["metrics"]["facts"]["better"] = None
    assert "higher or lower is better" in outcome(NOT_WORSE, before, sft=more)["why"]


def test_not_worse_than_refuses_other_items_and_missing_stages() -> None:
    now, before = evidence({"facts": rate(90, 100)}), evidence({"facts": rate(90, 100)})
    before.items[0]["id"] = "another"  # type: ignore[index]
    assert "was measured on other items" in outcome(NOT_WORSE, now, sft=before)["why"]
    other_data = evidence({"facts": rate(90, 100)}, data={"facts": "x"})
    assert "was measured on other items" in outcome(NOT_WORSE, now, sft=other_data)["why"]
    assert outcome(NOT_WORSE, now)["why"] == "sft: not measured"
    broken = Evidence(problem="edited: evaluation.json")
    assert outcome(NOT_WORSE, now, sft=broken)["why"] == "sft: edited: evaluation.json"
    before = evidence({"facts": rate(90, 100)})
    before.items[0]["scores"]["facts"] = None
    assert outcome(NOT_WORSE, now, sft=before)["result"] == "fail"


def test_the_same_evidence_gives_the_same_bytes() -> None:
    now, before = evidence({"facts": rate(90, 100)}), evidence({"facts": rate(92, 100)})
    first, second = (json.dumps(verdict(NOT_WORSE, now, sft=before)) for _ in range(2))
    assert first == second
    assert metric_seed("facts") == 2600733851


def test_a_verdict_without_checks_promotes_nothing() -> None:
    empty = judge(
        [],
        stage="sft",
        confidence=0.95,
        fingerprint=MODEL,
        evidence=evidence({}),
        earlier={},
        decontamination=SEARCHED,
    )
    assert empty["promoted"] is False


def test_one_check_that_does_not_pass_stops_the_promotion() -> None:
    found = evidence({"refusal_rate": rate(99, 100), "facts": rate(55, 100)})
    checks = [at_least(0.8), Check(metric="facts", min=0.5, min_samples=1)]
    judged = judge(
        checks,
        stage="dpo",
        confidence=0.95,
        fingerprint=MODEL,
        evidence=found,
        earlier={},
        decontamination=SEARCHED,
    )
    assert [c["result"] for c in judged["checks"]] == ["pass", "inconclusive"]
    assert judged["promoted"] is False


# ---- the file ------------------------------------------------------------------------------------

GOOD = """
confidence: 0.95
demo:
  sft:
    - metric: facts
      min: 0.8
      min_samples: 100
    - metric: facts
      not_worse_than: pretrain
      margin: 0.1
      min_samples: 100
"""


def gate_file(folder: Path, text: str) -> Path:
    path = folder / "gates.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file_is_read(tmp_path: Path) -> None:
    gates = read_gates(gate_file(tmp_path, GOOD))
    assert gates.confidence == 0.95
    assert gates.checks("demo", "sft")[0] == Check(metric="facts", min=0.8, min_samples=100)
    with pytest.raises(UsageError, match=r"no section 'dem'; did you mean 'demo'\?"):
        gates.checks("dem", "sft")
    with pytest.raises(UsageError, match="no checks for stage 'dpo'; write at least one"):
        gates.checks("demo", "dpo")


@pytest.mark.fault("K05", "K06")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("min: 0.8", "minimum: 0.8", r"gates.yaml:6:demo.sft.0.minimum|:minimum: unknown key"),
        ("min: 0.8", "above: 0.8", "unknown key"),
        ("min: 0.8", "min: .nan", "not a finite number"),
        ("min: 0.8", "min: '0.8'", "should be a valid number"),
        ("min: 0.8", "min: 0.8\n      max: 0.9", "exactly one of min, max and not_worse_than"),
        ("      min: 0.8\n", "", "exactly one of min, max and not_worse_than"),
        ("      margin: 0.1\n", "", "not_worse_than and margin belong together"),
        ("margin: 0.1", "margin: -0.1", "margin must not be below 0"),
        ("min_samples: 100\n    - ", "min_samples: 0\n    - ", "min_samples must be at least 1"),
        ("min_samples: 100\n    - ", "\n    - ", "missing; this key has no default"),
        ("not_worse_than: pretrain", "not_worse_than: dpo", "'dpo' is not a stage before 'sft'"),
        ("not_worse_than: pretrain", "not_worse_than: stf", "not_worse_than"),
        ("  sft:", "  stf:", r"no such stage; did you mean 'sft'\?"),
        ("confidence: 0.95", "confidence: 95", "expected a number from 0.5 to below 1"),
        ("confidence: 0.95\n", "", "expected a number from 0.5 to below 1"),
        (GOOD, "", "expected 'key: value' lines at the top level"),
        (GOOD, "confidence: [0.95\n", "not readable as YAML"),
        ("min: 0.8", "min: 1e999", "not a finite number"),
        ("min: 0.8", "at_least: 0.8", "unknown key"),
        (GOOD, "confidence: 0.95\n", "no section"),
        (GOOD, "confidence: 0.95\ndemo: 3\n", "expected a mapping of stages"),
        (GOOD, "confidence: 0.95\ndemo:\n  sft: []\n", "an empty gate checks nothing"),
        (GOOD, "confidence: 0.95\ndemo:\n  sft:\n    - facts\n", "expected '- metric: NAME'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError, match=message):
        read_gates(gate_file(tmp_path, GOOD.replace(old, new, 1)))


def test_an_error_names_file_line_and_field(tmp_path: Path) -> None:
    path = gate_file(tmp_path, GOOD.replace("min: 0.8", "min: much"))
    with pytest.raises(UsageError) as caught:
        read_gates(path)
    assert str(caught.value).startswith(f'{path}:6:min: found "much"')


@pytest.mark.fault("K04", "K06")
def test_unknown_metrics_of_every_section_are_refused(tmp_path: Path) -> None:
    gates = read_gates(gate_file(tmp_path, GOOD + GOOD.split("\n", 2)[2].replace("demo", "7b")))
    names = {"pretrain": {"facts"}, "sft": {"facts"}}
    check_names(gates, {"demo": names, "7b": names})
    with pytest.raises(UsageError, match="7b.sft: metric 'facts' is not measured at stage sft"):
        check_names(gates, {"demo": names, "7b": {"pretrain": {"facts"}, "sft": {"fact"}}})
    with pytest.raises(UsageError, match=r"did you mean 'fact'\?"):
        check_names(gates, {"demo": {"sft": {"fact"}}, "7b": names})
    with pytest.raises(UsageError, match="not measured at stage pretrain"):
        check_names(gates, {"demo": {"sft": {"facts"}}, "7b": names})
    with pytest.raises(UsageError, match="section '7b' belongs to no preset"):
        check_names(gates, {"demo": names})
