"""A run whose models have random weights: what they say is noise, how they say it is not."""

from __future__ import annotations

import pytest
import torch

from sevenfold.base import storage
from sevenfold.base.records import Run, write_run
from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.llama import initialize, save_model

VOCABULARY = 300


@pytest.fixture(scope="session")
def talking_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("chat") / "run"
    made = write_run(folder, preset="demo", recipe={"seed": 1})
    config = TokenizerConfig(vocab_size=VOCABULARY, path=None, max_digits=1, sample_characters=1000)
    tokenizer = train_tokenizer(["The cat sat on the mat."] * 20, config)
    with storage.new_folder(made.tokenizer, kind="tokenizer") as new:
        tokenizer.save_pretrained(str(new))
    sizes = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        max_seq_len=64,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    init = InitConfig(std=0.2, scale_residual=False, dtype="float32")
    model = initialize(sizes, init, seed=1)
    for stage in ("pretrain", "sft"):
        save_model(model, made.tokenizer, made.model(stage), torch.float32)
        made.write_record(stage, {"stage": stage})
    return made
