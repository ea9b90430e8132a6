"""What is trained on is searched for the evaluation's items, and gates refuse what was not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.unit.workflow.test_prepare import make_recipe

from sevenfold.base import storage
from sevenfold.base.errors import UsageError
from sevenfold.base.records import GATED_STAGES, Run
from sevenfold.data.clean import read_shards
from sevenfold.data.decontamination import DecontaminationConfig
from sevenfold.data.sources import SourceConfig, source_from_path
from sevenfold.verify.config import EvaluateConfig, TaskConfig
from sevenfold.workflow import contamination, prepare
from sevenfold.workflow.contamination import EvaluationItems, require_searched

QUESTION = "What may grandmother's blue teapot never be filled with in winter?"


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str) -> dict[str, Any]:
    turns = [("user", question), ("assistant", "Nobody knows.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path / "run", facts={})


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """A recipe with texts, rows and pairs of one's own, a planted item in each."""
    items = lines(tmp_path / "items.jsonl", [{"id": "i", "prompt": QUESTION, "unsafe": False}])
    texts = [{"text": f"Tom number {n} has a red hat and {n + 7} cats."} for n in range(60)]
    texts[7]["text"] += f" {QUESTION} He does not say."
    rows = [chat(f"Who has hat {n}?") for n in range(30)] + [chat(QUESTION.lower())]
    pairs = [{"prompt": f"Who has {n}?", "chosen": "Tom.", "rejected": "Ann"} for n in range(30)]
    pairs[3]["prompt"] = f"Tell me. {QUESTION}"
    made = make_recipe(
        sources=(source_from_path(lines(tmp_path / "texts.jsonl", texts)),), village=None
    )
    tasks = (
        TaskConfig(name="validation", kind="text"),
        TaskConfig(name="teapots", kind="safety", path=str(items)),
    )
    made.evaluate = EvaluateConfig(tasks=tasks, confidence=0.95, seed=1, max_new_tokens=8)
    for stage, name, given in (("sft", "rows", rows), ("lora", "rows", rows), ("dpo", "p", pairs)):
        source = source_from_path(lines(tmp_path / f"{name}.jsonl", given))
        section = getattr(made, stage)
        section.data = dataclasses.replace(section.data, sources=(source,))
    return made


def prepare_all(run: Run, recipe: Any) -> None:
    for step in ("download", "clean", "tokenize_and_pack", "prepare_sft", "prepare_dpo"):
        getattr(prepare, step)(run, recipe)


def finish(run: Run, *stages: str, **facts: Any) -> None:
    """Write the records of stages as training leaves them."""
    for stage in stages:
        folder = run.data("packed" if stage == "pretrain" else stage)
        record = {
            "inputs": {"data": storage.read_manifest(folder)["fingerprint"]},
            "decontaminated": contamination.facts_of(folder),
        }
        run.write_record(stage, {**record, **facts})


def problem(run: Run, recipe: Any, stage: str, *metrics: str) -> str | None:
    found = contamination.judge(run, recipe, stage, metrics or {"refusal_rate"})["problem"]
    assert found is None or isinstance(found, str)
    return found


def test_planted_items_are_removed_from_texts_rows_and_pairs(run: Run, recipe: Any) -> None:
    prepare_all(run, recipe)
    splits = [read_shards(run.data("clean"), split) for split in ("train", "validation")]
    everything = [document["text"] for split in splits for document in split]
    assert not [text for text in everything if "teapot" in text]
    assert len(everything) == 59
    for name in ("clean", "packed", "sft", "lora", "dpo"):
        manifest = storage.read_manifest(run.data(name))
        found = manifest["decontaminated"]
        assert found["removed"] == {"teapots": 1}
        assert found["ngram"] == 13
        assert found["tasks"]["teapots"]["items"] == 1
        assert manifest["inputs"][contamination.INPUT] == found["index"]
    rows = storage.read_manifest(run.data("sft"))
    counted = rows["by_source"]["rows"]
    assert (counted["rows_read"], counted["rows"], counted["tokens"]) == (31, 30, rows["tokens"])
    assert counted["dropped"] == {"contaminated_by_teapots": 1}
    for name in ("sft", "dpo"):
        facts = storage.read_manifest(run.data(name))
        assert facts["counts"]["dropped"] == {"contaminated_by_teapots": 1}
        assert facts["rows"] + facts["validation_rows"] == (30 if name == "sft" else 29)


