"""A small tokenizer that several tests share."""

from __future__ import annotations

from typing import Any

import pytest

from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer

TEXTS = [
    f"Tom has a red hat. The cat number {n} sat on the mat with {n + 7} hats." for n in range(80)
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    config = TokenizerConfig(vocab_size=400, path=None, max_digits=1, sample_characters=10_000)
    return train_tokenizer(TEXTS, config)
