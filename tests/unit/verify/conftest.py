"""A tokenizer with its chat template, and a random model small enough for a unit test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sevenfold.model.attention import prefer_fast_kernels

VOCAB = 320


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer

    config = TokenizerConfig(vocab_size=VOCAB, path=None, max_digits=1, sample_characters=10_000)
    texts = ["The red lamp is on the table.", "Tom has a red hat. Who has a hat?"] * 3
    return train_tokenizer(texts, config)


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    """Weights so large that its opinions are strong, whatever they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def backends_of_hopper() -> Iterator[None]:
    """SDPA's back ends as training chooses them on Hopper; the flags need no GPU."""
    cuda = torch.backends.cuda
    before = (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    prefer_fast_kernels((9, 0), deterministic=False)
    yield
    cuda.enable_cudnn_sdp(before[0])
    cuda.enable_flash_sdp(before[1])
    cuda.enable_mem_efficient_sdp(before[2])
