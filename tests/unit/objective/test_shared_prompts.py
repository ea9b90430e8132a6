"""Answers that share one pass over their prompt score as each does alone after it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.toy_scorer import VOCAB, make_scorer
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from sevenfold.data.packing import PackedPreferences, Preference
from sevenfold.model.attention import document_mask, may_look
from sevenfold.model.float8 import (
    ROUNDS,
    begin_step,
    convert_to_float8,
    end_step,
    hold_inputs,
)
from sevenfold.objective.next_token import Scorer
from sevenfold.objective.preference import (
    input_magnitudes,
    preference_objective,
    reference_scores,
)

ROW = 48
BETA = 0.3
OUTLIER = 2.0**14
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return make_scorer()


def random_preferences(seed: int) -> list[Preference]:
    """Return pairs and single answers of many lengths, some of them special."""
    generator = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return generator.integers(1, VOCAB, length).tolist()

    def some(low: int, high: int) -> list[int]:
        return tokens(int(generator.integers(low, high)))

    usual = [Preference(some(1, 12), some(1, 9), some(1, 9)) for _ in range(8)]
    cut = some(12, 20)
    return [
        *usual,
        Preference(tokens(1), some(1, 9), some(1, 9)),
        Preference(some(2, 9), some(1, 9), []),
        Preference(tokens(1), tokens(1), []),
        Preference(tokens(2), tokens(1), tokens(1)),
        # The rejected answer is the chosen one, cut short.
        Preference(some(1, 12), cut, cut[: len(cut) // 2]),
        # Fills a row to its last token: the prompt, one more for the second branch, both answers.
        Preference(tokens(20), tokens(15), tokens(ROW - 36)),
    ]


def packed(scorer: Scorer, preferences: list[Preference], *, share: bool) -> PackedPreferences:
    rows = PackedPreferences(preferences, ROW, pad_id=0, seed=1, share_prompts=share)
    rows.reference_n2 = reference_scores(
        scorer, rows, micro_batch=2, device=CPU, autocast=torch.no_grad()
    )
    return rows


def log_probability(scorer: Scorer, prompt: Any, answer: Any) -> torch.Tensor:
    """Score one answer after its prompt, alone, as the model itself does it."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = scorer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return -functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")


def one_by_one(scorer: Scorer, preferences: list[Preference], reference: Any) -> torch.Tensor:
    total = torch.zeros(())
    for preference, known in zip(preferences, reference, strict=True):
        chosen = log_probability(scorer, preference.prompt, preference.chosen)
        total = total - 0.5 * chosen / len(preference.chosen)
        if preference.rejected:
            rejected = log_probability(scorer, preference.prompt, preference.rejected)
            margin = BETA * ((chosen - known[0]) - (rejected - known[1]))
            total = total - functional.logsigmoid(margin)
    return total


def gradients(scorer: Scorer, total: torch.Tensor) -> dict[str, torch.Tensor]:
    scorer.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.fault("H09")
@pytest.mark.parametrize("seed", range(5))
def test_branches_equal_every_answer_alone(scorer: Scorer, seed: int) -> None:
    preferences = random_preferences(seed)
    rows = packed(scorer, preferences, share=True)
    assert rows.reference_n2 is not None
    assert max(map(len, rows.packs)) > 2
    for preference, scores in zip(preferences, rows.reference_n2, strict=True):
        answers = [preference.chosen, preference.rejected]
        alone = [
            float(log_probability(scorer, preference.prompt, a).detach()) for a in answers if a
        ]
        assert scores[: len(alone)].tolist() == pytest.approx(alone, rel=1e-5, abs=1e-5)

    noise = np.random.default_rng(seed).normal(size=rows.reference_n2.shape)
    rows.reference_n2 += noise.astype(np.float32)
    batch = rows.batch(np.arange(rows.num_rows), ROW)
    objective = preference_objective(beta=BETA, nll_weight=0.5)
    together = objective.total(scorer, batch).total
    alone_total = one_by_one(scorer, preferences, rows.reference_n2)
    assert objective.weigh(batch) == len(preferences)
    assert float(together.detach()) == pytest.approx(float(alone_total.detach()), rel=1e-5)
    first, second = gradients(scorer, together), gradients(scorer, alone_total)
    for name, gradient in first.items():
        assert torch.allclose(gradient, second[name], rtol=1e-4, atol=2e-5), name


@pytest.mark.fault("I01")
def test_the_first_loss_is_ln_2_with_shared_prompts(scorer: Scorer) -> None:
    rows = packed(scorer, random_preferences(7), share=True)
    summed = preference_objective(beta=BETA, nll_weight=0.0).total(
        scorer, rows.batch(np.arange(rows.num_rows), ROW)
    )
    pairs = float(summed.extras["pairs"])
    assert float(summed.total.detach()) / pairs == pytest.approx(math.log(2), abs=1e-6)
    assert float(summed.extras["margin"]) == pytest.approx(0.0, abs=1e-5)
    assert float(summed.extras["kl"]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.fault("I01")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("held", "compiled"), [(True, False), (True, True), (False, False)])
