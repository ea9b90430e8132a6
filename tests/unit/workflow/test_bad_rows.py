"""A bad row among good ones stops a preparation at its line, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.data import test_pairs, test_rows, test_strict_json
from tests.unit.workflow.test_prepare import make_recipe, own_recipe

from sevenfold.base.errors import BadDataError
from sevenfold.base.records import Run
from sevenfold.data.sources import source_from_path
from sevenfold.workflow import prepare

LINE = 23
STEPS: dict[str, Any] = {
    "sft": lambda run, recipe: prepare.prepare_sft(run, recipe, ("sft",)),
    "dpo": prepare.prepare_dpo,
}
ASKED = [{"question": f"Tom {n}?", "answer": f"It is {n}."} for n in range(40)]
PAIRS = [{"prompt": f"Tom {n}?", "chosen": f"{n}.", "rejected": "No."} for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    run, recipe = Run(folder=folder / "run", facts={}), own_recipe(folder)
    for step in (prepare.download, prepare.clean, prepare.tokenize_and_pack):
        step(run, recipe)
    return run.tokenizer


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Run:
    made = Run(folder=tmp_path / "run", facts={})
    shutil.copytree(tokenizer, made.tokenizer)
    return made


def plant(path: Path, good: list[dict[str, Any]], bad: bytes, *, line: int) -> Path:
    """Write ``good`` rows with ``bad`` as the given line."""
    lines = [json.dumps(row).encode() + b"\n" for row in good]
    lines.insert(line - 1, bad)
    path.write_bytes(b"".join(lines))
    return path


def refusal(run: Run, stage: str, path: Path) -> str:
    """Prepare ``path`` for ``stage``; return why it was refused; nothing may be left."""
    recipe = make_recipe(village=None)
    section = getattr(recipe, stage)
    section.data = dataclasses.replace(section.data, sources=(source_from_path(path),))
    with pytest.raises(BadDataError) as caught:
        STEPS[stage](run, recipe)
    assert caught.value.exit_code == 4
    data = run.data(stage).parent
    assert not data.exists() or not list(data.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.fault("H01", "H02", "H11")
@pytest.mark.parametrize("name", test_strict_json.BAD_LINES)
def test_a_line_that_is_no_row_stops_the_preparation(run: Run, tmp_path: Path, name: str) -> None:
    bad, place, advice = test_strict_json.BAD_LINES[name]
    path = plant(tmp_path / "rows.jsonl", ASKED, bad, line=LINE)
    message = refusal(run, "sft", path)
    assert message.startswith(place.replace("f:2", f"{path}:{LINE}", 1))
    assert advice in message


@pytest.mark.fault("H01")
def test_a_byte_order_mark_stops_the_preparation(run: Run, tmp_path: Path) -> None:
    row = b"\xef\xbb\xbf" + json.dumps(ASKED[0]).encode() + b"\n"
    path = plant(tmp_path / "rows.jsonl", ASKED, row, line=1)
    assert refusal(run, "sft", path).startswith(f"{path}:1:1: found a byte order mark")


@pytest.mark.fault("H03", "H04")
@pytest.mark.parametrize("name", test_rows.BAD)
def test_a_row_that_cannot_be_learnt_stops_the_preparation(
    run: Run, tmp_path: Path, name: str
) -> None:
    values, place, advice = test_rows.BAD[name]
    row = json.dumps(values).encode() + b"\n"
    path = plant(tmp_path / "rows.jsonl", ASKED, row, line=LINE)
    message = refusal(run, "sft", path)
    assert message.startswith(place.replace("f:7", f"{path}:{LINE}", 1))
    assert advice in message


@pytest.mark.fault("I02", "I03")
@pytest.mark.parametrize("name", test_pairs.BAD)
def test_a_pair_that_cannot_be_learnt_stops_the_preparation(
    run: Run, tmp_path: Path, name: str
) -> None:
    values, place, advice = test_pairs.BAD[name]
    row = json.dumps(values).encode() + b"\n"
    path = plant(tmp_path / "pairs.jsonl", PAIRS, row, line=7)
    message = refusal(run, "dpo", path)
    assert message.startswith(place.replace("f:7", f"{path}:7", 1))
    assert advice in message


@pytest.mark.fault("H05", "H12")
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"question": f"Tom {n} " * 100, "answer": "Yes."} for n in range(40)], "40 no_answer"),
        (ASKED[:1], "none"),
        (ASKED[:1] * 40, "none"),
    ],
    ids=["no room for an answer", "one row", "one row forty times"],
)
def test_rows_of_which_nothing_can_be_learnt_stop_the_preparation(
    run: Run, tmp_path: Path, rows: list[dict[str, Any]], reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refusal(run, "sft", path)
    assert f"(dropped: {reason}" in message
    assert "at least two different ones are needed" in message


@pytest.mark.fault("I02", "I04")
def test_pairs_that_max_length_makes_equal_stop_the_preparation(run: Run, tmp_path: Path) -> None:
    long = "Tom " * 100
    pairs = [{"prompt": f"{n}?", "chosen": f"{long}a", "rejected": f"{long}b"} for n in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    message = refusal(run, "dpo", path)
    assert message.startswith("pairs: 0 rows are left of 20 (dropped: 20 equal_within_max_length)")
