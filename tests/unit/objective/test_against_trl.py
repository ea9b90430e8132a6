"""Our packed rows give TRL's losses, gradients and rewards on the same rows and weights.

TRL takes the rows as people write them, with its own tokenising, collator and loss.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sevenfold.data.chat import render, render_answer
from sevenfold.data.packing import PackedConversations, PackedPreferences, Piece, Preference
from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer
from sevenfold.model.attention import IMPLEMENTATION, register_attention
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer
from sevenfold.objective.preference import preference_objective, reference_scores

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own, about other packages

CPU = torch.device("cpu")
ROW = 192


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


PAIRS = [
    (turns("Who has a hat?"), "Tom has a red hat.", "No one has."),
    (turns("Sat?"), "Yes.", "The cat sat on the mat, and then the cat sat on the mat again."),
    (turns("A cat?", "Yes, a cat.", "Where is the cat?"), "On the mat 7.", "It is on the hat 8."),
    (turns("Count the red hats on the mat."), "17 red hats are here.", "1"),
]
CONVERSATIONS = [
    turns("Who has a hat?", "Tom has a red hat."),
    turns("A cat?", "Yes, a cat.", "Where is the cat?", "The cat sat on the mat."),
    [{"role": "system", "content": "Be short."}, *turns("Sat?", "Yes.")],
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [f"Tom has a red hat. The cat number {n} sat on the mat." for n in range(60)]
    config = TokenizerConfig(vocab_size=320, path=None, max_digits=1, sample_characters=10_000)
    return train_tokenizer(texts, config)


def make_model(seed: int, attention: str = "eager") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    register_attention()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation=attention,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return {"output_dir": str(folder), "max_length": ROW, **plain, **others}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def require_equal_gradients(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) < tolerance * largest, name


def trl_dpo(folder: Path, tokenizer: Any, **loss: Any) -> Any:
    """Return TRL's trainer on PAIRS, policy seeded 0, reference 1."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list(
        [
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in PAIRS
        ]
    )
    return DPOTrainer(
        model=make_model(0),
        ref_model=make_model(1),
        args=DPOConfig(**settings(folder, **loss)),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
    )


def our_preferences(tokenizer: Any) -> list[Preference]:
    found = []
    for prompt, chosen, rejected in PAIRS:
        ids, right = render_answer(tokenizer, prompt, chosen)
        found.append(Preference(ids, right, render_answer(tokenizer, prompt, rejected)[1]))
    return found


