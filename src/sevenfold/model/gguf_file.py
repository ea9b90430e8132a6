"""A model folder as one GGUF file, which llama.cpp and what is built on it read.

Names, the order of the rotary halves and the settings are those of llama.cpp's own converter for
Llama. Tensors are read, converted and written one at a time, so that a 7B needs little memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sevenfold.base import storage
from sevenfold.base.errors import UsageError, install_command
from sevenfold.data.tokenizer import END, load_tokenizer, word_pattern

INSTALL = install_command("gguf")
WEIGHT_TYPES = ("f32", "f16", "bf16", "q8_0")
STORED_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BLOCK = 32  # values that share a scale in q8_0
CONVERTER = "llama.cpp's convert_hf_to_gguf.py may know more about it"
# llama.cpp knows a way of cutting text into words by its name only.
WAYS_TO_CUT = {
    word_pattern(3): "llama-bpe",
    word_pattern(1): "qwen2",
    word_pattern(1).replace("{1,1}", ""): "qwen2",
}
_GENERATION_MARKS = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def require_gguf() -> Any:
    """Return the package ``gguf``.

    Errors:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError(f"a GGUF file needs the package gguf; {INSTALL}") from None
    return gguf


def stored_type(folder: Path) -> str:
    """Return the type that holds the weights of a model folder without loss."""
    config = storage.read_json(folder / "config.json")
    return STORED_TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "f32")


