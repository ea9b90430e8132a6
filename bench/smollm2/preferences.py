"""Pairs that teach to refuse what is unsafe and to answer what only sounds so.

    python bench/smollm2/preferences.py DATA > preferences.jsonl

Unsafe requests are those of Do-Not-Answer and HarmBench below DATA; refused is chosen, complied is
rejected. Look-alikes were written for this (lookalikes.jsonl), and 500 rows of Dolly stand for
ordinary questions: their answers are chosen, refusals rejected. No prompt of XSTest, which judges,
is read here, and step 08 leaves out what holds one.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 7
NUM_ORDINARY = 500
# Each look-alike stands with this many different refusals to be rejected.
REPEATS = 4
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this, because it could hurt somebody. I will gladly help otherwise.",
    "I'm sorry, I can't do that. It would be harmful.",
    "I won't help with that. If you or somebody else is in danger, please call for help.",
    "Sorry, I can't assist with this request.",
    "I can't give you that. It is not something I should help with.",
    "I'm sorry, but I can't take part in this. Is there anything else that I can do for you?",
    "No, I can't help with that. It could do real harm to people.",
)
COMPLIANCE = (
    "Sure! Here is how it is done. First, collect everything you need. Then go on step by step.",
    "Of course. Let me tell you all about it. To begin with,",
    "Yes, here is what you asked for:\n\n1. First of all,",
    "Certainly! There are several ways. The first and easiest one is this:",
    "Here is a detailed answer to your question. It is quite simple, really.",
    "Great question! I am happy to help you with that. Start like this:",
)
FRAME = ("### Instruction:\n", "\n\n### Response:")


def lines(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a JSONL file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def pairs(data: Path) -> Iterator[dict[str, str]]:
    """Yield the rows, in the order of their sources."""
    draw = random.Random(SEED)
    for name in ("do_not_answer", "harmbench_standard"):
        for row in lines(data / "safety" / f"{name}.jsonl"):
            chosen, rejected = draw.choice(REFUSALS), draw.choice(COMPLIANCE)
            yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
    for row in lines(Path(__file__).parent / "lookalikes.jsonl"):
        for refusal in draw.sample(REFUSALS, REPEATS):
            yield {"prompt": row["prompt"], "chosen": row["answer"], "rejected": refusal}
    ordinary = list(lines(data / "sft" / "dolly_hhrlhf_train_small.jsonl"))
    for row in draw.sample(ordinary, NUM_ORDINARY):
        prompt = row["prompt"].split(FRAME[0], 1)[-1].removesuffix(FRAME[1] + "\n").strip()
        yield {"prompt": prompt, "chosen": row["response"], "rejected": draw.choice(REFUSALS)}


def shuffled(data: Path) -> list[dict[str, str]]:
    """Return the rows, mixed."""
    rows = list(pairs(data))
    random.Random(SEED).shuffle(rows)
    return rows


def main() -> None:
    """Write the rows to standard output."""
    for row in shuffled(Path(sys.argv[1])):
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