# Ours, theirs, and how many pairs TRL takes at once: its plain smoothed loss is called aot, which
# for one pair is the sigmoid loss with smoothing.
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "sigmoid": ({}, {"loss_type": "sigmoid"}, 4),
    "shared_prompts": ({"share_prompts": True}, {"loss_type": "sigmoid"}, 4),
    "ipo": ({"loss": "ipo"}, {"loss_type": "ipo"}, 4),
    "hinge": ({"loss": "hinge"}, {"loss_type": "hinge"}, 4),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss_type": "robust", "label_smoothing": 0.2},
        4,
    ),
    "smoothing": ({"label_smoothing": 0.2}, {"loss_type": "aot", "label_smoothing": 0.2}, 1),
    "length_normalized": ({"length_normalized": True}, {"loss_type": "sigmoid_norm"}, 4),
    "sft_term": (
        {"nll_weight": 0.3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        1,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_equals_trl(name: str, tokenizer: Any, tmp_path: Path) -> None:
    ours, theirs, at_once = LOSSES[name]
    ours = dict(ours)
    share = ours.pop("share_prompts", False)
    trainer = trl_dpo(tmp_path, tokenizer, beta=0.3, **theirs)
    preferences = our_preferences(tokenizer)
    for row, preference in zip(trainer.train_dataset, preferences, strict=True):
        assert row["prompt_ids"] == preference.prompt
        assert row["chosen_ids"] == preference.chosen
        assert row["rejected_ids"] == preference.rejected
    rows = list(trainer.train_dataset)
    losses = [
        trainer.compute_loss(trainer.model, trainer.data_collator(rows[start : start + at_once]))
        for start in range(0, len(rows), at_once)
    ]
    expected = torch.stack(losses).mean()
    their_gradients = gradients(trainer.model, expected)

    packed = PackedPreferences(preferences, ROW, pad_id=0, seed=1, share_prompts=share)
    packed.reference_n2 = reference_scores(
        Scorer(make_model(1, IMPLEMENTATION), kernel="plain"),
        packed,
        micro_batch=1,
        device=CPU,
        autocast=torch.no_grad(),
    )
    scorer = Scorer(make_model(0, IMPLEMENTATION), kernel="plain")
    batch = packed.batch(np.arange(packed.num_rows), ROW)
    objective = preference_objective(**{"beta": 0.3, "nll_weight": 0.0, **ours})
    summed = objective.total(scorer, batch)
    loss = summed.total / objective.weigh(batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    require_equal_gradients(gradients(scorer.model, loss), their_gradients, 1e-4)

    metrics = {key: np.mean(values) for key, values in trainer._metrics["train"].items()}
    found = {key: float(value) / len(PAIRS) for key, value in summed.extras.items()}
    assert found["reward_chosen"] == pytest.approx(metrics["rewards/chosen"], abs=1e-4)
    assert found["reward_rejected"] == pytest.approx(metrics["rewards/rejected"], abs=1e-4)
    assert found["margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-4)
    assert found["accuracy"] == pytest.approx(metrics["rewards/accuracies"])
    assert abs(found["margin"]) > 0


def test_sft_equals_trl_and_transformers(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=make_model(0),
        args=SFTConfig(**settings(tmp_path, assistant_only_loss=True, packing=False)),
        train_dataset=Dataset.from_list([{"messages": row} for row in CONVERSATIONS]),
        processing_class=copy.deepcopy(tokenizer),
    )
    rows = list(trainer.train_dataset)
    pieces = [Piece(*render(tokenizer, row)) for row in CONVERSATIONS]
    for row, piece in zip(rows, pieces, strict=True):
        assert row["input_ids"] == piece.ids
        assert [label != -100 for label in row["labels"]] == [bool(m) for m in piece.mask]
    inputs = trainer.data_collator(rows)
    expected = trainer.compute_loss(trainer.model, dict(inputs))
    their_gradients = gradients(trainer.model, expected)
    plain = make_model(0)(**{k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}).loss

    packed = PackedConversations(pieces, ROW, pad_id=0, seed=1)
    assert packed.num_rows < len(pieces)
    batch = packed.batch(np.arange(packed.num_rows), ROW)
    scorer = Scorer(make_model(0, IMPLEMENTATION), kernel="plain")
    loss = NEXT_TOKEN.total(scorer, batch).total / NEXT_TOKEN.weigh(batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    require_equal_gradients(gradients(scorer.model, loss), their_gradients, 1e-5)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that measures TRL beside ours, as it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "peers"))
    for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "TOKENIZERS_PARALLELISM", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return importlib.import_module("trl_peer")


@pytest.mark.parametrize("what", ["sft", "dpo", "lora"])
def test_the_peer_that_is_measured_gets_our_rows(
    what: str, peer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sevenfold.data import random_rows
    from sevenfold.workflow import trial

    drawn = trial.FEWEST_ROWS * 256  # more than the steps need, so that they are packed as a run's
    told = ["--preset", "demo", "--steps", "1", "--micro-batch", "2", "--alone"]
    told += ["--set", f"{what}.train.tokens_per_batch=256", "--set", "model.max_seq_len=512"]
    told += ["--peer-tokens", "1024"] if what == "dpo" else []
    monkeypatch.setattr(sys, "argv", ["trl_peer.py", what, *told])
    seen: list[Any] = []
    finish = peer.count
    monkeypatch.setattr(peer, "count", lambda t, *a, **k: (seen.append(t), finish(t, *a, **k)))
    peer.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = seen[0].train_dataset
    assert seen[0].args.max_length == 256  # our row's, whatever the model reads
    if what == "dpo":
        packed = random_rows.random_preferences(
            drawn, 256, vocab_size=1024, seed=7, share_prompts=False
        )
        ours = packed.preferences[: len(rows)]
        assert [row["chosen_ids"] for row in rows] == [pair.chosen for pair in ours]
        assert line["pairs_s_per_gpu"] > 0
        # Four rows a step instead of one, and two pairs a pass.
        pairs_a_row = len(packed.preferences) / packed.num_rows
        assert seen[0].args.gradient_accumulation_steps == round(4 * pairs_a_row / 2) >= 3
    else:
        pieces = random_rows.random_conversations(drawn, 256, vocab_size=1024, seed=7).pieces
        assert sorted(i for row in rows for i in row["input_ids"]) == sorted(
            i for piece in pieces for i in piece.ids
        )
        # The first token of a document is nobody's target.
        learnt = sum(label != -100 for row in rows for label in row["labels"])
        assert learnt == sum(sum(piece.mask) for piece in pieces)
    assert line["non_padding_tokens_s_per_gpu"] * line["step_s"] > 50
