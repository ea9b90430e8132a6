"""Weights depend on seed and name only; what is saved loads elsewhere with equal logits."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sevenfold.base import storage
from sevenfold.base.config import build
from sevenfold.base.errors import BadDataError, CheckpointError, DivergedError, UsageError
from sevenfold.data.tokenizer import END, reserved_ids
from sevenfold.model import attention
from sevenfold.model.config import InitConfig, ModelConfig, from_hf
from sevenfold.model.llama import (
    build_empty,
    build_unfilled,
    check_start,
    initialize,
    load_model,
    load_tokenizer,
    plain_name,
    save_model,
    unwrap_compiled_model,
)

IDS_BT = torch.arange(40).view(2, 20) * 7 % 320
FP32 = torch.float32


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS_BT).logits
    return found


def test_weights_depend_on_seed_and_name_only(tiny: ModelConfig, init: InitConfig) -> None:
    torch.manual_seed(1)
    first = initialize(tiny, init, 7).state_dict()
    torch.manual_seed(2)
    again = initialize(tiny, init, 7).state_dict()
    deeper = initialize(dataclasses.replace(tiny, num_layers=3), init, 7).state_dict()
    other = initialize(tiny, init, 8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], deeper[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.1.mlp.up_proj.weight"])


def test_spreads(tiny: ModelConfig, init: InitConfig) -> None:
    scaled = dataclasses.replace(init, scale_residual=True)
    untied = dataclasses.replace(tiny, tie_embeddings=False, hidden_size=64)
    state = initialize(untied, scaled, 0).state_dict()
    layer = "model.layers.1."
    assert state[layer + "mlp.up_proj.weight"].std().item() == pytest.approx(0.06, rel=0.05)
    shrunk = 0.06 / math.sqrt(4)
    assert state[layer + "mlp.down_proj.weight"].std().item() == pytest.approx(shrunk, rel=0.05)
    assert state[layer + "self_attn.o_proj.weight"].std().item() == pytest.approx(shrunk, rel=0.05)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.06, rel=0.05)
    wide = initialize(untied, dataclasses.replace(init, std=0.5), 0).state_dict()
    assert wide["lm_head.weight"].std().item() == pytest.approx(0.5 / 8, rel=0.05)
    assert bool((state["model.norm.weight"] == 1).all())


def test_bf16_is_the_rounded_fp32_and_rotary_stays_fp32(
    tiny: ModelConfig, init: InitConfig
) -> None:
    exact = initialize(tiny, init, 7)
    rounded = initialize(tiny, init, 7, torch.bfloat16)
    for name, weight in exact.state_dict().items():
        assert torch.equal(weight.bfloat16(), rounded.state_dict()[name])
    assert rounded.model.rotary_emb.inv_freq.dtype == FP32
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def test_tied_weights_are_one_tensor(tiny: ModelConfig, init: InitConfig) -> None:
    model = initialize(tiny, init, 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rotary_embeddings_are_those_of_a_model_built_plainly(
    tiny: ModelConfig, init: InitConfig
) -> None:
    from transformers import LlamaForCausalLM

    model = initialize(tiny, init, 0)
    plain = LlamaForCausalLM(tiny.to_hf())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.fault("D09")
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_an_untrained_model_starts_as_one_that_knows_nothing(
    tiny: ModelConfig, init: InitConfig, tie_embeddings: bool
) -> None:
    config = dataclasses.replace(tiny, tie_embeddings=tie_embeddings)
    start = check_start(initialize(config, init, 0), 0)
    assert start.expected_loss == pytest.approx(math.log(320))
    assert start.loss == pytest.approx(start.expected_loss, rel=0.05)
    assert start.num_parameters == config.num_parameters


@pytest.mark.fault("D09")
def test_too_wide_a_start_is_refused(tiny: ModelConfig, init: InitConfig) -> None:
    model = initialize(tiny, dataclasses.replace(init, std=1.0), 0)
    with pytest.raises(UsageError, match=r"off ln\(vocab_size\) = 5\.768; set a smaller init\.std"):
        check_start(model, 0)


@pytest.mark.fault("D09")
def test_a_model_that_sees_the_future_is_refused(tiny: ModelConfig, init: InitConfig) -> None:
    model = initialize(tiny, init, 0)
    forward = model.model.forward

    def leaking(**inputs: Any) -> Any:
        num_rows, length = inputs["input_ids"].shape
        mask_btt = torch.ones(num_rows, 1, length, length, dtype=torch.bool)
        return forward(**{**inputs, "attention_mask": mask_btt})

    model.model.forward = leaking
    with pytest.raises(UsageError, match="changed logits before it.*not causal; use another one"):
        check_start(model, 0)


@pytest.mark.fault("D09")
@pytest.mark.parametrize(
    ("implementation", "packed"),
    [
        ("sdpa", False),
        ("eager", False),
        (attention.IMPLEMENTATION, False),
        (attention.IMPLEMENTATION, True),
    ],
)
def test_no_token_sees_a_later_one(
    tiny: ModelConfig, init: InitConfig, implementation: str, packed: bool
) -> None:
    """Whatever attention computes it, and with packed documents as training masks them."""
    attention.register_attention()
    model = initialize(tiny, init, 0).eval()
    model.set_attn_implementation(implementation)
    documents_bt = torch.arange(20).div(7, rounding_mode="floor").expand(2, 20)
    mask = attention.document_mask(documents_bt) if packed else None
    with torch.no_grad():
        before_btv = model(input_ids=IDS_BT, attention_mask=mask).logits
        for changed in (5, 13, 19):
            ids_bt = IDS_BT.clone()
            ids_bt[:, changed] += 1
            after_btv = model(input_ids=ids_bt, attention_mask=mask).logits
            assert torch.equal(after_btv[:, :changed], before_btv[:, :changed])
            assert not torch.equal(after_btv[:, changed], before_btv[:, changed])
            later = documents_bt[0] > documents_bt[0, changed]
            if packed:
                assert torch.equal(after_btv[:, later], before_btv[:, later])
            elif changed < 19:
                assert not torch.equal(after_btv[:, -1], before_btv[:, -1])


def test_spread_must_be_positive() -> None:
    with pytest.raises(UsageError, match="std is 0.0; it must be above 0"):
        build(InitConfig, {"std": 0.0, "scale_residual": False, "dtype": "float32"})


@pytest.mark.fault("J05", "J07")
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_saved_model_loads_without_edits_with_equal_logits(
    tiny: ModelConfig,
    init: InitConfig,
    tokenizer_folder: Path,
    tmp_path: Path,
    tie_embeddings: bool,
) -> None:
    config = dataclasses.replace(tiny, tie_embeddings=tie_embeddings)
    model = initialize(config, init, 0)
    manifest = save_model(model, tokenizer_folder, tmp_path / "model", FP32, step=3)
    assert (manifest["kind"], manifest["step"]) == ("model", 3)
    storage.verify_folder(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tie_embeddings
    assert sum(tensor.numel() for tensor in saved.values()) == config.num_parameters
    # Read as anyone would read it; from another process, test_lora.py does the same.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.dtype, loaded.config.tie_word_embeddings) == (FP32, tie_embeddings)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 320
    empty = build_empty(tmp_path / "model", torch.bfloat16, attn_implementation="sdpa")
    assert type(empty) is type(loaded)
    shapes = {name: (p.shape, torch.bfloat16) for name, p in loaded.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.fault("J07")
def test_configuration_files_hold_what_training_used_and_no_path(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    save_model(initialize(tiny, init, 0), tokenizer_folder, tmp_path / "model", torch.bfloat16)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = storage.read_json(tmp_path / "model" / "config.json")
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["bos_token_id"] == tokenizer.bos_token_id
    generation = storage.read_json(tmp_path / "model" / "generation_config.json")
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)}
    assert set(generation["eos_token_id"]) == ends
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert generation["suppress_tokens"] == reserved_ids(tokenizer)
    assert generation["suppress_tokens"]
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path) not in path.read_text()
        assert str(tokenizer_folder) not in path.read_text()


@pytest.mark.fault("J04")
def test_generation_never_gives_a_reserved_token(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = initialize(tiny, init, 0)
    reserved = reserved_ids(load_tokenizer(tokenizer_folder))
    with torch.no_grad():
        # A model that would rather say nothing else.
        model.model.embed_tokens.weight[reserved] *= 50
    save_model(model, tokenizer_folder, tmp_path / "model", FP32)
    loaded: Any = load_model(tmp_path / "model")
    assert set(logits(loaded).argmax(-1).flatten().tolist()) <= set(reserved)
    given = loaded.generate(
        IDS_BT[:1], attention_mask=torch.ones_like(IDS_BT[:1]), max_new_tokens=8, do_sample=False
    )
    assert not set(given[0, IDS_BT.shape[1] :].tolist()) & set(reserved)


def test_compiled_and_wrapped_names_never_reach_a_file(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = initialize(tiny, init, 0)
    expected = logits(model)
    layers = model.model.layers
    layers[0] = torch.compile(layers[0])
    layers[1] = checkpoint_wrapper(layers[1])
    compiled: Any = torch.compile(model)
    assert unwrap_compiled_model(compiled) is model
    assert unwrap_compiled_model(model) is model
    assert any("_orig_mod" in name for name in model.state_dict())
    save_model(compiled, tokenizer_folder, tmp_path / "model", FP32)
    for path in (tmp_path / "model").iterdir():
        assert b"_orig_mod" not in path.read_bytes()
        assert b"_checkpoint_wrapped" not in path.read_bytes()
    assert torch.equal(logits(load_model(tmp_path / "model")), expected)
    assert plain_name("_orig_mod.model.layers.0._orig_mod.x") == "model.layers.0.x"


def test_gathered_weights_are_saved_in_place_of_the_models_own(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, trained = initialize(tiny, init, 0), initialize(tiny, init, 1)
    # Gathered tied weights come twice, as tensors of their own.
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    save_model(model, tokenizer_folder, tmp_path / "model", FP32, state_dict=state)
    assert torch.equal(logits(load_model(tmp_path / "model")), logits(trained))
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"first 'model\.norm\.weight'; nothing was written"):
        save_model(model, tokenizer_folder, tmp_path / "other", FP32, state_dict=state)
    assert not (tmp_path / "other").exists()


def test_many_shards_with_an_index(
    tiny: ModelConfig,
    init: InitConfig,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sevenfold.model.llama.MAX_SHARD_SIZE", "20KB")
    model = initialize(tiny, init, 0)
    save_model(model, tokenizer_folder, tmp_path / "model", FP32)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path / "model")), logits(model))


@pytest.mark.fault("J04")
def test_a_vocabulary_with_too_few_rows_is_refused(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = initialize(dataclasses.replace(tiny, vocab_size=312), init, 0)
    with pytest.raises(BadDataError, match="320 entries, but the model has 312.*vocab_size 312 or"):
        save_model(model, tokenizer_folder, tmp_path / "model", FP32)
    assert not (tmp_path / "model").exists()


@pytest.mark.fault("J04")
def test_padded_rows_of_a_model_from_outside_are_never_generated(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """The rows stay, as the model came with them; that they are never said is in the folder."""
    model = initialize(dataclasses.replace(tiny, vocab_size=384), init, 0)
    with torch.no_grad():
        # A model that would rather say nothing else.
        model.model.embed_tokens.weight[320:] *= 50
    save_model(model, tokenizer_folder, tmp_path / "model", FP32)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert set(range(320, 384)) <= set(written["suppress_tokens"])
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert min(logits(loaded).argmax(-1).flatten().tolist()) >= 320
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 5.0}):
        given = loaded.generate(
            IDS_BT[:1], attention_mask=torch.ones_like(IDS_BT[:1]), max_new_tokens=16, **sampling
        )
        assert max(given[0, IDS_BT.shape[1] :].tolist()) < 320


@pytest.mark.fault("J07")
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 123_456.0},
        {
            "rope_type": "llama3",
            "rope_theta": 50_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_shapes_the_logits_comes_back_from_the_folder(
    tiny: ModelConfig,
    tokenizer_folder: Path,
    tmp_path: Path,
    rope: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    config = tiny.to_hf()
    config.rope_parameters = rope
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    # The frequencies are no weights and stay exact; to() rounds them with the rest.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    save_model(model, tokenizer_folder, tmp_path / "model", dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    known = from_hf(config)
    assert from_hf(loaded.config) == known
    assert known.rope_theta == rope["rope_theta"]
    assert {**loaded.config.rope_parameters, **rope} == loaded.config.rope_parameters
    tokenizer = load_tokenizer(tokenizer_folder)
    written = GenerationConfig.from_pretrained(tmp_path / "model")
    for name in ("bos_token_id", "pad_token_id"):
        assert getattr(written, name) == getattr(loaded.config, name) == getattr(tokenizer, name)
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in written.eos_token_id


def test_weights_that_are_not_finite_are_not_saved(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = initialize(tiny, init, 0)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(DivergedError, match=r"'model\.norm\.weight' holds NaN.*earlier checkpoint"):
        save_model(model, tokenizer_folder, tmp_path / "model", FP32)
    assert not (tmp_path / "model").exists()


def test_folders_that_are_no_model_are_refused(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no config\.json here; name a Hugging Face folder"):
        load_model(tmp_path)
    folder = tmp_path / "model"
    save_model(initialize(tiny, init, 0), tokenizer_folder, folder, FP32)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file(
        {n: t for n, t in state.items() if n != "model.norm.weight"}, weights, {"format": "pt"}
    )
    with pytest.raises(
        CheckpointError, match=r"first 'model\.norm\.weight'; export the model again"
    ):
        load_model(folder)
    save_file({**state, "model.norm.weight": torch.ones(5)}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not load as a causal language model"):
        load_model(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="use a complete folder of a model that transformers"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(UsageError, match=r"no \*\.safetensors here.*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_whose_weights_come_from_elsewhere_is_the_one_that_loading_gives(
    tiny: ModelConfig, init: InitConfig, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    """To the bit, and with what no checkpoint holds; what is not filled in is noticed."""
    tiny = dataclasses.replace(tiny, tie_embeddings=tied)
    save_model(initialize(tiny, init, 0), None, tmp_path / "model", dtype)
    loaded = load_model(tmp_path / "model", dtype)
    model = build_unfilled(tmp_path / "model", dtype, "cpu", attn_implementation="sdpa")
    assert all(bool(parameter.isnan().all()) for parameter in model.parameters())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in loaded.named_parameters()]
    model.load_state_dict(loaded.state_dict())
    buffers = dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(logits(model.eval()), logits(loaded.eval()))


def test_code_that_lies_in_a_model_folder_is_not_run(
    tiny: ModelConfig, init: InitConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_model(initialize(tiny, init, 0), tokenizer_folder, folder, FP32)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="does not load as a causal language model"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()
