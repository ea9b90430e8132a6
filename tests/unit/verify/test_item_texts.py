"""Every kind of item is found where it was copied from: as its publisher writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold.data.decontamination import DecontaminationConfig, ItemIndex, TaskTexts
from sevenfold.verify.config import TaskConfig
from sevenfold.verify.item_texts import item_texts

QUESTION = "Why do old bridges sing in the wind?"
PASSAGE = "The harbour of the old town freezes in January and nobody sails out before the spring."
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": ("text", {"text": PASSAGE}, PASSAGE),
    "plain choice": (
        "choice",
        {"query": f"Question: {QUESTION}", "choices": ["Cables hum.", "Ice."], "gold": 0},
        QUESTION,
    ),
    "choice with its answer": (
        "choice",
        {"query": "Bridges", "choices": ["hum when the cables are tight in wind", "No"], "gold": 0},
        "Bridges hum when the cables are tight in wind",
    ),
    "mmlu": (
        "choice",
        {"question": QUESTION, "subject": "physics", "choices": ["Hum", "Ice"], "answer": 1},
        QUESTION,
    ),
    "mmlu with its answers": (
        "choice",
        {
            "question": "Bridges sing",
            "subject": "physics",
            "choices": ["because cables hum in the wind", "because of the ice below"],
            "answer": 1,
        },
        "Bridges sing because cables hum in the wind because of the ice below",
    ),
    "continuation": ("continuation", {"context": PASSAGE[:-8], "continuation": "spring"}, PASSAGE),
    "pair": ("pair", {"sentence_good": QUESTION, "sentence_bad": "Why sing bridges?"}, QUESTION),
    "exact": ("exact", {"question": QUESTION, "answer": "The cables."}, QUESTION),
    "number": ("number", {"question": QUESTION, "answer": "So it is #### 7"}, QUESTION),
    "safety": ("safety", {"prompt": QUESTION, "unsafe": False}, QUESTION),
    "preference": (
        "preference",
        {"prompt": QUESTION, "chosen": PASSAGE, "rejected": "Because."},
        PASSAGE,
    ),
}


def index_of(task: TaskConfig, path: Path) -> ItemIndex:
    texts = TaskTexts(sha256="", read=lambda: item_texts(task, [path]))
    return ItemIndex(DecontaminationConfig(ngram=13), {task.name: texts})


@pytest.mark.parametrize("case", CASES)
def test_an_item_is_found_as_it_was_published(tmp_path: Path, case: str) -> None:
    kind, row, published = CASES[case]
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row) + "\n")
    made = index_of(TaskConfig(name="task", kind=kind), path)  # type: ignore[arg-type]
    assert made.find([f"Before.\n{published}\nAfter."]) == "task"
    assert made.find(["Before. Something else that is not an item at all. After."]) is None


def test_items_that_are_not_drawn_are_looked_for_too(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [
        {"id": f"{n}", "prompt": f"Where does path {n} lead?", "unsafe": True} for n in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = index_of(TaskConfig(name="task", kind="safety", max_items=2), path)
    assert made.facts["tasks"]["task"]["items"] == 3
    assert all(made.find([row["prompt"]]) for row in rows)


def test_items_of_the_harness_are_those_it_asks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for split, question in (("test", QUESTION), ("few", PASSAGE)):
        row = {"question": question, "choices": ["a", "b"], "gold": 0}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    file = tmp_path / "hats.yaml"
    file.write_text(
        "task: hats\ndataset_kwargs: {data_files: {test: test.jsonl, few: few.jsonl}}\n"
        "test_split: test\nfewshot_split: few\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n"
    )
    made = index_of(TaskConfig(name="hats", kind="harness", path=str(file)), file)
    assert made.find([QUESTION]) == "hats"
    assert made.find([PASSAGE]) is None
