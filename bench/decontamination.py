"""Recall and precision of decontamination: real evaluation items planted into real texts and rows.

python bench/decontamination.py --data DATA --seed 1 --items 60

Every planted item is written in one of several ways into a text of its own (C4, a book) or becomes
a row (Dolly, HH). What is found without planting is counted too, and printed to be looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base.console import print_line
from sevenfold.base.errors import BadDataError
from sevenfold.data.clean import cut
from sevenfold.data.decontamination import DecontaminationConfig, ItemIndex, TaskTexts
from sevenfold.data.pairs import read_pair
from sevenfold.data.row_files import read_file
from sevenfold.data.rows import read_examples
from sevenfold.verify.config import TaskConfig
from sevenfold.verify.item_texts import item_texts

TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "blimp": ("pair", "eval/blimp.tar.gz", {}),
    "arc_easy": ("choice", "eval/llm_foundry/arc_easy.jsonl", {}),
    "lambada": ("continuation", "eval/llm_foundry/lambada_openai.jsonl", {}),
    "boolq": ("choice", "eval/llm_foundry/boolq.jsonl", {}),
    "piqa": ("choice", "eval/llm_foundry/piqa.jsonl", {}),
    "hellaswag": ("choice", "eval/hellaswag_val_subset.jsonl", {}),
    "mmlu": ("choice", "eval/mmlu.jsonl.gz", {}),
    "gsm8k": ("number", "eval/gsm8k_test.jsonl", {}),
    "xstest": ("safety", "safety/xstest_prompts.csv", {}),
    "do_not_answer": ("safety", "safety/do_not_answer.jsonl", {"unsafe": True}),
    "wikitext2": ("text", "pretrain/wikitext2_valid.txt", {}),
}
PIECE_CHARACTERS = 5000


def verbatim(text: str, dice: random.Random) -> str:
    """Leave it as it is."""
    return text


def rewritten(text: str, dice: random.Random) -> str:
    """Change case, quotes and line ends."""
    words = text.replace("'", "\u2019").replace(",", " ,").split()
    return "".join(dice.choice((" ", "  ", "\n")) + dice.choice((w, w.upper())) for w in words)


def with_typing_errors(text: str, dice: random.Random) -> str:
    """Drop a letter in one word of twenty."""
    return " ".join(w[1:] if dice.random() < 0.05 else w for w in text.split())


def half(text: str, dice: random.Random) -> str:
    """Keep its first half."""
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2])


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "verbatim": verbatim,
    "case, quotes, line ends": rewritten,
    "a letter less in 5 % of words": with_typing_errors,
    "first half": half,
}


def main() -> None:
    """Build the index, plant, search, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--items", type=int, default=60, help="planted of each task and edit")
    parser.add_argument("--ngram", type=int, default=13)
    options = parser.parse_args()
    items, index = build(options.data, options.ngram)
    texts = list(clean_texts(options.data))
    clean = report_clean(index, texts, options.data)
    dice = random.Random(options.seed)
    for name, planted in items.items():
        found = Counter[str]()
        for edit, change in EDITS.items():
            for item in dice.sample(planted, min(options.items, len(planted))):
                host = dice.choice(clean)
                at = dice.choice([i for i, letter in enumerate(host) if letter == "\n"] or [0])
                text = f"{host[:at]}\n{change(item[-1][:2000], dice)}\n{host[at:]}"
                found[edit] += index.find([text]) is not None
        share = {edit: f"{found[edit]}/{min(options.items, len(planted))}" for edit in EDITS}
        print_line(f"planted {name}: {share}")


def build(data: Path, ngram: int) -> tuple[dict[str, list[Sequence[str]]], ItemIndex]:
    """Return every task's items, and the index of all of them."""
    items = {}
    for name, (kind, path, more) in TASKS.items():
        task = TaskConfig(name=name, kind=kind, **more)  # type: ignore[arg-type]
        items[name] = list(item_texts(task, [data / path]))
    started_at_s = time.monotonic()
    tasks = {n: TaskTexts(sha256=n, read=functools.partial(iter, i)) for n, i in items.items()}
    index = ItemIndex(DecontaminationConfig(ngram=ngram), tasks)
    print_line(f"index of {sum(map(len, items.values())):,} items: {_since(started_at_s)}")
    short = {n: f"{f['too_short']}/{f['items']}" for n, f in index.facts["tasks"].items()}
    print_line(f"too short to be looked for: {short}")
    return items, index


def _since(started_at_s: float) -> str:
    return f"{time.monotonic() - started_at_s:.1f} s"


def clean_texts(data: Path) -> Iterator[tuple[str, str]]:
    """Yield (where it is from, text): C4, books in pieces."""
    for line in (data / "pretrain" / "c4_demo.jsonl").read_text().splitlines():
        yield "c4", json.loads(line)["text"]
    for book in sorted((data / "pretrain" / "books").glob("*.txt.gz")):
        with gzip.open(book, "rt") as file:
            for piece in cut(file.read(), PIECE_CHARACTERS):
                yield "books", piece


def report_clean(index: ItemIndex, texts: Sequence[tuple[str, str]], data: Path) -> list[str]:
    """Search what nothing was planted in, print what is found, and return the rest's texts."""
    seen, found = Counter[str](), Counter[str]()
    started_at_s, rest = time.monotonic(), []
    for source, text in texts:
        seen[source] += 1
        if (task := index.find([text])) is None:
            rest.append(text)
        else:
            found[f"{source}: {task}"] += 1
            print_line(f"  {source} holds {task}: {shortest_holding(index, text)!r}")
    characters = sum(len(text) for _, text in texts)
    rate = characters / (time.monotonic() - started_at_s) / 1e6
    print_line(f"searched {dict(seen)}, {characters:,} characters: {rate:.1f} MB/s")
    for name, rows in row_texts(data):
        for row in rows:
            seen[name] += 1
            if (task := index.find(row)) is not None:
                found[f"{name}: {task}"] += 1
                print_line(f"  {name} holds {task}: {' | '.join(row)[:160]!r}")
    print_line(f"of {dict(seen)} found without planting: {dict(found)}")
    return rest


def shortest_holding(index: ItemIndex, text: str) -> str:
    """Return the words that an item was found by."""
    words = text.split()
    last = next(n for n in range(1, len(words) + 1) if index.find([" ".join(words[:n])]))
    first = max(n for n in range(last) if index.find([" ".join(words[n:last])]))
    return " ".join(words[first:last])


def row_texts(data: Path) -> Iterator[tuple[str, Iterator[Sequence[str]]]]:
    """Yield the texts of every row of Dolly with HH, GSM8K's training rows, and HH's pairs."""
    for name in ("dolly_hhrlhf_train_small", "gsm8k_train"):
        rows = read_file(data / "sft" / f"{name}.jsonl")
        examples = (example for row, where in rows for example in read_examples(row, where, name))
        yield name, ([m["content"] for m in example.messages] for example in examples)
    yield "hh", hh_texts(data / "dpo" / "hh_harmless_2000.jsonl.gz")


def hh_texts(path: Path) -> Iterator[Sequence[str]]:
    """Yield the texts of every pair that can be trained on."""
    for row, where in read_file(path):
        with contextlib.suppress(BadDataError):
            pair = read_pair(row, where, "hh")
            yield [*(m["content"] for m in pair.prompt), pair.chosen, str(pair.rejected)]


if __name__ == "__main__":
    main()
