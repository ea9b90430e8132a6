"""Batched log-likelihoods against one row at a time, windows, and the unigram model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sevenfold.verify.likelihood import (
    Row,
    document_rows,
    score_rows,
    token_counts,
    unigram_nats,
)

STORIES = Path(__file__).parents[4] / "shared" / "data" / "model" / "stories260K_hf"


def some_rows(vocab_size: int, num: int = 40) -> list[Row]:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        length = int(generator.integers(2, 60))
        ids = tuple(int(i) for i in generator.integers(vocab_size, size=length))
        rows.append(Row(ids, int(generator.integers(1, length))))
    return rows


@torch.inference_mode()
def alone(model: Any, row: Row) -> tuple[float, bool]:
    """Score one row by hand: no padding, all logits."""
    logits = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    nats, greedy = 0.0, True
    for position in range(row.start, len(row.ids)):
        nats -= float(logits[position - 1, row.ids[position]])
        greedy &= int(logits[position - 1].argmax()) == row.ids[position]
    return nats, greedy


def assert_same_as_alone(model: Any, rows: list[Row]) -> None:
    for batch_tokens in (1, 100, 100_000):
        scores = score_rows(model, rows, batch_tokens=batch_tokens)
        for row, score in zip(rows, scores, strict=True):
            nats, greedy = alone(model, row)
            assert score.nats == pytest.approx(nats, rel=1e-4)
            assert score.num_tokens == len(row.ids) - row.start
            assert score.is_greedy == greedy


def test_batches_equal_one_by_one(model: Any) -> None:
    assert_same_as_alone(model, some_rows(320))


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"a trained model is not at {STORIES}")
def test_batches_equal_one_by_one_on_a_trained_model() -> None:
    from transformers import AutoModelForCausalLM

    assert_same_as_alone(AutoModelForCausalLM.from_pretrained(STORIES).eval(), some_rows(512))


def test_a_model_that_changes_its_logits_after_the_head_is_run_whole() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5,
        initializer_range=0.5, max_position_embeddings=64,
    )  # fmt: skip
    assert_same_as_alone(Gemma2ForCausalLM(config).eval(), some_rows(64, num=6))


def test_rows_that_differ_in_their_last_id_share_a_forward_pass(model: Any) -> None:
    passes: list[tuple[int, ...]] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, arguments, options: passes.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    rows = [Row((*range(9), last), start) for last in range(4) for start in (9, 3)]
    try:
        scores = score_rows(model, rows, batch_tokens=1000)
    finally:
        handle.remove()
    assert passes == [(1, 9)]
    for row, score in zip(rows, scores, strict=True):
        assert score.nats == pytest.approx(alone(model, row)[0], rel=1e-4)


def test_suppressed_ids_are_never_the_greedy_choice(model: Any) -> None:
    with torch.inference_mode():
        first, second = model(torch.tensor([[5, 6]])).logits[0, -1].topk(2).indices.tolist()
    best, next_best = Row((5, 6, first), 2), Row((5, 6, second), 2)
    plain = score_rows(model, [best, next_best], batch_tokens=99)
    assert [score.is_greedy for score in plain] == [True, False]
    suppressed = score_rows(model, [best, next_best], batch_tokens=99, suppressed=[first])
    assert [score.is_greedy for score in suppressed] == [False, True]
    assert [score.nats for score in suppressed] == [score.nats for score in plain]


def test_weights_that_are_not_finite_give_scores_that_are_not(model: Any) -> None:
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_decoder().norm.weight[0] = math.nan
    score = score_rows(broken, [Row((1, 2, 3), 1)], batch_tokens=9)[0]
    assert math.isnan(score.nats)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 13, 14, 50])
def test_windows_score_each_token_once_with_half_a_context(length: int) -> None:
    context = 8
    ids = list(range(length))
    rows = document_rows(ids, context)
    scored = [token for row in rows for token in row.ids[row.start :]]
    assert scored == ids[1:]
    assert all(len(row.ids) - 1 <= context for row in rows)
    assert all(row.start > context // 2 for row in rows[1:])


def test_the_unigram_model_counts_packed_rows(tmp_path: Path) -> None:
    for name, rows in (("a", [[0, 1, 1], [2, 1, 0]]), ("b", [[3, 3, 3]])):
        np.save(tmp_path / f"{name}.npy", np.array(rows, dtype=np.uint16))
    counts = token_counts([tmp_path / "a.npy", tmp_path / "b.npy"], 5)
    assert counts.tolist() == [2, 3, 1, 3, 0]
    # Each count is raised by one: 4 of 14 for token 1, 1 of 14 for the one never seen.
    assert unigram_nats(counts)[[1, 4]] == pytest.approx([-math.log(4 / 14), -math.log(1 / 14)])


def test_huge_files_are_counted_in_part_but_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevenfold.verify.likelihood._MAX_COUNTED_TOKENS", 30_000)
    rows = np.repeat(np.array([[0], [1]], dtype=np.int64), 15_000, axis=0).repeat(2, axis=1)
    np.save(tmp_path / "a.npy", rows)
    counts = token_counts([tmp_path / "a.npy"], 2)
    assert counts.tolist() == [15_000, 15_000]
