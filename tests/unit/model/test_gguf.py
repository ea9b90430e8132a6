"""GGUF files: what is written is read back by two readers, and every difference is an error."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer, word_pattern
from sevenfold.model import gguf_check, gguf_file
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.llama import initialize, save_model

gguf = pytest.importorskip("gguf")


def saved(
    folder: Path, tokenizer_folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A model folder of random weights; heads of 12, which no other size of it is a multiple of."""
    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 24, "max_seq_len": 48,
        "rope_theta": 20_000.0, "norm_eps": 1e-6, "tie_embeddings": False,
    }  # fmt: skip
    config = ModelConfig(**(sizes | changes))
    init = InitConfig(std=0.3, scale_residual=False, dtype="float32")
    save_model(initialize(config, init, seed=7), tokenizer_folder, folder, dtype)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that joins up to three digits, as the presets' do."""
    config = TokenizerConfig(vocab_size=320, path=None, max_digits=3, sample_characters=10_000)
    folder = tmp_path_factory.mktemp("gguf") / "tokenizer"
    texts = ["The red lamp costs 12345 or 12 345 pence."] * 3
    train_tokenizer(texts, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("gguf") / "model", tokenizer_folder)


def written(folder: Path, path: Path, weight_type: str) -> gguf_check.Comparison:
    gguf_file.write_gguf(folder, path, weight_type, name="run/sft")
    return gguf_check.compare_gguf(folder, path, weight_type)


@pytest.mark.parametrize("weight_type", gguf_file.WEIGHT_TYPES)
def test_every_type_is_read_back_as_what_it_was(
    folder: Path, tmp_path: Path, weight_type: str
) -> None:
    found = written(folder, tmp_path / "m.gguf", weight_type)
    assert found.num_tensors == 21  # 9 a layer, embedding, head and last norm
    if weight_type == "f32":
        assert found.max_logit_change == 0
    else:
        assert 0 < found.mean_kl_nats < 0.1
    size = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}[weight_type]
    assert (tmp_path / "m.gguf").stat().st_size == pytest.approx(size * 107_000, rel=0.35)


@pytest.mark.fault("J05", "J07")
def test_tied_embeddings_and_bf16_are_kept_as_stored(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", tokenizer_folder, dtype=torch.bfloat16, tie_embeddings=True)
    assert gguf_file.stored_type(folder) == "bf16"
    found = written(folder, tmp_path / "m.gguf", "bf16")
    assert (found.num_tensors, found.max_logit_change) == (20, 0)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    read = {name: fields[name].contents() for name in fields}
    tokenizer = load_tokenizer(folder)
    assert read["llama.rope.freq_base"] == 20_000
    assert read["llama.attention.head_count_kv"] == 2
    assert read["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert read["llama.context_length"] == 48
    assert read["tokenizer.ggml.pre"] == "llama-bpe"
    assert read["tokenizer.ggml.add_bos_token"] is True
    assert read["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert read["tokenizer.ggml.token_type"][:3] == [3, 3, 3]  # control
    assert "generation" not in read["tokenizer.chat_template"].replace("add_generation_prompt", "")


def test_rows_without_a_token_are_marked_unused(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tokenizer_folder, vocab_size=330)
    assert written(folder, tmp_path / "m.gguf", "f32").max_logit_change == 0
    kinds = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert kinds[320:] == [5] * 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("interleave", "tensor 'blk.0.attn_k.weight' is not the model's, rounded to f32"),
        ("rope", "'rope_parameters' is"),
        ("template", "its chat template renders"),
        ("cut", "its tokenizer makes"),
        ("ends", "eos_token_id is 2, not 1"),
    ],
)
def test_what_is_written_wrongly_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str
) -> None:
    writer = gguf.GGUFWriter
    if change == "interleave":
        monkeypatch.setattr(gguf_file, "interleave", lambda name, values, config: values)
    elif change == "rope":
        right = writer.add_rope_freq_base
        monkeypatch.setattr(writer, "add_rope_freq_base", lambda self, base: right(self, 1e4))
    elif change == "template":
        monkeypatch.setattr(gguf_file, "chat_template", lambda tokenizer: "{{ messages[0] }}")
    elif change == "cut":
        monkeypatch.setattr(gguf_file, "_name_of_cut", lambda step: "qwen2")
    else:
        right = writer.add_eos_token_id
        monkeypatch.setattr(writer, "add_eos_token_id", lambda self, index: right(self, 2))
    with pytest.raises(BadDataError, match="nothing is kept; try another version") as refused:
        written(folder, tmp_path / "m.gguf", "f32")
    assert said in str(refused.value)


