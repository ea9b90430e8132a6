"""Sizes are checked, counted exactly, and survive transformers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sevenfold.base.config import build, to_plain
from sevenfold.base.errors import UsageError
from sevenfold.model.config import ModelConfig, from_hf, read_model_file

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = ("demo", "small", "7b")


def preset(name: str) -> ModelConfig:
    return read_model_file(CONFIGS / f"model_{name}.py")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_are_those_of_the_built_model(name: str, tie_embeddings: bool) -> None:
    from transformers import LlamaForCausalLM

    config = dataclasses.replace(preset(name), tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config.to_hf())
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.weight.numel() for m in matrices) == config.num_matmul_parameters


def test_the_presets_have_the_promised_sizes() -> None:
    big = preset("7b")
    asked = (big.num_layers, big.hidden_size, big.num_heads, big.num_kv_heads, big.vocab_size)
    assert asked == (32, 4096, 32, 8, 50_304)
    assert big.intermediate_size == 14_336
    assert not big.tie_embeddings
    assert big.num_parameters == 7_391_678_464
    small = preset("small")
    assert (small.num_layers, small.hidden_size, small.vocab_size) == (12, 768, 50_304)
    assert small.num_parameters == pytest.approx(124e6, rel=0.01)


def test_flops_of_the_7b_are_those_of_the_design() -> None:
    # 6 x 7.185 G weights in products + 6 x 32 layers x 4096 x 2048.
    assert preset("7b").flops_per_token(4096) == preset("7b").flops_per_token(2048)
    assert preset("7b").flops_per_token(2048) == pytest.approx(44.72e9, rel=1e-4)
    assert preset("7b").flops_per_token(2048) - preset("7b").flops_per_token(1024) == (
        6 * 32 * 4096 * 1024
    )


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_and_back(name: str) -> None:
    assert from_hf(preset(name).to_hf()) == preset(name)


def test_to_hf_is_fresh_each_time_and_carries_the_token_ids(tiny: ModelConfig) -> None:
    first = tiny.to_hf(bos_token_id=5, eos_token_id=6, pad_token_id=7)
    assert (first.bos_token_id, first.eos_token_id, first.pad_token_id) == (5, 6, 7)
    assert first.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    first.hidden_size = 1
    assert tiny.to_hf().hidden_size == 32


def test_other_families_are_described() -> None:
    from transformers import GPT2Config, Qwen3Config

    other = from_hf(
        Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    )
    assert (other.head_width, other.num_kv_heads) == (32, 2)
    old = from_hf(GPT2Config(n_embd=64, n_head=4, n_layer=2, n_positions=128))
    assert (old.intermediate_size, old.num_kv_heads, old.max_seq_len) == (256, 4, 128)


def test_what_is_no_decoder_is_refused() -> None:
    from transformers import ResNetConfig

    with pytest.raises(UsageError, match="'resnet' is no decoder.*start from a Llama-style"):
        from_hf(ResNetConfig())


def test_the_older_spelling_of_the_rotary_base_is_read() -> None:
    from transformers import PretrainedConfig

    older = PretrainedConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_theta=123.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    found = from_hf(older)
    assert (found.rope_theta, found.norm_eps, found.tie_embeddings) == (123.0, 1e-6, True)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be above 0"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it must be above 0"),
        ({"num_heads": 5}, "hidden_size 32 is not divisible by num_heads 5; change one"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"hidden_size": 12}, "a head is 3 wide; rotary embeddings need an even width"),
    ],
)
def test_sizes_that_make_no_model_are_refused(
    tiny: ModelConfig, change: dict[str, float], advice: str
) -> None:
    with pytest.raises(ValueError, match=advice):
        dataclasses.replace(tiny, **change)
    with pytest.raises(UsageError, match=advice):
        build(ModelConfig, {**to_plain(tiny), **change})


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (None, "no such file; name a Python file that sets MODEL"),
        ("x = 1", r"sets no MODEL; add MODEL = ModelConfig\(...\)"),
        ("MODEL = {'hidden_size': 1}", "MODEL is dict; expected a ModelConfig"),
        ("MODEL =", "does not run: invalid syntax"),
        ("import nothing_of_this_name", "does not run: No module named"),
        (
            "from sevenfold.model.config import ModelConfig\nMODEL = ModelConfig(hidden=1)",
            "MODEL is not a valid ModelConfig: got an unexpected keyword argument 'hidden'",
        ),
    ],
)
def test_a_wrong_model_file_is_refused(tmp_path: Path, text: str | None, advice: str) -> None:
    path = tmp_path / "model_wrong.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=advice) as caught:
        read_model_file(path)
    assert str(caught.value).startswith(str(path))


def test_importing_the_sizes_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, sevenfold.model.config; print({'torch','transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
