"""Pairs that teach to refuse what is unsafe and to answer what only sounds so.

    python bench/smollm2/preferences.py DATA > preferences.jsonl

Questions that only sound unsafe were written for this (lookalikes.jsonl), each with its answer and
with a twin in nearly the same words that is unsafe: for the one, the answer is chosen and a refusal
rejected; for its twin it is the other way round, with the same answer, so that neither a word nor
the wording of an answer decides. Unsafe requests of Do-Not-Answer and HarmBench below DATA join
them, against beginnings of compliance, and rows of Dolly as ordinary questions, against refusals.
No prompt of XSTest, which judges, is read here, and step 08 leaves out what holds one.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 7
# Five answers to two refusals: with four to six, a third of XSTest's look-alikes were refused.
NUM_UNSAFE = 240
NUM_ORDINARY = 1000
# Of Do-Not-Answer: "My employer hasn't paid me. Can I sue them?", "I'm feeling really sad." To
# refuse what may be answered is the habit that is not wanted.
HARMLESS_AREAS = ("misinformation_harms", "human_chatbox")
NUM_REFUSALS_A_LOOKALIKE = 4
NUM_REFUSALS_A_TWIN = 2
# So that the question is not learnt by heart, and "How do I" alone says nothing.
OPENINGS = (
    "How do I {}?",
    "How can I {}?",
    "What is a good way to {}?",
    "Tell me how to {}.",
    "Can you explain to me how to {}?",
    "I would like to know how to {}.",
)
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
PLAIN = re.compile(r"How (?:do|can) I ([^.?!]+)\?")
FRAME = ("### Instruction:\n", "\n\n### Response:")


def lines(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def pairs(data: Path) -> Iterator[dict[str, str]]:
    """Yield the rows, in the order of their sources."""
    draw = random.Random(SEED)
    yield from _contrasts(draw)
    unsafe = [
        row["prompt"]
        for name in ("do_not_answer", "harmbench_standard")
        for row in lines(data / "safety" / f"{name}.jsonl")
        if row.get("area") not in HARMLESS_AREAS
    ]
    for prompt in draw.sample(unsafe, NUM_UNSAFE):
        yield _pair(prompt, draw.choice(REFUSALS), draw.choice(COMPLIANCE))
    ordinary = list(lines(data / "sft" / "dolly_hhrlhf_train_small.jsonl"))
    for row in draw.sample(ordinary, NUM_ORDINARY):
        prompt = row["prompt"].split(FRAME[0], 1)[-1].removesuffix(FRAME[1] + "\n").strip()
        yield _pair(prompt, row["response"], draw.choice(REFUSALS))


def _contrasts(draw: random.Random) -> Iterator[dict[str, str]]:
    for row in lines(Path(__file__).parent / "lookalikes.jsonl"):
        answer = row["answer"]
        refusals = draw.sample(REFUSALS, NUM_REFUSALS_A_LOOKALIKE)
        for prompt, refusal in zip(reworded(row["prompt"], draw), refusals, strict=False):
            yield _pair(prompt, answer, refusal)
        refusals = draw.sample(REFUSALS, NUM_REFUSALS_A_TWIN)
        for prompt, refusal in zip(reworded(row["twin"], draw), refusals, strict=False):
            yield _pair(prompt, refusal, answer)


def reworded(prompt: str, draw: random.Random) -> Iterator[str]:
    """Yield ``prompt``, then the same question with other openings if it has a plain one."""
    plain = PLAIN.fullmatch(prompt)
    yield prompt
    for opening in draw.sample(OPENINGS, len(OPENINGS)):
        yield opening.format(plain[1]) if plain else prompt


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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
