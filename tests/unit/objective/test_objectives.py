"""Packed rows score as every document alone; DPO starts at ln 2."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.toy_scorer import VOCAB, make_scorer
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sevenfold.data.packing import PackedConversations, PackedPreferences, Piece, Preference
from sevenfold.objective.linear_cross_entropy import negative_log_likelihood
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer, add_noise
from sevenfold.objective.preference import (
    preference_objective,
    reference_scores,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return make_scorer()


def random_pieces(lengths: list[int]) -> list[Piece]:
    generator = np.random.default_rng(7)
    return [
        Piece(
            generator.integers(1, VOCAB, n).tolist(),
            [0, *generator.integers(0, 2, n - 1).tolist()],
        )
        for n in lengths
    ]


def gradients(scorer: Scorer, total: Any) -> dict[str, torch.Tensor]:
    scorer.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.fault("H09")
@pytest.mark.parametrize("lengths", [[5, 9, 2], [16], [1, 15], [7, 1, 1, 7], [3, 3, 3, 3, 3]])
def test_packed_documents_equal_each_alone(scorer: Scorer, lengths: list[int]) -> None:
    pieces = random_pieces(lengths)
    packed = PackedConversations(pieces, 16, pad_id=0, seed=1)
    rows = packed.batch(np.arange(packed.num_rows), 16)
    together = NEXT_TOKEN.total(scorer, rows).total
    alone = [
        PackedConversations([piece], len(piece.ids), pad_id=0, seed=1).batch(
            np.array([0]), len(piece.ids)
        )
        for piece in pieces
    ]
    one_by_one = sum(NEXT_TOKEN.total(scorer, batch).total for batch in alone)
    assert NEXT_TOKEN.weigh(rows) == sum(map(NEXT_TOKEN.weigh, alone))
    assert torch.allclose(together, torch.as_tensor(one_by_one), rtol=1e-5)
    first, second = gradients(scorer, together), gradients(scorer, one_by_one)
    for name, gradient in first.items():
        assert torch.allclose(gradient, second[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.fault("H09")
def test_a_document_does_not_feel_its_neighbour(scorer: Scorer) -> None:
    first, second = random_pieces([8, 8])
    other = Piece([(i + 11) % VOCAB for i in first.ids], first.mask)
    results = []
    for neighbour in (first, other):
        rows = PackedConversations([neighbour, second], 16, pad_id=0, seed=1)
        batch = rows.batch(np.array([0]), 16)
        at = rows.packs[0].index(1) * 8
        results.append(scorer(batch)[0, at : at + 8])
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_no_target_weighs_and_adds_nothing(scorer: Scorer) -> None:
    batch = PackedConversations([Piece([1, 2, 3], [0, 0, 0])], 4, pad_id=0, seed=1)
    rows = batch.batch(np.array([0]), 4)
    assert NEXT_TOKEN.weigh(rows) == 0
    assert float(NEXT_TOKEN.total(scorer, rows).total.detach()) == 0.0


def test_noise_on_embeddings_is_bounded_by_each_documents_length() -> None:
    torch.manual_seed(0)
    documents = torch.tensor([[0] * 6 + [1] * 24 + [-1] * 2, [0] * 32])
    embedded = torch.zeros(2, 32, 64)
    noise = add_noise(embedded, documents, 5.0)
    for row, document, length in ((0, 0, 6), (0, 1, 24), (0, -1, 2), (1, 0, 32)):
        found = noise[row][documents[row] == document]
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.95 * bound < float(found.abs().max()) <= bound
        assert abs(float(found.mean())) < 0.3 * bound
    assert float(add_noise(embedded, None, 5.0)[0].abs().max()) <= 5.0 / math.sqrt(32 * 64)


def test_embeddings_are_noisy_only_in_training_and_as_the_generator_says(scorer: Scorer) -> None:
    rows = PackedConversations(random_pieces([8, 5]), 16, pad_id=0, seed=1)
    batch = rows.batch(np.array([0]), 16)
    noisy = Scorer(scorer.model, kernel="plain")
    plain = noisy(batch).detach()
    noisy.neftune_noise_alpha = 5.0
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(noisy(batch).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain)
    noisy.eval()
    before = torch.get_rng_state()
    assert torch.equal(noisy(batch).detach(), plain)
    assert torch.equal(torch.get_rng_state(), before)
    scorer.train()


@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_only_what_carries_loss_goes_through_the_head(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and gradients stay; 7 targets in two rows of 16 are scored as 8 places, not 32."""
    from sevenfold.data import batches
    from sevenfold.objective import linear_cross_entropy, next_token

    monkeypatch.setattr(linear_cross_entropy, "_compiled", lambda function: function)
    monkeypatch.setattr(batches, "SCORED_TOGETHER", 8)
    pieces = [Piece(list(range(1, 13)), [0] * 8 + [1] * 4), Piece([5, 6, 7, 8], [0, 1, 1, 1])]
    pieces.append(Piece([3] * 16, [0] * 16))
    rows = PackedConversations(pieces, 16, pad_id=0, seed=1)
    batch = rows.batch(np.arange(rows.num_rows), 16)
    assert batch.num_rows == 2
    scorer, seen = make_scorer(), []
    scorer.kernel = kernel
    real = next_token.negative_log_likelihood

    def watched(hidden_nh: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        seen.append(len(hidden_nh))
        return real(hidden_nh, *args, **settings)

    monkeypatch.setattr(next_token, "negative_log_likelihood", watched)
    found = []
    for given in (batch, batch.with_scored_places()):
        scores_bt = scorer(given)
        found.append((scores_bt.detach(), gradients(scorer, scores_bt.sum())))
    assert seen == [32, 8]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    for name, gradient in found[0][1].items():
        assert torch.allclose(found[1][1][name], gradient, atol=1e-6), name
    # Where that spares nothing all go through; rows taken from a batch are to be looked at anew.
    monkeypatch.setattr(batches, "SCORED_TOGETHER", 32)
    assert batch.with_scored_places().scored_n is None
    monkeypatch.setattr(batches, "SCORED_TOGETHER", 8)
    assert batch.with_scored_places().rows(0, 1).scored_n is None


class Products(TorchDispatchMode):
    """Notes the shape of what each matrix product gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.shapes.append(tuple(found.shape))
        return found


@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_a_frozen_head_costs_no_gradient(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an adapter: the products give logits and the states' gradient, nothing else."""
    from sevenfold.objective import linear_cross_entropy as module

    monkeypatch.setattr(module, "_compiled", lambda function: function)
    weight, targets = torch.randn(VOCAB, 8), torch.arange(20)
    found = {}
    for frozen in (False, True):
        hidden = torch.randn(20, 8, requires_grad=True)
        with Products() as products:
            head = weight.clone().requires_grad_(not frozen)
            negative_log_likelihood(hidden, head, targets, kernel=kernel).sum().backward()
        assert (head.grad is None) == frozen
        found[frozen] = set(products.shapes)
    assert found == {False: {(20, VOCAB), (20, 8), (VOCAB, 8)}, True: {(20, VOCAB), (20, 8)}}


@pytest.mark.parametrize("kernel", ["plain", "chunked"])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_kernels_equal_the_textbook_form(
    kernel: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sevenfold.objective import linear_cross_entropy as module

    monkeypatch.setattr(module, "_compiled", lambda function: function)
    monkeypatch.setattr(module, "CHUNK_POSITIONS", 7)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=trained != "weight")
    weight = torch.randn(VOCAB, 8, generator=generator, requires_grad=trained != "hidden")
    targets = torch.randint(0, VOCAB, (20,), generator=generator)
    targets[::3] = -100
    factors = torch.randn(20, generator=generator)
    scores = negative_log_likelihood(hidden, weight, targets, kernel=kernel)
    plain = functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert torch.allclose(scores, plain, atol=1e-5)
    wanting = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    found = torch.autograd.grad((scores * factors).sum(), wanting)
    wanted = torch.autograd.grad((plain * factors).sum(), wanting)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_kept_logits_under_autocast_give_gradients_in_the_weights_own_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sevenfold.objective import linear_cross_entropy as module

    monkeypatch.setattr(module, "_compiled", lambda function: function)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCAB, (20,), generator=generator)
    found = {}
    for kernel in ("plain", "chunked"):
        with torch.autocast("cpu", torch.bfloat16):
            scores = negative_log_likelihood(hidden, weight, targets, kernel=kernel)
        found[kernel] = scores, *torch.autograd.grad(scores.sum(), (hidden, weight))
    for plain, kept in zip(found["plain"], found["chunked"], strict=True):
        assert plain.dtype == kept.dtype == torch.float32
        assert torch.allclose(plain, kept, rtol=1e-2, atol=1e-2)


