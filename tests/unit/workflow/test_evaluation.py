"""Steps 11 and 12 on a tiny run: what they write, when they do nothing, what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sevenfold.base import faults, storage
from sevenfold.base.errors import BadDataError, GateRefusedError, UsageError
from sevenfold.base.records import Run, open_promoted
from sevenfold.data.decontamination import DecontaminationConfig
from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer
from sevenfold.model.llama import load_model, save_model
from sevenfold.model.lora import LoRAAdapterConfig, add_adapter, merge_adapter, save_adapter
from sevenfold.verify import standing
from sevenfold.verify.config import EvaluateConfig, JudgeConfig, TaskConfig
from sevenfold.workflow import evaluation, judging
from sevenfold.workflow.contamination import EvaluationItems
from sevenfold.workflow.evaluation import check_stage, evaluate_stage
from sevenfold.workflow.recipe import Recipe

VOCAB = 320
TASKS = (
    TaskConfig(name="validation", kind="text"),
    TaskConfig(name="village_statements", kind="choice"),
    TaskConfig(name="village_facts", kind="exact"),
    TaskConfig(name="village_safety", kind="safety"),
)
GATES = """
confidence: 0.95
demo:
  pretrain:
    - metric: village_statements
      min: 0.0
      min_samples: 10
    - metric: bits_per_byte
      max: 1000
      min_samples: 5
  sft:
    - metric: village_statements
      not_worse_than: pretrain
      margin: 0.2
      min_samples: 10
  dpo:
    - metric: refusal_rate
      min: 0.8
      min_samples: 5
  lora:
    - metric: adapter_off_change
      max: 0.0
      min_samples: 100
    - metric: merge_error
      max: 1.0e-4
      min_samples: 100
    - metric: merge_kl
      max: 1.0e-6
      min_samples: 10
