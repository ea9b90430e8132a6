"""Models of other families, packed: every document scores as the model scores it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from sevenfold.base.errors import UsageError
from sevenfold.data.packing import PackedConversations, PackedPreferences, Piece, Preference
from sevenfold.model.attention import IMPLEMENTATION, register_attention
from sevenfold.objective.agreement import require_agreement
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer
from sevenfold.objective.preference import answer_scores

VOCAB, ROW, WINDOW = 70, 48, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
SLIDES = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
# Untied heads, tied ones, biases, norms of queries and keys, windows in all layers and in some.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-sliding": {**SLIDES, "model_type": "qwen2"},
    "qwen3": {"head_dim": 16},
    "qwen3-sliding": {**SLIDES, "head_dim": 8, "model_type": "qwen3"},
    "phi3": {"sliding_window": WINDOW},
}


def build(kind: str, attention: str = IMPLEMENTATION, **sizes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(sizes.pop("model_type", kind), **{**SIZES, **sizes})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # biases and norms that do something
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_ids(generator: np.random.Generator, length: int) -> list[int]:
    found: list[int] = generator.integers(1, VOCAB, length).tolist()
    return found


def alone(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Score an answer after its prompt as the model itself does, in nats."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_each_alone(family: str) -> None:
    ours, theirs = build(family, **FAMILIES[family]), build(family, "eager", **FAMILIES[family])
    generator = np.random.default_rng(3)
    pieces = [
        Piece(some_ids(generator, length), [0] + [1] * (length - 1))
        for length in (ROW, 2, 30, 9, 1, 12)
    ]
    rows = PackedConversations(pieces, ROW, pad_id=0, seed=1)
    assert rows.num_rows < len(pieces)
    batch = rows.batch(np.arange(rows.num_rows), ROW)
    total = NEXT_TOKEN.total(Scorer(ours, kernel="plain"), batch).total
    longer = [piece.ids for piece in pieces if len(piece.ids) > 1]
    expected = torch.stack([alone(theirs, ids[:1], ids[1:]) for ids in longer]).sum()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    require_equal(gradients(ours, total), gradients(theirs, expected))


def test_a_row_of_several_contexts_asks_for_no_position_beyond_one() -> None:
    """This kind of rotation changes for good when it first sees a position beyond the context."""
    context = 16
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = {"max_position_embeddings": context, "rope_parameters": dynamic}
    ours, theirs = build("llama", **sizes), build("llama", "eager", **sizes)
    generator = np.random.default_rng(3)
    pieces = [
        Piece(some_ids(generator, length), [0] + [1] * (length - 1))
        for length in (context, 9, 12, context, 5)
    ]
    rows = PackedConversations(pieces, 3 * context, pad_id=0, seed=1)
    batch = rows.batch(np.arange(rows.num_rows), 3 * context)
    assert int((batch.documents_bt == -1).sum()) > context  # type: ignore[union-attr]
    total = NEXT_TOKEN.total(Scorer(ours, kernel="plain"), batch).total
    scores = [alone(theirs, list(p.ids[:1]), list(p.ids[1:])) for p in pieces]
    assert float(total.detach()) == pytest.approx(
        float(torch.stack(scores).sum().detach()), rel=1e-5
    )


@pytest.mark.parametrize("family", ["mistral", "qwen3-sliding"])
def test_both_answers_look_back_over_the_prompt_as_far_as_the_window(family: str) -> None:
    ours, theirs = build(family, **FAMILIES[family]), build(family, "eager", **FAMILIES[family])
    generator = np.random.default_rng(4)
    pairs = [
        Preference(*(some_ids(generator, n) for n in sizes)) for sizes in ((9, 7, 11), (3, 2, 12))
    ]
    rows = PackedPreferences(pairs, ROW, pad_id=0, seed=1, share_prompts=True)
    batch = rows.batch(np.arange(rows.num_rows), ROW)
    with torch.no_grad():
        found = answer_scores(Scorer(ours, kernel="plain")(batch), batch)[0]
        for row, pack in enumerate(rows.packs):
            for place, index in enumerate(pack):
                pair = pairs[index]
                expected = [-alone(theirs, pair.prompt, a) for a in (pair.chosen, pair.rejected)]
                assert torch.allclose(found[row, place], torch.stack(expected), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_computed_rightly_are_let_in(family: str) -> None:
    model = build(family, **FAMILIES[family])
    require_agreement(Scorer(model, kernel="plain"))
    assert model.config._attn_implementation == IMPLEMENTATION
    assert model.training


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({}, "Gemma2Attention: its attention has 'softcap'.*start from a model without it"),
    "granite": ({"logits_scaling": 8.0}, "'granite': packed documents score.*start from a model"),
    "phi": ({"hidden_act": "gelu"}, "'phi' adds a bias to its logits.*start from a model"),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 4}, "'gpt2' has no decoder layers and head"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_computed_otherwise_is_refused(kind: str) -> None:
    sizes, message = REFUSED[kind]
    with pytest.raises(UsageError, match=message):
        require_agreement(Scorer(build(kind, **sizes), kernel="plain"))