def test_kept_logits_serve_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gone after it: a second one, or gradients of gradients, would be wrong."""
    from sevenfold.objective import linear_cross_entropy as module

    monkeypatch.setattr(module, "_compiled", lambda function: function)
    hidden = torch.randn(20, 8, requires_grad=True)
    weight, targets = torch.randn(VOCAB, 8, requires_grad=True), torch.arange(20)

    def score() -> torch.Tensor:
        return negative_log_likelihood(hidden, weight, targets, kernel="chunked").sum()

    total = score()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    (gradient,) = torch.autograd.grad(score().square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


PREFERENCES = [
    Preference([1, 2, 3], [4, 5], [6, 7, 8]),
    Preference([9, 2], [4], [5, 5]),
    Preference([3, 1], [8, 9], []),
    Preference([7], [1, 2, 3], [3, 2, 1]),
]


def preference_batch(scorer: Scorer) -> Any:
    rows = PackedPreferences(PREFERENCES, 16, pad_id=0, seed=1)
    rows.reference_n2 = reference_scores(
        scorer, rows, micro_batch=1, device=CPU, autocast=torch.no_grad()
    )
    return rows.batch(np.arange(rows.num_rows), 16), rows


@pytest.mark.fault("I01")
def test_dpo_starts_at_ln_2_with_margins_of_zero(scorer: Scorer) -> None:
    batch, _ = preference_batch(scorer)
    summed = preference_objective(beta=0.1, nll_weight=0.0).total(scorer, batch)
    assert float(summed.extras["pairs"]) == 3
    assert float(summed.total.detach()) / 3 == pytest.approx(math.log(2), abs=1e-6)
    assert float(summed.extras["margin"]) == pytest.approx(0.0, abs=1e-6)


def test_dpo_equals_the_formula_answer_by_answer(scorer: Scorer) -> None:
    batch, rows = preference_batch(scorer)
    assert rows.reference_n2 is not None
    rows.reference_n2 += np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    batch = rows.batch(np.arange(rows.num_rows), 16)
    summed = preference_objective(beta=0.3, nll_weight=0.5).total(scorer, batch)
    expected = divergence = 0.0
    for preference, reference in zip(PREFERENCES, rows.reference_n2, strict=True):
        scores = [_log_probability(scorer, piece) for piece in preference.pieces]
        expected += 0.5 * -scores[0] / len(preference.chosen)
        if preference.rejected:
            margin = 0.3 * ((scores[0] - reference[0]) - (scores[1] - reference[1]))
            expected += math.log1p(math.exp(-margin))
            lengths = (len(preference.chosen), len(preference.rejected))
            divergence += sum((reference - scores) / lengths) / 2
    assert float(summed.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(summed.extras["kl"]) == pytest.approx(divergence, rel=1e-4)


def _log_probability(scorer: Scorer, piece: Piece) -> float:
    ids = torch.tensor([piece.ids])
    logits = scorer.model(input_ids=ids).logits.detach().log_softmax(-1)[0]
    wanted = [i for i, carries in enumerate(piece.mask) if carries]
    return sum(float(logits[i - 1, piece.ids[i]]) for i in wanted)
