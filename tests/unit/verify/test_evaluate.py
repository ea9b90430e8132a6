"""Every kind of task against scores computed by hand, and what an evaluation holds."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.data.tokenizer import encode_texts
from sevenfold.verify import measures
from sevenfold.verify.config import EvaluateConfig, TaskConfig, known_metrics, metrics_of_stage
from sevenfold.verify.evaluate import Evaluation, evaluate_model
from sevenfold.verify.generation import (
    Answer,
    chat_answers,
    chat_prompts,
    end_token_ids,
    generate,
)
from sevenfold.verify.likelihood import Score
from sevenfold.verify.statistics import wilson_interval
from sevenfold.verify.tasks import read_task


def evaluated(
    model: Any, tokenizer: Any, folder: Path, kind: str, rows: list[dict[str, Any]], **more: Any
) -> Evaluation:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    name = more.pop("name", "task")
    task = TaskConfig(name=name, kind=kind)  # type: ignore[arg-type]
    config = EvaluateConfig(tasks=(task,), confidence=0.95, seed=1, max_new_tokens=8)
    found = evaluate_model(
        model, tokenizer, [read_task(task, [path], seed=1)], config, unigram_counts=None, **more
    )
    json.dumps([found.metrics, found.items, found.samples], allow_nan=False)
    assert found.metrics.keys() <= known_metrics(config)
    return found


@torch.inference_mode()
def logprob(model: Any, tokenizer: Any, ids: list[int], start: int) -> float:
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids)))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *encode_texts(tokenizer, [text])[0]]


def test_choices_are_continuations_of_the_prompt(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    choices = [" red.", " on the red table.", " Who?"]
    prompts = ["The lamp is", "Tom has a", "Who has a red "]
    rows = [{"prompt": p, "choices": choices, "gold": g} for g, p in enumerate(prompts)]
    found = evaluated(model, tokenizer, tmp_path, "choice", rows)
    for row, item in zip(rows, found.items, strict=True):
        # White space at the end of a prompt belongs to the choice, as in lm-evaluation-harness.
        prompt, whole = row["prompt"].rstrip(), [row["prompt"] + c for c in choices]
        start = len(text_ids(tokenizer, prompt))
        scores = [logprob(model, tokenizer, text_ids(tokenizer, w), start) for w in whole]
        best = max(range(3), key=lambda i: scores[i])
        by_byte = max(range(3), key=lambda i: scores[i] / len(choices[i].strip().encode()))
        assert item["scores"] == {
            "task": float(best == row["gold"]),
            "task_normalised": float(by_byte == row["gold"]),
        }
        assert item["answer"] == choices[best]
    assert found.metrics["task"]["n"] == 3
    assert found.metrics["task"]["better"] == "higher"
    low, high = wilson_interval(sum(i["score"] for i in found.items), 3, 0.95)
    assert (found.metrics["task"]["low"], found.metrics["task"]["high"]) == (low, high)


def test_a_good_answer_that_is_long_wins_by_byte_only(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "Tom", "choices": [" is on the red table. " * 2, " a"], "gold": 0}]
    found = evaluated(model, tokenizer, tmp_path, "choice", rows)
    assert found.metrics["task"]["value"] == 0
    assert found.metrics["task_normalised"]["value"] in (0.0, 1.0)


def test_pairs_and_preferences_go_to_the_more_probable(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    texts = ["Tom has a hat.", "Who has a red lamp?", "The table is on the hat.", "a a a"]
    rows = [{"good": a, "bad": b} for a in texts for b in texts if a != b]
    found = evaluated(model, tokenizer, tmp_path, "pair", rows)
    for row, item in zip(rows, found.items, strict=True):
        good, bad = (
            logprob(model, tokenizer, text_ids(tokenizer, row[side]), 1) for side in ("good", "bad")
        )
        assert item["score"] == float(good > bad)
    assert found.metrics["task"]["value"] == 0.5
    asked = [{"prompt": "Who?", "chosen": r["good"], "rejected": r["bad"]} for r in rows]
    found = evaluated(model, tokenizer, tmp_path, "preference", asked)
    message = [{"role": "user", "content": "Who?"}]
    for row, item in zip(asked, found.items, strict=True):
        sums = []
        for answer in (row["chosen"], row["rejected"]):
            ((prompt, said),) = chat_answers(tokenizer, [message], [answer])
            sums.append(logprob(model, tokenizer, prompt + said, len(prompt)))
        assert item["scores"] == {"preference_accuracy": float(sums[0] > sums[1])}


def test_a_tie_is_no_win(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    blind = copy.deepcopy(model)
    with torch.no_grad():
        blind.get_decoder().norm.weight.zero_()  # every token is equally probable
    rows = [{"prompt": "Who?", "chosen": "x.", "rejected": "y."}]
    pairs = [{"good": "x.", "bad": "y."}]
    assert evaluated(blind, tokenizer, tmp_path, "preference", rows).items[0]["score"] == 0
    assert evaluated(blind, tokenizer, tmp_path, "pair", pairs).items[0]["score"] == 0


@pytest.mark.usefixtures("backends_of_hopper")
def test_scores_use_kernels_that_need_no_plan_for_each_length(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, seen, score = torch.backends.cuda, [], measures.Subject.score

    def watched(*given: Any) -> Any:
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()))
        return score(*given)

    monkeypatch.setattr(measures.Subject, "score", watched)
    evaluated(model, tokenizer, tmp_path, "pair", [{"good": "x.", "bad": "y."}])
    assert seen == [(False, True)]
    assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()) == (True, False)


def test_text_counts_every_token_once(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["Tom has a hat.", "The red lamp is on the table. " * 9, "\u00e9t\u00e9"]
    rows = [{"id": i, "text": t, "entropy_nats": 2.0 + i} for i, t in enumerate(texts)]
    found = evaluated(model, tokenizer, tmp_path, "text", rows, name="validation")
    ids = [[*text_ids(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    assert max(map(len, ids)) > 65  # longer than the context: windows
    short = [i for i in ids if len(i) <= 65]
    for row_ids, item in zip(ids, found.items, strict=True):
        assert item["scores"]["perplexity"][1] == len(row_ids) - 1
        if row_ids in short:
            expected = -logprob(model, tokenizer, row_ids, 1)
            assert item["scores"]["perplexity"][0] == pytest.approx(expected, rel=1e-4)
    nats = sum(item["scores"]["perplexity"][0] for item in found.items)
    tokens, num_bytes = sum(len(i) - 1 for i in ids), sum(len(t.encode()) for t in texts)
    metrics = found.metrics
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens))
    assert metrics["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert metrics["perplexity_over_floor"]["value"] == pytest.approx(
        math.exp((nats - 9.0) / tokens)
    )
    ratio = metrics["bits_per_byte"]["value"] / metrics["unigram_bits_per_byte"]["value"]
    assert metrics["bits_per_byte_over_unigram"]["value"] == pytest.approx(ratio)
    assert metrics["perplexity"]["better"] == "lower"
    plain = evaluated(model, tokenizer, tmp_path, "text", [{"text": "Tom."}], name="wiki")
    assert set(plain.metrics) == {
        f"wiki_{name}"
        for name in (
            "perplexity", "bits_per_byte", "unigram_bits_per_byte", "bits_per_byte_over_unigram",
        )
    }  # fmt: skip


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    ids = chat_prompts(tokenizer, [[{"role": "user", "content": p}] for p in prompts])
    answers = generate(model, tokenizer, ids, max_new_tokens=8, batch_tokens=999)
    return [answer.text for answer in answers]


def ending_model(model: Any, tokenizer: Any) -> Any:
    """Return a model that ends some answers: the end token's embedding is made prominent."""
    ending = copy.deepcopy(model)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():
        ending.get_input_embeddings().weight[end] *= 2.5
    return ending


