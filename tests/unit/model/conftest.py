"""A tokenizer and a model small enough for a unit test."""

from __future__ import annotations

from pathlib import Path

import pytest

from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer
from sevenfold.model.config import InitConfig, ModelConfig

VOCAB = 320


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=64,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )


@pytest.fixture
def init() -> InitConfig:
    return InitConfig(std=0.06, scale_residual=False, dtype="float32")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of VOCAB entries, the last of them reserved."""
    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    config = TokenizerConfig(vocab_size=VOCAB, path=None, max_digits=1, sample_characters=10_000)
    texts = ["The red lamp is on the table.", "The red hat is on the red table."] * 3
    train_tokenizer(texts, config).save_pretrained(folder)
    return folder