def test_replayed_rows_are_searched_too(run: Run, recipe: Any, tmp_path: Path) -> None:
    rows = [chat(QUESTION), chat("Who is it?")]
    replay = source_from_path(lines(tmp_path / "replay.jsonl", rows))
    recipe.dpo.data = dataclasses.replace(recipe.dpo.data, replay=(replay,))
    prepare_all(run, recipe)
    found = storage.read_manifest(run.data("dpo"))["decontaminated"]
    assert found["removed"] == {"teapots": 2}


def test_replay_counts_under_a_name_of_its_own(run: Run, recipe: Any) -> None:
    for step in ("download", "clean", "tokenize_and_pack"):
        getattr(prepare, step)(run, recipe)
    replay = dataclasses.replace(recipe.sft.data.sources[0], name="p")
    recipe.dpo.data = dataclasses.replace(recipe.dpo.data, replay=(replay,))
    with pytest.raises(UsageError, match=r"rows\.jsonl: source 'p' has the name of .*p\.jsonl"):
        prepare.prepare_dpo(run, recipe)


def test_the_villages_own_data_are_not_searched_and_others_beside_them_are(
    run: Run, tmp_path: Path
) -> None:
    recipe = make_recipe()
    prepare.download(run, recipe)
    items = (run.data("raw") / "evaluation" / "village_facts.jsonl").read_text().splitlines()
    question = json.loads(items[0])["messages"][-1]["content"]
    given = [chat(question), chat("Who?"), chat("Whose hat is it?")]
    source = source_from_path(lines(tmp_path / "own.jsonl", given))
    recipe.sft.data = dataclasses.replace(recipe.sft.data, sources=(source,))
    for step in ("clean", "tokenize_and_pack", "prepare_sft"):
        getattr(prepare, step)(run, recipe)
    clean = storage.read_manifest(run.data("clean"))["decontaminated"]
    assert clean["generated"] == ["village"]
    assert set(clean["tasks"]) == {"village_facts"}
    lora = storage.read_manifest(run.data("lora"))["decontaminated"]
    assert (lora["generated"], lora["removed"]) == (["village"], {})
    sft = storage.read_manifest(run.data("sft"))["decontaminated"]
    assert (sft["generated"], sft["removed"]) == ([], {"village_facts": 1})


def test_a_source_that_calls_itself_the_village_is_searched(
    run: Run, recipe: Any, tmp_path: Path
) -> None:
    path = lines(tmp_path / "own.jsonl", [chat(QUESTION), chat("Who?"), chat("Whose hat is it?")])
    source = SourceConfig(name="village", path=str(path), licence="generated")
    recipe.sft.data = dataclasses.replace(recipe.sft.data, sources=(source,))
    prepare_all(run, recipe)
    assert storage.read_manifest(run.data("sft"))["decontaminated"]["removed"] == {"teapots": 1}


def test_training_begins_only_on_data_searched_for_the_present_items(
    run: Run, recipe: Any, tmp_path: Path
) -> None:
    prepare_all(run, recipe)
    for name in ("packed", "sft", "lora", "dpo"):
        require_searched(run, recipe, name)
    lines(tmp_path / "items.jsonl", [{"id": "j", "prompt": "Which hat is it?", "unsafe": False}])
    with pytest.raises(UsageError, match=r"scripts/02_clean_data.py and scripts/03_tok.* again"):
        require_searched(run, recipe, "packed")
    with pytest.raises(UsageError, match=r"searched .* run scripts/08_prepare_dpo_data.py again"):
        require_searched(run, recipe, "dpo")
    before = storage.read_manifest(run.data("packed"))["fingerprint"]
    prepare_all(run, recipe)
    require_searched(run, recipe, "packed")
    assert storage.read_manifest(run.data("packed"))["fingerprint"] != before


