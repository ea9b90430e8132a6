"""Whether a GGUF file holds the model it was made from: read back by two readers, and compared.

The package ``gguf`` reads the tensors, transformers the whole model and its tokenizer; both must
agree with the model folder, and with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sevenfold.base.errors import BadDataError
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.model.gguf_file import (
    BLOCK,
    named_tensors,
    read_llama_config,
    require_gguf,
)
from sevenfold.model.llama import load_model, named_generator

PROBE_TEXTS = (
    "Hello, world! It's 7 o'clock; we'll see 1234567 stars, won't we?",
    "  two spaces,\ttabs\n\n\nand lines \r\n   ",
    "naïve café Ünïcödé 日本語 العربية हिन्दी 🙂👩‍👩‍👧 \u200d ½ Ⅷ",
    "def f(x):\n    return x**2 != 3.14e-5  # `code` <b>&amp;</b>",
    "DON'T 'twas I'LL [[{((~^|\\/)}]] ___ ... --- ===",
)
PROBE_CHAT = (
    {"role": "user", "content": "What is two plus three?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": " And one more? "},
)
PROBE_ROWS, PROBE_TOKENS = 2, 64
LOGIT_TOLERANCE = 1e-3
_MAX_PROBE_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a reloaded GGUF file showed: how many tensors, and how far its logits are off."""

    num_tensors: int
    max_logit_change: float
    mean_kl_nats: float


def compare_gguf(folder: Path, path: Path, weight_type: str) -> Comparison:
    """Read ``path`` back and compare it with the model ``folder`` that it was made from.

    Errors:
        BadDataError: a tensor, a setting, the tokenizer or the logits are not what they must be.
    """
    config = read_llama_config(folder)
    values = _read_tensors(path, config)
    num_lossy = 0
    for name, weights in named_tensors(folder, config):
        source = weights[:].float().numpy()
        if name not in values or values[name].shape != source.shape:
            raise _wrong(path, f"tensor '{name}' is missing or of another shape")
        kind = weight_type if source.ndim > 1 else "f32"
        if not _within_rounding(values[name], source, kind):
            raise _wrong(path, f"tensor '{name}' is not the model's, rounded to {kind}")
        num_lossy += not np.array_equal(values[name], source)
    _compare_tokenizers(folder, path)
    before = _logits(load_model(folder))
    model = _load(path)
    _compare_with_second_reader(path, model, values, folder, config)
    after = _logits(model)
    change = float((after - before).abs().max())
    if not num_lossy and not change <= LOGIT_TOLERANCE:
        raise _wrong(path, f"its logits are up to {change:.3g} off, its weights are the same")
    before_log, after_log = before.log_softmax(-1), after.log_softmax(-1)
    divergence = (before_log.exp() * (before_log - after_log)).sum(-1).mean()
    return Comparison(
        num_tensors=len(values), max_logit_change=change, mean_kl_nats=float(divergence)
    )


def _wrong(path: Path, what: str) -> BadDataError:
    return BadDataError(
        f"{path}: read back, {what}; nothing is kept; try another version of the package gguf"
    )


def _read_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return every tensor as fp32, in transformers' order of rows."""
    gguf = require_gguf()
    return {
        tensor.name: _deinterleave(
            tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type), config
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def _deinterleave(
    name: str, values_rc: NDArray[np.float32], config: Mapping[str, Any]
) -> NDArray[np.float32]:
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return values_rc
    width = config["head_dim"]
    rows = np.arange(len(values_rc))
    head, place = rows // width, rows % width
    # Row ``place`` of a head stands among the even ones if it is of the first half.
    found: NDArray[np.float32] = values_rc[
        head * width + place % (width // 2) * 2 + place // (width // 2)
    ]
    return found


def _within_rounding(
    found: NDArray[np.float32], source: NDArray[np.float32], weight_type: str
) -> bool:
    if weight_type in ("f32", "f16", "bf16"):
        kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        rounded = torch.from_numpy(source).to(kinds[weight_type]).float().numpy()
        return bool(np.isfinite(found).all()) and np.array_equal(found, rounded)
    blocks = np.abs(source).reshape(-1, BLOCK).max(axis=1, keepdims=True)
    # Half a unit of the scale, and what fp16 rounds off the scale itself, 127 times.
    allowed = blocks / 127 * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25
    error = np.abs(found - source).reshape(-1, BLOCK)
    return bool((error <= allowed).all())


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _wrong(path, f"it does not load as a model ({reason})") from error


def _compare_with_second_reader(
    path: Path,
    model: Any,
    values: Mapping[str, NDArray[np.float32]],
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    names = require_gguf().get_tensor_name_map(
        require_gguf().MODEL_ARCH.LLAMA, config["num_hidden_layers"]
    )
    tied = set(model.all_tied_weights_keys)
    loaded = {
        names.get_name(name, try_suffixes=(".weight",)): tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    for name in sorted(loaded.keys() | values.keys()):
        if name not in loaded or not np.array_equal(loaded[name], values[name]):
            raise _wrong(path, f"tensor '{name}' is another one to transformers than to gguf")
    kept = load_config(folder)
    for field in ("max_position_embeddings", "vocab_size", "rms_norm_eps", "rope_parameters"):
        ours, theirs = getattr(kept, field), getattr(model.config, field)
        if not _same(ours, theirs):
            raise _wrong(path, f"'{field}' is {theirs}, not {ours}")


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, float):  # a GGUF holds them in fp32
        return bool(np.float32(ours) == np.float32(theirs))
    return bool(ours == theirs)


def load_config(folder: Path) -> Any:
    """Return the configuration of a model folder as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    model.eval()
    length = min(PROBE_TOKENS, model.config.max_position_embeddings)
    ids_bt = torch.randint(
        model.config.vocab_size, (PROBE_ROWS, length), generator=named_generator(0, "compare_gguf")
    )
    logits: torch.Tensor = model(input_ids=ids_bt, use_cache=False).logits.float()
    return logits


def _compare_tokenizers(folder: Path, path: Path) -> None:
    """Compare ids of fixed texts and of every entry's own text, and the rendered conversation."""
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder)
    try:
        theirs = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _wrong(path, f"its tokenizer does not load ({reason})") from error
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    for end in ends:
        if getattr(ours, end) != getattr(theirs, end):
            raise _wrong(path, f"{end} is {getattr(theirs, end)}, not {getattr(ours, end)}")
    entries = [ours.decode([index]) for index in range(len(ours))]
    texts = [*PROBE_TEXTS, *(text for text in entries if len(text) <= _MAX_PROBE_CHARACTERS)]
    expected, found = ours(texts)["input_ids"], theirs(texts)["input_ids"]
    for text, ids, other in zip(texts, expected, found, strict=True):
        if ids != other:
            raise _wrong(path, f"its tokenizer makes {other[:8]} of {text[:40]!r}, not {ids[:8]}")
    if ours.chat_template is not None:
        rendered = [
            each.apply_chat_template(list(PROBE_CHAT), tokenize=False, add_generation_prompt=True)
            for each in (ours, theirs)
        ]
        if rendered[0] != rendered[1]:
            raise _wrong(path, f"its chat template renders {rendered[1][:80]!r}")