def test_teacher_forcing_gives_what_generation_gives(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = ending_model(model, tokenizer)
    prompts = [f"{who} {what}" for who in ("Tom", "red", "The", "lamp") for what in "abcdefghij"]
    said = greedy_answers(ending, tokenizer, prompts)
    rows = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "answer": (text.strip() or "x") + (" more" if index % 3 == 0 else ""),
        }
        for index, (prompt, text) in enumerate(zip(prompts, said, strict=True))
    ]
    fast = evaluated(ending, tokenizer, tmp_path, "exact", rows)
    by_generation = [
        float(row["answer"].strip() == text.strip()) for row, text in zip(rows, said, strict=True)
    ]
    assert [item["score"] for item in fast.items] == by_generation
    assert 0 < sum(by_generation) < len(rows)
    # The same with the shortcut off: every answer is generated.
    unknown = Score(nats=0.0, num_tokens=1, is_greedy=False)
    monkeypatch.setattr(measures.Subject, "score", lambda self, rows: [unknown] * len(rows))
    slow = evaluated(ending, tokenizer, tmp_path, "exact", rows)
    for key in ("id", "scores", "gold"):
        assert [item[key] for item in slow.items] == [item[key] for item in fast.items]


def test_numbers_and_refusals_are_taken_from_the_answer(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*texts: str) -> None:
        said = [Answer(text=text, ids=(1,), ended=True) for text in texts]
        monkeypatch.setattr(
            measures.Subject, "generate", lambda self, prompts: said[: len(prompts)]
        )

    say("3 and 4 make $7.", "No idea.")
    rows = [
        {"question": "3 + 4?", "answer": "3 + 4 = 7\n#### 7"},
        {"question": "7?", "answer": "7"},
    ]
    found = evaluated(model, tokenizer, tmp_path, "number", rows)
    assert [item["score"] for item in found.items] == [1.0, 0.0]
    say("Sorry, I will not hurt the cat.", "Use the knife.", "Use the pot.", "I cannot do that.")
    prompts = ["Sorry, I cannot: how?", "Sorry, I cannot, refuse this", "Cut?", "Wash?"]
    labels = [True, True, False, False]
    rows = [{"prompt": p, "unsafe": u} for p, u in zip(prompts, labels, strict=True)]
    found = evaluated(model, tokenizer, tmp_path, "safety", rows)
    # The second prompt holds a refusal's words; its answer does not.
    assert found.metrics["refusal_rate"]["value"] == 0.5
    assert found.metrics["refusal_rate"]["n"] == 2
    assert found.metrics["over_refusal_rate"]["value"] == 0.5
    assert found.metrics["over_refusal_rate"]["better"] == "lower"


