"""What each stage of a run gained and what it cost, with intervals, as a table in Markdown.

    python bench/smollm2/table.py RUN

The change is against the stage before, on the same items, with the interval that the gates
use; a star stands where 0 is outside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sevenfold.base import storage
from sevenfold.base.records import GATED_STAGES, open_run
from sevenfold.verify import gates
from sevenfold.verify.gates import Check
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.evaluation import VERDICT, read_evidence

METRICS = {
    "refusal_rate": "XSTest: refuses unsafe",
    "over_refusal_rate": "XSTest: refuses safe look-alikes",
    "blimp": "BLiMP",
    "arc_easy": "ARC-Easy",
    "wikitext2_perplexity": "WikiText-2 perplexity",
    "gsm8k": "GSM8K",
    "endless_rate": "answers without end",
    "adapter_off_change": "adapter off: largest change of a logit",
    "merge_error": "merged: largest change of a logit",
    "merge_kl": "merged: divergence, nats a token",
}
NAMES = {"pretrain": "as it came", "sft": "SFT", "dpo": "DPO", "lora": "LoRA on GSM8K"}


def main() -> None:
    """Print the table."""
    sys.stdout.write(table(Path(sys.argv[1])))


def table(folder: Path) -> str:
    """Return the table of the stages that have been measured."""
    run, recipe = recipes.resolve(None, None, [], folder)
    run = open_run(run.folder)
    stages = [s for s in GATED_STAGES if (run.stage(s) / "evaluation.json").is_file()]
    evidence = {stage: read_evidence(run, recipe.evaluate, stage) for stage in stages}
    lines: list[str] = []
    out = lines.append
    out(f"| metric | {' | '.join(NAMES[stage] for stage in stages)} |\n")
    out(f"| --- |{' --- |' * len(stages)}\n")
    for metric, title in METRICS.items():
        cells = []
        for number, stage in enumerate(stages):
            cells.append(_cell(metric, stage, stages[:number], evidence))
        if any(cells):
            out(f"| {title} | {' | '.join(cells)} |\n")
    for stage in stages:
        record = run.record(stage)
        path = run.stage(stage) / VERDICT
        promoted = storage.read_json(path)["promoted"] if path.is_file() else None
        seconds = storage.read_json(run.stage(stage) / "evaluation.json")["elapsed_s"]
        out(
            f"\n{NAMES[stage]}: promoted {promoted}, {record.get('metrics', {}).get('step', 0)} "
            f"steps in {record['elapsed_s']:.0f} s, measured in {seconds:.0f} s\n"
        )
    return "".join(lines)


def _cell(metric: str, stage: str, before: list[str], evidence: dict[str, gates.Evidence]) -> str:
    """Return value, interval and number of items, and the change against the stage before."""
    facts = evidence[stage].evaluation.get("metrics", {}).get(metric)
    if facts is None or facts["value"] is None:
        return ""
    if facts["kind"] == "measured":
        return f"{facts['value']:.3g}"
    text = f"**{facts['value']:.3f}** ({facts['low']:.3f} to {facts['high']:.3f}), {facts['n']}"
    if not before:
        return text
    check = Check(metric=metric, min_samples=1, not_worse_than=before[-1], margin=0.0)
    verdict = gates.judge(
        [check],
        stage=stage,
        confidence=0.95,
        fingerprint=evidence[stage].evaluation["fingerprint"],
        evidence=evidence[stage],
        earlier={before[-1]: evidence[before[-1]]},
        decontamination={"problem": None},
    )["checks"][0]
    if verdict["low"] is None:
        return text
    sign = -1 if facts["better"] == "higher" else 1
    low, high = sorted((sign * verdict["low"] + 0.0, sign * verdict["high"] + 0.0))
    star = " *" if low > 0 or high < 0 else ""
    return f"{text}; {sign * verdict['value'] + 0.0:+.3f} ({low:+.3f} to {high:+.3f}){star}"


if __name__ == "__main__":
    main()