def test_in_fp8_the_first_loss_is_ln_2_too(held: bool, compiled: bool) -> None:
    """Both are cast by held scales; by each pass's own they would round differently.

    Some activations are far larger than others, as in real models, and how much differs by row.
    """
    scorer = make_scorer()
    with torch.no_grad():
        for layer in scorer.causal_model.get_decoder().layers:
            layer.mlp.up_proj.weight[:4] *= OUTLIER
            layer.mlp.down_proj.weight[:, :4] /= OUTLIER
    before = packed(scorer, random_preferences(7), share=True).reference_n2
    convert_to_float8(scorer.model, emulate=True)
    for layer in scorer.causal_model.get_decoder().layers if compiled else ():
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    rows = PackedPreferences(random_preferences(7), ROW, pad_id=0, seed=1, share_prompts=True)
    told: Any = {"micro_batch": 1, "device": CPU, "autocast": contextlib.nullcontext()}
    magnitudes = input_magnitudes(scorer, rows, num_rows=2, **told)
    assert magnitudes is not None
    if held:
        hold_inputs(scorer, torch.from_numpy(magnitudes))
    rows.reference_n2 = reference_scores(scorer, rows, **told)
    assert before is not None
    assert np.abs(rows.reference_n2 - before).max() > 0.1  # FP8 it is
    objective = preference_objective(beta=BETA, nll_weight=0.0)
    batch = rows.batch(np.arange(rows.num_rows), ROW)
    for _ in range(ROUNDS):
        begin_step(scorer)
        objective.total(scorer, batch).total.backward()
        end_step(scorer)
    summed = objective.total(scorer, batch)
    mean = float(summed.total.detach()) / float(summed.extras["pairs"])
    if held:
        assert mean == pytest.approx(math.log(2), abs=1e-6)
        assert float(summed.extras["margin"]) == pytest.approx(0.0, abs=1e-4)
        assert float(summed.extras["kl"]) == pytest.approx(0.0, abs=1e-4)
    else:
        assert abs(float(summed.extras["kl"])) > 1e-2


def test_a_pair_is_laid_out_as_a_trunk_with_two_branches() -> None:
    preferences = [Preference([1, 2, 3], [4, 5], [6]), Preference([7], [8], [9])]
    rows = PackedPreferences(preferences, 14, pad_id=0, seed=2, share_prompts=True)
    assert rows.packs == [[0, 1]]
    batch = rows.batch(np.array([0]), 14)
    assert batch.documents_bt is not None
    assert batch.branches_bt is not None
    assert batch.answers_bt is not None
    laid = {
        "ids": (batch.inputs_bt, [1, 2, 3, 4, 5, 3, 6, 7, 8, 7, 9, 0, 0, 0]),
        "targets": (batch.targets_bt, [-1, -1, 4, 5, -1, 6, -1, 8, -1, 9, -1, -1, -1, -1]),
        "positions": (batch.positions_bt, [0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 0, 0, 0]),
        "documents": (batch.documents_bt, [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, -1, -1, -1]),
        "branches": (batch.branches_bt, [0, 0, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0]),
        "answers": (batch.answers_bt, [-1, -1, 0, 0, -1, 1, -1, 2, -1, 3, -1, -1, -1, -1]),
    }
    for name, (tensor, wanted) in laid.items():
        found = [-1 if value == -100 else value for value in tensor[0].tolist()]
        assert found == wanted, name


def test_sharing_saves_a_prompt_less_one_token_a_pair() -> None:
    preferences = random_preferences(3)
    sizes = [
        sum(len(piece.ids) for n in preferences for piece in pieces(n))
        for pieces in (lambda n: n.pieces, lambda n: n.branching_pieces)
    ]
    assert sizes[0] - sizes[1] == sum(len(n.prompt) - 1 for n in preferences if n.rejected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_follows_the_same_rule_as_the_dense_mask() -> None:
    """As far as a CPU can show it: FlexAttention's own masks and its forward, uncompiled."""
    rows = PackedPreferences(random_preferences(5), ROW, pad_id=0, seed=1, share_prompts=True)
    batch = rows.batch(np.arange(rows.num_rows), ROW)
    assert batch.documents_bt is not None
    dense = document_mask(batch.documents_bt, batch.branches_bt)
    assert isinstance(dense, torch.Tensor)
    rule = may_look(batch.documents_bt, batch.branches_bt)
    shape = (batch.num_rows, None, ROW, ROW)
    assert torch.equal(create_mask(rule, *shape, device="cpu"), dense)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, batch.num_rows, 2, ROW, 16)
    blocks = create_block_mask(rule, *shape, device="cpu", BLOCK_SIZE=16)
    with torch.no_grad():
        found = flex_attention(query, key, value, block_mask=blocks)
        wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_block_masks_of_other_rows_are_not_compiled_anew(share_prompts: bool) -> None:
    """As far as a CPU can show it: what torch.compile would hand to a GPU, traced once."""
    torch.compiler.reset()
    traced = CompileCounter()
    compiled = torch.compile(create_block_mask, backend=traced)
    for seed in range(4):
        preferences = random_preferences(seed)[:12]
        rows = PackedPreferences(preferences, ROW, pad_id=0, seed=1, share_prompts=share_prompts)
        batch = rows.batch(np.arange(2), ROW)
        assert batch.documents_bt is not None
        rule = may_look(batch.documents_bt, batch.branches_bt)
        blocks = compiled(rule, 2, None, ROW, ROW, device=CPU, BLOCK_SIZE=16)
        dense = document_mask(batch.documents_bt, batch.branches_bt)
        assert isinstance(dense, torch.Tensor)
        any_seen = dense.view(2, 1, ROW // 16, 16, ROW // 16, 16).any(3).any(-1)
        assert torch.equal(blocks.to_dense().bool(), any_seen)
    assert traced.frame_count == 1
    torch.compiler.reset()