"""


def recipe(tasks: tuple[TaskConfig, ...] = TASKS) -> Recipe:
    """The one part of a recipe that these steps read."""
    settings = EvaluateConfig(
        tasks=tasks, confidence=0.95, seed=1, max_new_tokens=6, sample_prompts=("Who is Tom?",)
    )
    searching = DecontaminationConfig(ngram=13)
    return cast("Recipe", types.SimpleNamespace(evaluate=settings, decontaminate=searching))


def random_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def finish(run: Run, stage: str, seed: int) -> None:
    """Write a stage as training leaves it: model and record."""
    save_model(random_model(seed), run.tokenizer, run.model(stage), torch.float32)
    found = storage.read_manifest(run.model(stage))["fingerprint"]
    searched = EvaluationItems(run, recipe()).facts({}, generated=["village"])
    record = {"stage": stage, "fingerprint": found, "external": False, "decontaminated": searched}
    run.write_record(stage, record)


def mark_searched(run: Run, settings: Recipe, *stages: str) -> None:
    """Let the records say that what the stages were trained on holds none of the items."""
    facts = EvaluationItems(run, settings).facts({}, generated=())
    for stage in stages:
        run.write_record(stage, {**run.record(stage), "decontaminated": facts})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data and two stages that have been trained and measured."""
    run = Run(folder=tmp_path_factory.mktemp("made") / "run", facts={"preset": "demo"})
    texts = ["The red lamp is on the table.", "Tom has a red hat. Who has a hat?"] * 3
    config = TokenizerConfig(vocab_size=VOCAB, path=None, max_digits=1, sample_characters=10_000)
    with storage.new_folder(run.tokenizer, kind="tokenizer") as folder:
        train_tokenizer(texts, config).save_pretrained(folder)
    ask = [{"role": "user", "content": "Who?"}]
    tasks = {
        "village_statements": [
            {"id": f"s{i}", "prompt": "Tom has", "choices": [" a hat.", f" {i}."], "gold": 0}
            for i in range(12)
        ],
        "village_facts": [
            {"id": f"f{i}", "messages": ask, "answer": f"Tom {i}."} for i in range(3)
        ],
        "village_safety": [
            {"id": f"u{i}", "prompt": f"Burn {i}?", "unsafe": i % 2 == 0} for i in range(12)
        ],
    }
    for task, rows in tasks.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_text(run.data("raw") / "evaluation" / f"{task}.jsonl", lines)
    documents = [
        {"id": f"d{i}", "text": f"Tom has {i} hats.", "source": "village", "entropy_nats": 3.0}
        for i in range(6)
    ]
    with storage.new_folder(run.data("clean"), kind="clean") as folder:
        lines = "".join(json.dumps(row) + "\n" for row in documents)
        storage.write_text(folder / "validation-00000.jsonl", lines)
    with storage.new_folder(run.data("packed"), kind="packed") as folder:
        np.save(folder / "train-00000.npy", np.arange(VOCAB, dtype=np.int64).reshape(-1, 32))
    for seed, stage in enumerate(("pretrain", "sft", "dpo")):
        finish(run, stage, seed)
    for stage in ("pretrain", "sft"):
        evaluate_stage(run, recipe(), stage)
    return run.folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    """A copy that a test may spoil."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    return Run(folder=folder, facts={"preset": "demo"})


@pytest.fixture
def gates_file(tmp_path: Path) -> Path:
    path = tmp_path / "promotion_gates.yaml"
    path.write_text(GATES, encoding="utf-8")
    return path


def test_an_evaluation_says_what_was_measured_on_what(run: Run) -> None:
    found = storage.read_json(run.stage("sft") / "evaluation.json")
    manifest = storage.read_manifest(run.model("sft"))
    assert (found["stage"], found["fingerprint"]) == ("sft", manifest["fingerprint"])
    assert found["tokenizer_fingerprint"]
    assert set(found["data"]) == {task.name for task in TASKS}
    assert {"perplexity", "village_statements", "village_facts", "endless_rate"} < set(
        found["metrics"]
    )
    facts = found["metrics"]["village_statements"]
    assert set(facts) >= {"value", "low", "high", "n", "kind", "confidence", "seconds", "better"}
    assert found["samples"][0]["prompt"] == "Who is Tom?"
    lines = (run.stage("sft") / "evaluation_items.jsonl").read_text().splitlines()
    assert len(lines) == 6 + 12 + 3 + 12
    evidence = run.record("sft")["evidence"]
    assert evidence["items_sha256"] == storage.sha256_file(
        run.stage("sft") / "evaluation_items.jsonl"
    )
    assert storage.read_json(run.stage("pretrain") / "evaluation.json")["data"].keys() == {
        "validation",
        "village_statements",
    }


def test_measuring_again_does_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run.stage("sft") / "evaluation.json").read_bytes()
    monkeypatch.setattr(evaluation, "_measure", lambda *_: pytest.fail("measured again"))
    found = evaluate_stage(run, recipe(), "sft")
    assert found == storage.read_json(run.stage("sft") / "evaluation.json")
    assert (run.stage("sft") / "evaluation.json").read_bytes() == before


def test_a_judge_changes_nothing_that_a_gate_reads(
    run: Run, gates_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = JudgeConfig(
        address="https://judge.example", model="a", key_variable="JUDGE_KEY", timeout_s=1.0,
        attempts=1, allow_cleartext=False,
    )  # fmt: skip
    plain = recipe()
    settings = dataclasses.replace(plain.evaluate, judge=judge)
    with_judge = cast("Recipe", types.SimpleNamespace(**(vars(plain) | {"evaluate": settings})))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    monkeypatch.setattr(evaluation, "_measure", lambda *_: pytest.fail("measured again"))
    with pytest.raises(UsageError, match="export JUDGE_KEY"):
        evaluate_stage(run, with_judge, "sft")
    monkeypatch.setenv("JUDGE_KEY", "k")
    monkeypatch.setattr(judging, "judge_answers", lambda c, answers, key: [True] * len(answers))
    before = (run.stage("sft") / "evaluation.json").read_bytes()
    evaluate_stage(run, with_judge, "sft")
    assert storage.read_json(run.stage("sft") / "judge.json")["num_asked"] == 12
    assert (run.stage("sft") / "evaluation.json").read_bytes() == before
    assert evaluation.read_evidence(run, settings, "sft").problem is None


def test_a_judges_opinion_of_earlier_answers_is_not_left_beside_new_ones(run: Run) -> None:
    storage.write_json(run.stage("sft") / "judge.json", {"items_sha256": "of others"})
    (run.stage("sft") / "evaluation.json").unlink()
    evaluate_stage(run, recipe(), "sft")
    assert not (run.stage("sft") / "judge.json").exists()


def test_measured_anew_every_item_scores_the_same(run: Run) -> None:
    items = run.stage("sft") / "evaluation_items.jsonl"
    before = items.read_bytes()
    (run.stage("sft") / "evaluation.json").unlink()
    items.unlink()
    evaluate_stage(run, recipe(), "sft")
    assert items.read_bytes() == before


def test_measured_by_another_version_of_the_code_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = storage.read_json(run.stage("sft") / "evaluation.json")["code"]
    monkeypatch.setattr(evaluation, "code_version", lambda: known)
    evaluate_stage(run, recipe(), "sft")
    assert capsys.readouterr().out == "sft: already measured, 13 metrics\n"
    monkeypatch.setattr(evaluation, "code_version", lambda: "9.9.9")
    evaluate_stage(run, recipe(), "sft")
    said = f"13 metrics, with version {known}, not this one, 9.9.9; remove {run.stage('sft')}"
    assert said in capsys.readouterr().out
    (run.stage("sft") / "evaluation.json").unlink()
    assert evaluate_stage(run, recipe(), "sft")["code"] == "9.9.9"


def _other_items(run: Run) -> None:
    path = run.data("raw") / "evaluation" / "village_statements.jsonl"
    path.write_text(path.read_text().replace("Tom has", "Ann has"))


def _other_model(run: Run) -> None:
    finish(run, "sft", seed=9)


def _edited_metric(run: Run) -> None:
    path = run.stage("sft") / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["metrics"]["village_statements"] |= {"value": 1.0, "low": 0.99, "high": 1.0}
    path.write_text(json.dumps(evaluation))


def _edited_items(run: Run) -> None:
    path = run.stage("sft") / "evaluation_items.jsonl"
    path.write_text(
        path.read_text().replace('"village_statements": 0.0', '"village_statements": 1.0')
    )


def _no_evaluation(run: Run) -> None:
    (run.stage("sft") / "evaluation.json").unlink()


def _another_stages_evaluation(run: Run) -> None:
    for name in ("evaluation.json", "evaluation_items.jsonl"):
        shutil.copy(run.stage("pretrain") / name, run.stage("sft") / name)


def _another_stages_evidence(run: Run) -> None:
    _another_stages_evaluation(run)
    record = {**run.record("sft"), "evidence": run.record("pretrain")["evidence"]}
    run.write_record("sft", record)


CHANGES: list[tuple[Callable[[Run], None], str]] = [
    (_other_items, "stale: the items of village_statements have changed"),
    (_other_model, "edited: evaluation.json is not the file whose SHA-256 is in record.json"),
    (_edited_metric, "edited: evaluation.json is not the file whose SHA-256 is in record.json"),
    (_edited_items, "edited: evaluation_items.jsonl is not the file whose SHA-256"),
    (_no_evaluation, "missing: sft has not been measured; run scripts/11_evaluate.py sft"),
    (_another_stages_evaluation, "edited: evaluation.json"),
    (_another_stages_evidence, "stale: evaluation.json was measured with another fingerprint"),
]


@pytest.mark.fault("K07")
@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_evidence_that_does_not_belong_is_refused_and_measured_anew(
    run: Run, gates_file: Path, change: Callable[[Run], None], reason: str
) -> None:
    change(run)
    with pytest.raises(GateRefusedError) as caught:
        check_stage(run, recipe(), "sft", gates_file)
    assert reason in str(caught.value)
    verdict = storage.read_json(run.stage("sft") / "verdict.json")
    assert verdict["promoted"] is False
    assert verdict["checks"][0]["result"] == "fail"
    before = run.record("sft")["evidence"].get("evaluation_sha256")
    evaluate_stage(run, recipe(), "sft")
    evaluate_stage(run, recipe(), "pretrain")
    assert run.record("sft")["evidence"]["evaluation_sha256"] != before or change is _no_evaluation
    # Measured anew, the random model may pass or not: but never again for this reason.
    with contextlib.suppress(GateRefusedError):
        check_stage(run, recipe(), "sft", gates_file)
    check = storage.read_json(run.stage("sft") / "verdict.json")["checks"][0]
    assert reason not in check["why"]
    assert check["n"] == 12


def test_other_settings_are_measured_anew(run: Run) -> None:
    before = storage.read_json(run.stage("sft") / "evaluation.json")
    fewer = (*TASKS[:1], TaskConfig(name="village_statements", kind="choice", max_items=5))
    after = evaluate_stage(run, recipe(fewer), "sft")
    assert after["metrics"]["village_statements"]["n"] == 5
    assert after["config_fingerprint"] != before["config_fingerprint"]


def test_a_promoted_model_opens_the_next_stage(run: Run, gates_file: Path) -> None:
    with pytest.raises(GateRefusedError, match="has not been judged"):
        open_promoted(run, "pretrain")
    verdict = check_stage(run, recipe(), "pretrain", gates_file)
    assert verdict["promoted"] is True
    assert [check["result"] for check in verdict["checks"]] == ["pass", "pass"]
    assert open_promoted(run, "pretrain").fingerprint == verdict["fingerprint"]


def test_the_verdict_stands_in_the_models_card_and_changes_no_byte_of_the_model(
    run: Run, gates_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = storage.read_manifest(run.model("pretrain"))["fingerprint"]
    check_stage(run, recipe(), "pretrain", gates_file)
    card = run.model("pretrain") / "README.md"
    assert "> **Promoted by its gate**: 2 of 2 checks pass." in card.read_text()
    assert open_promoted(run, "pretrain").fingerprint == before
    card.unlink()
    (run.data("packed") / storage.MANIFEST).write_text("[]")
    assert check_stage(run, recipe(), "pretrain", gates_file)["promoted"] is True
    assert not card.exists()
    assert "no model card: " in caplog.text


def test_the_same_verdict_twice_byte_for_byte(run: Run, gates_file: Path) -> None:
    path = run.stage("pretrain") / "verdict.json"
    check_stage(run, recipe(), "pretrain", gates_file)
    first = path.read_bytes()
    check_stage(run, recipe(), "pretrain", gates_file)
    assert path.read_bytes() == first


@pytest.mark.fault("A13")
def test_killed_between_gate_and_promotion_the_same_command_goes_on(
    run: Run, gates_file: Path
) -> None:
    """At every file operation of measuring and judging: promoted or not, and never half."""
    before = (run.stage("pretrain") / "evaluation.json").read_bytes()
    refused = set()
    for point in range(1, 100):
        copied = Run(folder=run.folder.parent / f"killed-{point}", facts=run.facts)
        shutil.copytree(run.folder, copied.folder)
        child = os.fork()
        if child == 0:
            os.environ[faults.VARIABLE] = f"kill@fs:{point}"
            faults._operations_done = 0
            check_stage(copied, recipe(), "pretrain", gates_file)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            opened = open_promoted(copied, "pretrain")
        except GateRefusedError as refusal:
            refused.add(str(refusal).split(": ", 1)[1].split(";")[0])
            opened = None
        assert opened is not None or os.WIFSIGNALED(status)
        # The next command: measured already, judged again, opened.
        evaluate_stage(copied, recipe(), "pretrain")
        assert (copied.stage("pretrain") / "evaluation.json").read_bytes() == before
        assert check_stage(copied, recipe(), "pretrain", gates_file)["promoted"] is True
        assert open_promoted(copied, "pretrain").forced is None
        shutil.rmtree(copied.folder)
        if os.WIFEXITED(status):
            break
    assert point > 8
    kinds = ("pretrain has not been judged", "the verdict is older than")
    assert all(any(reason.startswith(kind) for reason in refused) for kind in kinds), refused


@pytest.mark.fault("K07")
def test_an_edited_verdict_opens_nothing(run: Run, gates_file: Path) -> None:
    with pytest.raises(GateRefusedError):
        check_stage(run, recipe(), "sft", gates_file)
    path = run.stage("sft") / "verdict.json"
    path.write_text(path.read_text().replace('"promoted": false', '"promoted": true'))
    with pytest.raises(GateRefusedError, match="the verdict was changed after the gate wrote it"):
        open_promoted(run, "sft")


def test_a_refusal_names_every_check_that_does_not_pass(run: Run, gates_file: Path) -> None:
    evaluate_stage(run, recipe(), "dpo")
    with pytest.raises(GateRefusedError) as caught:
        check_stage(run, recipe(), "dpo", gates_file)
    assert caught.value.exit_code == 3
    assert "dpo is not promoted: refusal_rate fail (the interval 0 to 0.39" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("K07")
def test_a_comparison_needs_the_earlier_stages_evidence(run: Run, gates_file: Path) -> None:
    path = run.stage("pretrain") / "evaluation_items.jsonl"
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(GateRefusedError, match="pretrain: edited: evaluation_items.jsonl"):
        check_stage(run, recipe(), "sft", gates_file)


@pytest.mark.fault("K07")
def test_evidence_that_is_no_json_is_refused(run: Run, gates_file: Path) -> None:
    path = run.stage("sft") / "evaluation.json"
    path.write_text('{"metrics": {"village_statements": {"value": NaN}}}')
    evidence = run.record("sft")["evidence"] | {"evaluation_sha256": storage.sha256_file(path)}
    run.write_record("sft", {**run.record("sft"), "evidence": evidence})
    with pytest.raises(GateRefusedError, match="not readable: .*NaN is not JSON; run scripts/11"):
        check_stage(run, recipe(), "sft", gates_file)


def test_changed_weights_are_noticed(run: Run, gates_file: Path) -> None:
    path = next(run.model("sft").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadDataError, match="its SHA-256 is not the manifest's"):
        evaluate_stage(run, recipe(), "sft")
    with pytest.raises(BadDataError, match="its SHA-256 is not the manifest's"):
        check_stage(run, recipe(), "sft", gates_file)


def test_unfinished_stages_and_missing_files_are_named(run: Run, gates_file: Path) -> None:
    with pytest.raises(UsageError, match="lora has not finished yet; run scripts/10_lora.py first"):
        evaluate_stage(run, recipe(), "lora")
    with pytest.raises(UsageError, match="lora has not finished yet; run scripts/10_lora.py first"):
        check_stage(run, recipe(), "lora", gates_file)
    task = run.data("raw") / "evaluation" / "village_facts.jsonl"
    task.unlink()
    with pytest.raises(UsageError, match=r"village_facts.jsonl: no such file; run scripts/01"):
        evaluate_stage(run, recipe(), "sft")
    away = (TaskConfig(name="arc", kind="choice", path="nowhere/arc.jsonl"),)
    with pytest.raises(UsageError, match="nowhere/arc.jsonl: no such file; task 'arc' needs"):
        evaluate_stage(run, recipe(away), "sft")
    chat_only = (TaskConfig(name="village_safety", kind="safety"),)
    with pytest.raises(UsageError, match="holds no task for stage pretrain; add one"):
        evaluate_stage(run, recipe(chat_only), "pretrain")
    shutil.rmtree(run.data("clean"))
    with pytest.raises(UsageError, match="no held-out documents; run scripts/02_clean_data.py"):
        evaluate_stage(run, recipe(TASKS[:1]), "sft")


@pytest.mark.fault("K04")
def test_a_misspelt_metric_is_refused_before_anything_is_judged(run: Run, gates_file: Path) -> None:
    gates_file.write_text(GATES.replace("metric: refusal_rate", "metric: refusal_rat"))
    with pytest.raises(UsageError, match=r"dpo: metric 'refusal_rat' .* mean 'refusal_rate'"):
        check_stage(run, recipe(), "pretrain", gates_file)
    assert not (run.stage("pretrain") / "verdict.json").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_task_of_the_harness_is_judged_like_any_other(run: Run, gates_file: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    folder = run.folder.parent
    rows = [{"who": f"Tom {i}", "choices": ["has a hat", f"is {i}"], "gold": 0} for i in range(12)]
    (folder / "hats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hats.yaml").write_text(
        "task: hats\ndataset_kwargs: {data_files: {test: hats.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{who}}'\ndoc_to_target: gold\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    tasks = (TaskConfig(name="hats", kind="harness", path=str(folder / "hats.yaml")),)
    gates_file.write_text(
        "confidence: 0.95\ndemo:\n  sft:\n"
        "    - {metric: hats_acc, min: 0.0, min_samples: 10}\n"
        "    - {metric: hats_acc, not_worse_than: pretrain, margin: 1.0, min_samples: 10}\n"
    )
    for stage in ("pretrain", "sft"):
        assert evaluate_stage(run, recipe(tasks), stage)["metrics"]["hats_acc"]["n"] == 12
    with pytest.raises(GateRefusedError, match="pretrain was trained on was not searched for"):
        check_stage(run, recipe(tasks), "sft", gates_file)
    with pytest.raises(GateRefusedError, match=r"not promoted \(what pretrain was trained on"):
        open_promoted(run, "sft")
    verdict = storage.read_json(run.stage("sft") / "verdict.json")
    stands = standing.judge(run, "sft", record=run.record("sft"), verdict=verdict, started=True)
    assert (stands.word, stands.why[:34]) == ("fail", "2 of 2 checks pass; what pretrain ")
    mark_searched(run, recipe(tasks), "pretrain", "sft")
    assert check_stage(run, recipe(tasks), "sft", gates_file)["promoted"] is True
    (folder / "hats.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(GateRefusedError, match="stale: the items of hats have changed"):
        check_stage(run, recipe(tasks), "sft", gates_file)
    (folder / "hats.yaml").unlink()
    with pytest.raises(UsageError, match=r"hats\.yaml: no such file; task 'hats' needs its items"):
        evaluate_stage(run, recipe(tasks), "sft")


def add_lora(run: Run, *, merge: bool) -> None:
    """Write a trained adapter over the dpo model, with a merged model that is right or is not."""
    settings = LoRAAdapterConfig(r=2, alpha=4.0, dropout=0.0, targets="all-linear")
    base = storage.read_manifest(run.model("dpo"))["fingerprint"]
    adapted = add_adapter(load_model(run.model("dpo")), settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    save_adapter(adapted, run.stage("lora") / "adapter", base="dpo/model", base_fingerprint=base)
    merged = merge_adapter(adapted) if merge else load_model(run.model("dpo"))
    save_model(merged, run.tokenizer, run.model("lora"), torch.float32)
    run.write_record("lora", {"stage": "lora", "external": False})


@pytest.mark.fault("J01")
def test_an_adapter_is_judged_off_and_merged(run: Run, gates_file: Path) -> None:
    add_lora(run, merge=True)
    metrics = evaluate_stage(run, recipe(), "lora")["metrics"]
    assert metrics["adapter_off_change"]["value"] == 0.0
    assert 0 < metrics["merge_error"]["value"] < 1e-4
    assert metrics["merge_error"]["n"] > 1000
    assert 0 <= metrics["merge_kl"]["value"] < 1e-9
    assert metrics["merge_kl"]["n"] == metrics["merge_error"]["n"] / VOCAB
    assert check_stage(run, recipe(), "lora", gates_file)["promoted"] is True


def test_an_adapter_that_was_changed_is_judged_by_no_earlier_evidence(
    run: Run, gates_file: Path
) -> None:
    add_lora(run, merge=True)
    evaluate_stage(run, recipe(), "lora")
    path = run.stage("lora") / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadDataError, match=r"adapter_model\.safetensors: its SHA-256"):
        evaluate_stage(run, recipe(), "lora")
    with pytest.raises(GateRefusedError, match=r"adapter_model.*scripts/11_evaluate\.py lora"):
        check_stage(run, recipe(), "lora", gates_file)
    facts = storage.read_manifest(path.parent)
    storage.write_manifest(path.parent, kind="adapter", base_fingerprint=facts["base_fingerprint"])
    with pytest.raises(GateRefusedError, match="measured with another adapter_fingerprint"):
        check_stage(run, recipe(), "lora", gates_file)


@pytest.mark.fault("J01")
def test_a_merged_model_without_its_adapter_fails(run: Run, gates_file: Path) -> None:
    add_lora(run, merge=False)
    evaluate_stage(run, recipe(), "lora")
    with pytest.raises(GateRefusedError, match="promoted: merge_error fail .*; merge_kl fail"):
        check_stage(run, recipe(), "lora", gates_file)


def test_the_shipped_gate_file_knows_every_preset() -> None:
    from sevenfold.verify.gates import read_gates
    from sevenfold.workflow.recipe import configs_folder

    found = read_gates(configs_folder() / "promotion_gates.yaml")
    assert set(found.sections) == {path.stem for path in configs_folder().glob("*.yaml")} - {
        "promotion_gates"
    }
    for section in found.sections.values():
        assert set(section) == {"pretrain", "sft", "dpo", "lora"}