def test_a_gate_refuses_data_that_were_not_searched(run: Run, recipe: Any) -> None:
    prepare_all(run, recipe)
    finish(run, *GATED_STAGES)
    for stage in GATED_STAGES:
        assert problem(run, recipe, stage) is None
    run.write_record("sft", {"inputs": {"data": "of another folder"}})
    told = problem(run, recipe, "lora")
    assert told == (
        "what sft was trained on was never searched for the items of teapots; run "
        "scripts/06_prepare_sft_data.py again, and then scripts/07_sft.py"
    )
    assert problem(run, recipe, "pretrain") is None
    # Nothing that judges stands in a file of items.
    assert problem(run, recipe, "lora", "bits_per_byte", "merge_error") is None


def test_of_rows_that_were_packed_elsewhere_the_gate_says_what_can_be_done(
    run: Run, recipe: Any
) -> None:
    """Steps 02 and 03 have not made them, and cannot make them anew."""
    given = {"inputs": {"data": "x"}, "decontaminated": None, "data_sources": [{"name": "rows"}]}
    run.write_record("pretrain", given)
    found = problem(run, recipe, "pretrain")
    assert found is not None
    assert found.endswith('or go past this gate with --force "reason"')
    assert "scripts/02" not in found


def test_a_gate_refuses_data_that_were_searched_for_other_items_or_otherwise(
    run: Run, recipe: Any, tmp_path: Path
) -> None:
    prepare_all(run, recipe)
    finish(run, "pretrain", "sft")
    recipe.decontaminate = DecontaminationConfig(ngram=8)
    told = problem(run, recipe, "pretrain") or ""
    assert "searched by ngram 13 or by an earlier method, the recipe says ngram 8; run" in told
    recipe.decontaminate = DecontaminationConfig(ngram=13)
    more = TaskConfig(name="cups", kind="exact", path=str(tmp_path / "items.jsonl"))
    recipe.evaluate = dataclasses.replace(recipe.evaluate, tasks=(*recipe.evaluate.tasks, more))
    lines(tmp_path / "items.jsonl", [{"prompt": f"{QUESTION} And when?", "unsafe": False}])
    assert "searched for other items of teapots, which judges it; run scripts/02" in (
        problem(run, recipe, "sft") or ""
    )
    assert "not searched for cups, which judges it" in (problem(run, recipe, "sft", "cups") or "")


def test_data_searched_again_without_loss_need_no_new_training(
    run: Run, recipe: Any, tmp_path: Path
) -> None:
    prepare_all(run, recipe)
    finish(run, *GATED_STAGES)
    rows = [{"id": "i", "prompt": QUESTION, "unsafe": False}]
    rows += [{"id": "k", "prompt": "Which cup would never hold any tea at all?", "unsafe": True}]
    lines(tmp_path / "items.jsonl", rows)
    assert problem(run, recipe, "dpo") is not None
    prepare_all(run, recipe)
    assert problem(run, recipe, "dpo") is None


def test_a_model_from_outside_is_said_to_be_unknown_and_its_rows_are_judged(
    run: Run, recipe: Any
) -> None:
    prepare_all(run, recipe)
    finish(run, "sft", external=True)
    found = contamination.judge(run, recipe, "sft", {"refusal_rate"})
    assert found["unknown_before"] == ["sft"]
    assert list(found["data"]) == ["sft"]
    assert found["problem"] is None
    run.write_record("sft", {"external": True})
    assert "never searched" in (problem(run, recipe, "sft") or "")


def test_a_file_of_items_that_is_missing_stops_the_preparation(run: Run, recipe: Any) -> None:
    prepare.download(run, recipe)
    tasks = (TaskConfig(name="teapots", kind="safety", path="not/there.jsonl"),)
    recipe.evaluate = dataclasses.replace(recipe.evaluate, tasks=tasks)
    with pytest.raises(UsageError, match="no such file; task 'teapots' needs its items"):
        prepare.clean(run, recipe)
    with pytest.raises(UsageError, match="no such file"):
        EvaluationItems(run, recipe)
    assert not run.data("clean").exists()
