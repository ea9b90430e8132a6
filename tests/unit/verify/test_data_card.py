"""The data card: what the manifests counted of every source, as JSON and in the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import storage
from sevenfold.base.records import Run
from sevenfold.verify import data_card, report

SEARCHED = {"index": "ab" * 32, "ngram": 13, "tasks": {"arc": {"sha256": "1"}, "xstest": {}}}


def write(run: Run, name: str, **facts: Any) -> None:
    with storage.new_folder(run.data(name), kind=name, **facts) as folder:
        storage.write_text(folder / "file", name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(folder=tmp_path / "run", facts={"preset": "small", "recipe": {}})
    web = {"name": "web", "location": "a/web", "licence": "odc-by", "documents": 100}
    code = {"name": "code", "location": "/texts/code", "licence": "unknown", "documents": 40}
    write(made, "raw", sources=[web, code], inputs={"a/web": "c0ffee", "/texts/code": "5ea"})
    counts = {
        "web": {
            "documents_read": 100,
            "documents": {"train": 80, "validation": 2},
            "dropped": {
                "too_short": 5,
                "duplicate": 4,
                "near_duplicate": 6,
                "language_de": 3,
                "gopher_duplicated_5_n_grams": 2,
            },
            "pii": {"email": 9, "ip": 0},
        },
        "code": {"documents_read": 40, "documents": {"train": 40}, "dropped": {}},
    }
    searched = {**SEARCHED, "removed": {"arc": 2}, "generated": []}
    write(made, "clean", by_source=counts, decontaminated=searched)
    write(made, "packed", tokens_by_source={"web": {"train": 800, "validation": 20}})
    rows = {"talks": {"rows_read": 9, "rows": 7, "tokens": 70, "dropped": {"tie": 2}}}
    write(made, "sft", by_source=rows, inputs={})
    return made


def test_each_source_is_counted(run: Run) -> None:
    web, code, talks = data_card.by_source(run)
    assert (web.name, web.used_as, web.read, web.kept, web.tokens) == (
        "web", "clean text", 100, 82, 820,
    )  # fmt: skip
    assert web.duplicates == 10
    repeats = {"gopher_duplicated_5_n_grams": 2}  # of its own words, not of another document
    assert web.dropped == {"too_short": 5, "language_de": 3, **repeats}
    assert web.personal == {"email": 9}
    assert (code.kept, code.tokens, code.dropped) == (40, None, {})
    assert (talks.read, talks.kept, talks.tokens, talks.dropped) == (9, 7, 70, {"tie": 2})


def test_the_card_is_written_beside_the_report(run: Run) -> None:
    page = report.write_report(run).read_text()
    card = json.loads((run.folder / "data_card.json").read_text())
    assert [source["licence"] for source in card["sources"]] == ["odc-by", None]
    assert [source["identity"] for source in card["sources"]] == ["c0ffee", "5ea"]
    assert card["by_source"][0]["personal"] == {"email": 9}
    clean, sft = card["decontamination"]
    assert clean["removed"] == {"arc": 2}
    assert sft["index"] == ""
    manifest = storage.read_manifest(run.data("packed"))
    assert card["folders"]["packed"]["fingerprint"] == manifest["fingerprint"]
    assert card["folders"]["packed"]["files"] == manifest["files"]
    assert re.search(r"<td>clean text</td>.*?>100<.*?>82<.*?>820<.*?>10<", page, re.S)
    assert re.search(r"near duplicate|email <b>9</b>", page)
    assert re.search(r"arc, xstest</td>\s*<td>13 words in a row</td>", page)
    # A licence that nobody knows, and rows that nobody searched, stand out.
    assert len(re.findall('<strong class="unknown">', page)) == 2


def test_two_splits_of_a_set_keep_their_own_identity(run: Run) -> None:
    chat = {"name": "chat", "location": "hub/chat", "licence": "mit"}
    write(run, "sft", sources=[{**chat, "rows": 90}], inputs={"hub/chat": "train"})
    write(run, "lora", sources=[{**chat, "rows": 9}], inputs={"hub/chat": "test"})
    found = [s for s in data_card.card(run)["sources"] if s["name"] == "chat"]
    assert [s["identity"] for s in found] == ["train", "test"]


def test_a_run_without_data_has_an_empty_card(tmp_path: Path) -> None:
    card = data_card.card(Run(folder=tmp_path, facts={}))
    assert card == {
        "sources": [], "by_source": [], "prepared": [], "decontamination": [], "folders": {}
    }  # fmt: skip