def write_gguf(folder: Path, target: Path, weight_type: str, *, name: str) -> None:
    """Write the model in ``folder`` as the GGUF file ``target``, in a folder being made.

    Matrices become ``weight_type``; vectors stay fp32, as llama.cpp wants them.

    Errors:
        UsageError: GGUF cannot hold this model, its tokenizer, or rows of this length.
    """
    gguf = require_gguf()
    config = read_llama_config(folder)
    writer = gguf.GGUFWriter(target, "llama")
    _describe_model(writer, gguf, config, weight_type, name)
    _describe_tokenizer(writer, gguf, folder, config["vocab_size"])
    tensors = [
        (gguf_name, weights, _kind(gguf, gguf_name, weights.get_shape(), weight_type))
        for gguf_name, weights in named_tensors(folder, config)
    ]
    for gguf_name, weights, kind in tensors:
        shape = weights.get_shape()
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // per_block * block_bytes
        values = np.dtype(np.float32)
        writer.add_tensor_info(gguf_name, shape, values, num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for gguf_name, weights, kind in tensors:
        values_rc = interleave(gguf_name, weights[:].float().numpy(), config)
        writer.write_tensor_data(gguf.quants.quantize(values_rc, kind))
    writer.close()


def read_llama_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` with head counts and rotary base filled in.

    Errors:
        UsageError: it is no Llama, or one with something that GGUF's ``llama`` has no place for.
    """
    path = folder / "config.json"
    config: dict[str, Any] = storage.read_json(path)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wanted = {
        "architectures": (config.get("architectures"), ["LlamaForCausalLM"]),
        "hidden_act": (config.get("hidden_act"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for field, (found, expected) in wanted.items():
        if found != expected:
            raise UsageError(
                f"{path}:{field}: {found!r}, but only plain Llama models ({expected!r}) are "
                f"written as GGUF; {CONVERTER}"
            )
    num_heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or num_heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // num_heads
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return config


def named_tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return each stored tensor under its name in a GGUF, still on the disk.

    Errors:
        UsageError: a weight is none of a Llama's.
    """
    from safetensors import safe_open

    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - it is no dictionary
                gguf_name = names.get_name(stored, try_suffixes=(".weight",))
                if gguf_name is None:
                    raise UsageError(f"{path}: weight '{stored}' is none of a Llama's; {CONVERTER}")
                yield gguf_name, file.get_slice(stored)


def interleave(
    gguf_name: str, values_rc: NDArray[np.float32], config: Mapping[str, Any]
) -> NDArray[np.float32]:
    """Put the rows of a query or key projection into llama.cpp's order.

    It rotates neighbouring rows of a head, transformers a row and the one half a head further on.
    """
    if gguf_name.endswith("attn_q.weight"):
        num_heads = config["num_attention_heads"]
    elif gguf_name.endswith("attn_k.weight"):
        num_heads = config["num_key_value_heads"]
    else:
        return values_rc
    halves = values_rc.reshape(num_heads, 2, config["head_dim"] // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values_rc.shape)


def _kind(gguf: Any, gguf_name: str, shape: list[int], weight_type: str) -> Any:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if weight_type == "q8_0" and shape[-1] % BLOCK:
        raise UsageError(
            f"{gguf_name}: rows of {shape[-1]} values, but q8_0 packs them by {BLOCK}; "
            "choose --type f16"
        )
    return gguf.GGMLQuantizationType[weight_type.upper()]


def _describe_model(
    writer: Any, gguf: Any, config: Mapping[str, Any], weight_type: str, name: str
) -> None:
    file_type = "ALL_F32" if weight_type == "f32" else f"MOSTLY_{weight_type.upper()}"
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _describe_tokenizer(writer: Any, gguf: Any, folder: Path, num_rows: int) -> None:
    tokenizer = load_tokenizer(folder)
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_way_to_cut(folder, layout))
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    kinds = {token["id"]: "CONTROL" if token["special"] else "USER_DEFINED"
             for token in layout["added_tokens"]}  # fmt: skip
    # Rows beyond the tokenizer's last entry have no token, and are never asked for.
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(num_rows)])
    types = [kinds.get(i, "NORMAL" if i in words else "UNUSED") for i in range(num_rows)]
    writer.add_token_types([gguf.TokenType[kind] for kind in types])
    merges = layout["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    ends = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id, "eot": tokenizer.get_vocab().get(END)}  # fmt: skip
    for end, index in ends.items():
        if index is not None:
            getattr(writer, f"add_{end}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(chat_template(tokenizer))


def chat_template(tokenizer: Any) -> str:
    """Return the chat template without the marks that only training looks at.

    Most readers of GGUF know no ``{% generation %}``, and what is rendered does not depend on it.
    """

    def as_comment(mark: re.Match[str]) -> str:
        return f"{{#{mark[1]}{mark[2]}#}}"

    return _GENERATION_MARKS.sub(as_comment, tokenizer.chat_template)


def _way_to_cut(folder: Path, layout: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how this tokenizer cuts text into words.

    Errors:
        UsageError: it has none, or the tokenizer does something else that a GGUF cannot say.
    """
    path = folder / "tokenizer.json"
    model, first = layout["model"], layout["pre_tokenizer"] or {}
    name = _name_of_cut(first)
    problem = None
    if model["type"] != "BPE" or model.get("byte_fallback") or layout["normalizer"] is not None:
        problem = "it is no plain byte-level BPE"
    elif name is None:
        problem = "llama.cpp has no name for the way it cuts text into words"
    elif any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in layout["added_tokens"]):
        problem = "an added token swallows spaces, or stands for whole words only"
    elif _merges_decide(layout) and model.get("ignore_merges", False) != (name == "llama-bpe"):
        problem = "it has entries that merging does not make, and llama.cpp treats those otherwise"
    if name is None or problem is not None:
        raise UsageError(f"{path}: not written as GGUF: {problem}; {CONVERTER}")
    return name


def _name_of_cut(step: Mapping[str, Any]) -> str | None:
    plain = {"add_prefix_space": False, "use_regex": True}
    if step.get("type") == "ByteLevel" and plain.items() <= step.items():
        return "gpt-2"
    steps = step.get("pretokenizers") or []
    if [part["type"] for part in steps] != ["Split", "ByteLevel"]:
        return None
    split, level = steps
    isolated = split["behavior"] == "Isolated" and not split["invert"]
    if not isolated or level["add_prefix_space"] or level["use_regex"]:
        return None
    return WAYS_TO_CUT.get(split["pattern"].get("Regex", ""))


def _merges_decide(layout: Mapping[str, Any]) -> bool:
    """True if an entry of the vocabulary is not what merging its bytes makes."""
    from tokenizers import Tokenizer

    layout = {**layout, "model": {**layout["model"], "ignore_merges": False}}
    merging = Tokenizer.from_str(json.dumps(layout)).model
    added = {token["content"] for token in layout["added_tokens"]}
    return any(
        len(merging.tokenize(word)) != 1 for word in layout["model"]["vocab"] if word not in added
    )