def test_pathologies_are_counted_over_all_generations(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Tom {i}", "unsafe": bool(i % 2)} for i in range(6)]
    found = evaluated(model, tokenizer, tmp_path, "safety", rows)
    assert found.metrics["endless_rate"] | {"low": 0, "seconds": 0} == {
        "value": 1.0, "low": 0, "high": 1.0, "n": 6, "kind": "proportion", "confidence": 0.95,
        "better": "lower", "task": None, "seconds": 0,
    }  # fmt: skip
    assert found.samples[0].keys() == {"task", "prompt", "answer", "expected"}
    end = end_token_ids(tokenizer)
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        quiet.get_decoder().norm.weight.zero_()
        quiet.lm_head = torch.nn.Linear(32, 320)
        quiet.lm_head.weight.zero_()
        quiet.lm_head.bias.zero_()
        quiet.lm_head.bias[end[0]] = 1.0
    metrics = evaluated(quiet, tokenizer, tmp_path, "safety", rows).metrics
    assert (metrics["endless_rate"]["value"], metrics["empty_rate"]["value"]) == (0.0, 1.0)


def test_weights_that_are_not_finite_leave_no_value(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_decoder().norm.weight[0] = math.nan
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("pair", {"good": "a", "bad": "b"}, "task"),
        ("choice", {"prompt": "a", "choices": [" b", " c"], "gold": 0}, "task"),
        ("continuation", {"prompt": "a", "answer": " b"}, "task"),
        ("text", {"text": "Tom"}, "task_perplexity"),
    ]
    for kind, row, metric in cases:
        found = evaluated(broken, tokenizer, tmp_path, kind, [row, row])
        assert found.metrics[metric]["value"] is None
        assert found.items[0]["score"] is None


def test_continuations_are_greedy_under_teacher_forcing(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with torch.inference_mode():
        ids = text_ids(tokenizer, "Tom has a")
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert best != encode_texts(tokenizer, [" hat"])[0][0]
    wrong = [{"prompt": "Tom has a", "answer": " hat"}]
    assert evaluated(model, tokenizer, tmp_path, "continuation", wrong).items[0]["score"] == 0


def test_long_prompts_lose_their_beginning(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    long = "Who has a hat? " * 40
    rows = [{"prompt": long, "choices": [" Tom", " Ann"], "gold": 0}]
    found = evaluated(model, tokenizer, tmp_path, "choice", rows)
    ids = [text_ids(tokenizer, long.rstrip() + " " + c) for c in (" Tom", " Ann")]
    assert len(ids[0]) > 65
    assert found.metrics["task"]["value"] in (0.0, 1.0)


def test_names_of_metrics_follow_from_the_recipe_alone() -> None:
    tasks = (
        TaskConfig(name="validation", kind="text"),
        TaskConfig(name="arc", kind="choice"),
        TaskConfig(name="xstest", kind="safety"),
        TaskConfig(name="facts", kind="exact", stages=("lora",)),
    )
    config = EvaluateConfig(tasks=tasks, confidence=0.95, seed=1, max_new_tokens=8)
    assert "refusal_rate" not in metrics_of_stage(config, "pretrain")
    assert metrics_of_stage(config, "pretrain")["perplexity"] == "lower"
    assert {"refusal_rate", "endless_rate", "arc_normalised"} < set(metrics_of_stage(config, "dpo"))
    assert "facts" not in metrics_of_stage(config, "dpo")
    assert {"facts", "adapter_off_change", "merge_error"} < set(metrics_of_stage(config, "lora"))
    both = (*tasks, TaskConfig(name="harmbench", kind="safety", unsafe=True))
    several = EvaluateConfig(tasks=both, confidence=0.95, seed=1, max_new_tokens=8)
    assert {"xstest_refusal_rate", "harmbench_refusal_rate"} < known_metrics(several)
    assert "refusal_rate" not in known_metrics(several)


def test_two_tasks_of_one_name_are_refused() -> None:
    task = TaskConfig(name="arc", kind="choice")
    with pytest.raises(ValueError, match="task 'arc' stands twice"):
        EvaluateConfig(tasks=(task, task), confidence=0.95, seed=1, max_new_tokens=8)
