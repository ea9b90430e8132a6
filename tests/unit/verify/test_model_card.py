"""A model's card: what Hugging Face reads of it, and what people must see first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.verify.test_report import FORCED_REASON, start_run, write_data, write_example

from sevenfold.base import storage
from sevenfold.base.records import Run
from sevenfold.verify import lineage
from sevenfold.verify.model_card import card, write_card


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made: Run = write_example(tmp_path_factory.mktemp("cards") / "village-7")
    return made


def header(text: str) -> dict[str, Any]:
    """Parse the header as Hugging Face does: YAML between the first two lines of dashes."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = yaml.safe_load(found[1])
    return values


def table(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_header_is_what_hugging_face_reads(example: Run) -> None:
    values = header(card(example, "sft"))
    assert values == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",  # one source states none
        "tags": ["sevenfold", "llama", "sft", "not-promoted"],
    }
    pretrained = header(card(example, "pretrain"))
    assert pretrained["language"] == ["en"]
    assert pretrained["tags"][-1] == "promoted"
    assert (pretrained["license"], pretrained["license_name"]) == ("other", "generated")


@pytest.mark.parametrize(
    ("licences", "license"),
    [
        (["CC0-1.0"], "cc0-1.0"),
        (["ODC-By-1.0", "odc-by"], "odc-by"),
        (["MIT", "CC-BY-SA-4.0"], "other"),
        (["my own terms"], "other"),
        (["MIT", "unknown"], "unknown"),
    ],
)
def test_the_licence_is_that_of_the_sources(
    tmp_path: Path, licences: list[str], license: str
) -> None:
    run = start_run(tmp_path / "run")
    sources = [
        {"name": f"s{i}", "location": f"owner/set{i}", "licence": licence, "rows": 5}
        for i, licence in enumerate(licences)
    ]
    data = write_data(run, "packed", sources=sources)
    with storage.new_folder(run.model("pretrain"), kind="model") as new:
        (new / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    run.write_record("pretrain", {"stage": "pretrain", "inputs": {"data": data}})
    text = card(run, "pretrain")
    assert header(text)["license"] == license
    assert header(text)["datasets"] == [f"owner/set{i}" for i in range(len(licences))]
    assert [row[0] for row in table(text, "Data")] == [f"s{i}" for i in range(len(licences))]
    assert "This model has not been measured." in text
    assert "No verdict holds for these bytes." in text


@pytest.mark.fault("K13")
def test_what_was_gone_past_by_force_stands_first(example: Run) -> None:
    for stage, words in {"sft": "Gone past by force", "dpo": "Rests on sft"}.items():
        top = card(example, stage).partition("\n## ")[0]
        assert words in top
        assert FORCED_REASON in top.replace("\\", "")
    assert "force" not in card(example, "pretrain")


def test_measurements_stand_with_their_intervals_and_the_gates_answer(example: Run) -> None:
    text = card(example, "sft")
    measured = {row[0]: row[1:] for row in table(text, "Measured")}
    assert measured[r"facts\_held\_out"] == ["0.918", "0.878", "0.946", "256"]
    results = {row[0]: row[3] for row in table(text, "Gate")}
    assert results == {r"facts\_held\_out": "pass", r"sums\_commuted": "inconclusive"}
    assert "apply_chat_template" in text
    assert "apply_chat_template" not in card(example, "pretrain")


def test_it_names_everything_the_model_was_made_from_and_nothing_else(example: Run) -> None:
    known = {artifact.name: artifact for artifact in lineage.trace(example)}
    rows = table(card(example, "sft"), "How it was made")
    labels = [row[0] for row in rows]
    assert labels[-1] == "sft model"
    assert {"source text", "packed tokens", "tokenizer", "pretrain model", "SFT rows"} <= set(
        labels
    )
    assert not {"dpo model", "preference pairs", "LoRA rows"} & set(labels)
    assert rows[-1][1] == f"`{known['sft'].fingerprint[:16]}`"
    assert f"`{known['pretrain'].fingerprint[:16]}` (here)" in rows[-1][2]


def test_the_card_belongs_to_no_other_bytes(example: Run, tmp_path: Path) -> None:
    run: Run = write_example(tmp_path / "again")
    before = storage.read_manifest(run.model("pretrain"))["fingerprint"]
    path = write_card(run, "pretrain", run.model("pretrain"))
    assert storage.verify_folder(run.model("pretrain"), exact=True)["fingerprint"] == before
    assert "Promoted by its gate" in path.read_text(encoding="utf-8")
    with storage.new_folder(run.model("pretrain"), kind="model") as new:
        (new / "config.json").write_text("{}")
    text = card(run, "pretrain")
    assert "Not promoted by its gate**: not judged (the verdict is about another model)" in text
    assert "This model has not been measured." in text
    assert "No verdict holds for these bytes." in text


def test_what_people_wrote_stays_text(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run")
    evil = "a | b\n\n# Promoted\n<script>alert(1)</script> [x](http://evil)"
    sources = [{"name": evil, "licence": "MIT\n---\nlicense: gpl", "rows": 1}]
    data = write_data(run, "packed", sources=sources)
    with storage.new_folder(run.model("pretrain"), kind="model") as new:
        (new / "config.json").write_text("{}")
    past = [{"stage": "init", "reason": evil}]
    record = {"stage": "pretrain", "inputs": {"data": data}, "forced_promotions": past}
    run.write_record("pretrain", record)
    text = write_card(run, "pretrain", run.model("pretrain")).read_text(encoding="utf-8")
    assert header(text)["license"] == "other"
    assert "\n# Promoted" not in text
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[x", text)
    assert len(table(text, "Data")[0]) == 4