def test_one_damaged_value_is_found_whatever_the_type(folder: Path, tmp_path: Path) -> None:
    for weight_type in ("f16", "q8_0"):
        path = tmp_path / f"{weight_type}.gguf"
        gguf_file.write_gguf(folder, path, weight_type, name="x")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        place = tensors["blk.1.ffn_down.weight"].data_offset + 35  # a high byte, or a q8_0 value
        data = bytearray(path.read_bytes())
        data[place] ^= 0x20
        path.write_bytes(data)
        with pytest.raises(BadDataError, match=r"tensor 'blk\.1\.ffn_down\.weight' is not"):
            gguf_check.compare_gguf(folder, path, weight_type)


def test_weights_that_f16_cannot_hold_are_an_error(folder: Path, tmp_path: Path) -> None:
    values = np.array([[1e6, 1.0]], dtype=np.float32)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    assert math.isinf(rounded[0, 0])
    assert not gguf_check._within_rounding(rounded, values, "f16")


def test_a_file_that_no_reader_opens_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_file.write_gguf(folder, path, "f32", name="x")
    path.write_bytes(path.read_bytes().replace(b"gpt2", b"gpt9"))
    with pytest.raises(BadDataError, match="read back, its tokenizer does not load"):
        gguf_check._compare_tokenizers(folder, path)
    path.write_bytes(path.read_bytes().replace(b"GGUF", b"FUGG"))
    with pytest.raises(BadDataError, match="read back, it does not load as a model"):
        gguf_check._load(path)


def test_two_readers_must_agree(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_file.write_gguf(folder, path, "f32", name="x")
    config = gguf_file.read_llama_config(folder)
    values = gguf_check._read_tensors(path, config)
    values["output_norm.weight"] = values["output_norm.weight"] + 1
    with pytest.raises(BadDataError, match="is another one to transformers than to gguf"):
        gguf_check._compare_with_second_reader(path, gguf_check._load(path), values, folder, config)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("architectures", ["MistralForCausalLM"], "config.json:architectures"),
        ("attention_bias", True, "config.json:attention_bias: True, but only plain Llama"),
        ("hidden_act", "gelu", "config.json:hidden_act"),
        ("rope_parameters", {"rope_type": "llama3"}, "config.json:rope_type: 'llama3'"),
    ],
)
def test_other_models_are_refused(
    folder: Path, tmp_path: Path, field: str, value: Any, said: str
) -> None:
    config = storage.read_json(folder / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UsageError, match="convert_hf_to_gguf.py may know more") as refused:
        gguf_file.read_llama_config(tmp_path)
    assert said in str(refused.value)


def test_foreign_weights_and_odd_rows_are_refused(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = gguf_file.read_llama_config(folder) | {"num_hidden_layers": 1}
    with pytest.raises(UsageError, match=r"weight 'model\.layers\.1\..*' is none of a Llama's"):
        list(gguf_file.named_tensors(folder, config))
    odd = saved(tmp_path / "odd", tokenizer_folder, intermediate_size=80)
    with pytest.raises(UsageError, match="rows of 80 values, but q8_0 packs them by 32; choose"):
        gguf_file.write_gguf(odd, tmp_path / "m.gguf", "q8_0", name="x")


@pytest.mark.parametrize("change", ["normalizer", "two digits", "spaces", "ignore_merges"])
def test_tokenizers_that_a_gguf_cannot_hold_are_refused(folder: Path, change: str) -> None:
    tokenizer = load_tokenizer(folder)
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    said = {
        "normalizer": "it is no plain byte-level BPE",
        "two digits": "llama.cpp has no name for the way it cuts",
        "spaces": "an added token swallows spaces",
        "ignore_merges": "it has entries that merging does not make",
    }[change]
    if change == "normalizer":
        layout["normalizer"] = {"type": "NFC"}
    elif change == "two digits":
        split = layout["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = word_pattern(2)
    elif change == "spaces":
        layout["added_tokens"][0]["lstrip"] = True
    else:
        layout["model"] |= {"ignore_merges": False, "merges": layout["model"]["merges"][:-1]}
    with pytest.raises(UsageError, match="not written as GGUF: ") as refused:
        gguf_file._way_to_cut(folder, layout)
    assert said in str(refused.value)


def test_the_names_of_other_ways_to_cut() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = json.loads(byte_level.__getstate__())
    assert gguf_file._name_of_cut(plain) == "gpt-2"
    assert gguf_file._name_of_cut(plain | {"add_prefix_space": True}) is None
    for behavior, name in (("isolated", "llama-bpe"), ("removed", None)):
        split = pre_tokenizers.Split(Regex(word_pattern(3)), behavior=behavior)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        layout = json.loads(pre_tokenizers.Sequence([split, level]).__getstate__())
        assert gguf_file._name_of_cut(layout) == name


@pytest.mark.fault("K12")
def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs the package gguf; pip install -e '\.\[gguf"):
        gguf_file.require_gguf()
