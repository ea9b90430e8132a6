"""A model small enough to score answers in a unit test, with weights of strong opinions."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sevenfold.model.attention import IMPLEMENTATION, register_attention
from sevenfold.objective.next_token import Scorer

VOCAB = 50


def make_scorer(seed: int = 0) -> Scorer:
    register_attention()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=IMPLEMENTATION,
        initializer_range=0.3,
    )
    return Scorer(LlamaForCausalLM(config), kernel="plain")
