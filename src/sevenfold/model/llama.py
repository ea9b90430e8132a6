"""Building, loading and exporting a model: transformers' Llama from our configuration."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, CheckpointError, DivergedError, UsageError
from sevenfold.data.tokenizer import load_tokenizer as load_tokenizer
from sevenfold.data.tokenizer import reserved_ids, stop_ids
from sevenfold.model.config import InitConfig, ModelConfig
from sevenfold.model.float8 import HISTORY
from sevenfold.model.kernels import note_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a compiler or a checkpointing wrapper puts into the names of a model's weights.
WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MAX_SHARD_SIZE = "5GB"
# How far the untrained loss may be from ln(vocab_size), as a share of it.
LOSS_TOLERANCE = 0.05
CHECKED_LOGITS = 2**21


def initialize(
    config: ModelConfig,
    init: InitConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """Build a model with fresh weights that depend on ``seed`` and their names only.

    Every matrix is drawn on the CPU in fp32 from a generator of its own, so neither the device
    nor the order nor the number of threads changes a bit. Norms start at one. An untied head is
    drawn with a spread of at most 0.5 / sqrt(hidden_size), so that the first loss is near
    ln(vocab_size) at any width.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config.to_hf())
    _make_room(model.to(dtype), device)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        drawn = [
            pool.submit(_draw, parameter, name, _spread(name, config, init), seed)
            for name, parameter in model.named_parameters()
        ]
        for future in drawn:
            future.result()
    note_model(model)
    return model


def _make_room(model: Any, device: torch.device | str) -> None:
    """Bring a Llama from the meta device to another: its weights have no values yet.

    Rotary frequencies are no weights: they are made anew, on the CPU and in fp32 as loading does.
    """
    model.to_empty(device=device)
    rotary = type(model.model.rotary_emb)(config=model.config)
    model.model.rotary_emb = rotary.to(device)
    model.tie_weights()


def _spread(name: str, config: ModelConfig, init: InitConfig) -> float:
    if name == "lm_head.weight":
        return min(init.std, 0.5 / math.sqrt(config.hidden_size))
    if init.scale_residual and name.endswith(RESIDUAL_PROJECTIONS):
        return init.std / math.sqrt(2 * config.num_layers)
    return init.std


@torch.no_grad()
def _draw(parameter: nn.Parameter, name: str, std: float, seed: int) -> None:
    if parameter.ndim == 1:
        parameter.fill_(1.0)
        return
    values = torch.empty(parameter.shape, dtype=torch.float32)
    values.normal_(0.0, std, generator=named_generator(seed, name))
    parameter.copy_(values)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on ``seed`` and ``name`` only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def require_safetensors(folder: Path) -> None:
    """Refuse a folder whose weights are no safetensors; pickles can run code, so none is read.

    Errors:
        UsageError: there are no such weights.
    """
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder}: no *.safetensors here, and other weight files are not read; convert the "
            "model with save_pretrained"
        )


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load one of our model folders, or any Hugging Face causal model on this disk.

    Only safetensors are read, and no code that lies in the folder is run.

    Errors:
        UsageError: the folder is no Hugging Face model folder.
        CheckpointError: weights are missing, left over, of another shape, or not readable.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: no config.json here; name a Hugging Face folder with config.json and "
            "model*.safetensors"
        )
    require_safetensors(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: does not load as a causal language model: {reason}; "
            "use a complete folder of a model that transformers knows"
        ) from error
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights are missing, left over or of another shape than "
            f"config.json says, first '{sorted(map(str, wrong))[0]}'; export the model again"
        )
    model.to(device)
    note_model(model)
    return model


def build_empty(folder: Path, dtype: torch.dtype, *, attn_implementation: str) -> PreTrainedModel:
    """Build what :func:`load_model` loads, without its weights, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    note_model(model)
    return model


def build_unfilled(
    folder: Path, dtype: torch.dtype, device: torch.device | str, *, attn_implementation: str
) -> PreTrainedModel:
    """Build what :func:`load_model` loads of a Llama, for weights that come from elsewhere.

    Until then they are NaN: one that was forgotten is to be noticed.
    """
    model = build_empty(folder, dtype, attn_implementation=attn_implementation)
    _make_room(model, device)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    return model


def unwrap_compiled_model(model: nn.Module) -> nn.Module:
    """Return the model inside what ``torch.compile(model)`` returned, or ``model`` itself."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def plain_name(name: str) -> str:
    """Return the name a weight has without compiling and checkpointing wrappers."""
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def save_model(
    model: nn.Module,
    tokenizer_folder: Path | None,
    target: Path,
    dtype: torch.dtype,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write ``model`` with its tokenizer as a Hugging Face folder, and return its manifest.

    Args:
        model: the model, compiled or not; an adapter must have been merged.
        tokenizer_folder: the tokenizer whose entries the model's vocabulary rows belong to; None,
            or a folder without one, where the model was trained on ids alone.
        target: the folder to make; an existing one is replaced when the new one is complete.
        dtype: type of the weights written.
        state_dict: all weights, where ``model`` itself holds only a share of them.
        facts: what else the manifest should hold.

    Errors:
        BadDataError: the tokenizer has another number of entries than the model has rows.
        CheckpointError: the given weights are not exactly this model's.
        DivergedError: a weight is not finite.
    """
    from huggingface_hub import save_torch_state_dict

    inner: Any = unwrap_compiled_model(model)
    num_rows = inner.config.get_text_config().vocab_size
    state = _state_to_save(inner, state_dict, dtype)
    with storage.new_folder(target, kind="model", **facts) as folder:
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]
        config.dtype = dtype
        config.use_cache = True
        if tokenizer_folder is not None and (tokenizer_folder / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(tokenizer_folder)
            check_vocabulary(tokenizer, tokenizer_folder, num_rows, exact=False)
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
            _generation_config(tokenizer, num_rows).save_pretrained(folder)
            for name in TOKENIZER_FILES:
                if (tokenizer_folder / name).is_file():
                    storage.write_bytes(folder / name, (tokenizer_folder / name).read_bytes())
        config.save_pretrained(folder)
        save_torch_state_dict(
            state, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"}
        )
    return storage.read_manifest(target)


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, num_rows: int, *, exact: bool = True
) -> None:
    """Refuse a tokenizer that has another number of entries than the model has rows.

    Models from outside often have more rows than entries; not ``exact`` lets them pass.

    Errors:
        BadDataError: the two numbers differ.
    """
    if len(tokenizer) > num_rows or (exact and len(tokenizer) != num_rows):
        raise BadDataError(
            f"{tokenizer_folder}: {len(tokenizer)} entries, but the model has {num_rows} "
            "vocabulary rows; every row needs a token, so train the tokenizer with "
            f"vocab_size {num_rows} or set the model's vocab_size to {len(tokenizer)}"
        )


def _state_to_save(
    model: Any, given: Mapping[str, torch.Tensor] | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the weights under plain names, on the CPU, tied ones once."""
    tied = set(model.all_tied_weights_keys)
    left_out = {*tied, *(name for name in model.state_dict() if name.endswith(HISTORY))}
    expected = {plain_name(name) for name in model.state_dict()} - left_out
    state: dict[str, torch.Tensor] = {}
    for name, tensor in (model.state_dict() if given is None else given).items():
        if plain_name(name) in left_out:
            continue
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        state[plain_name(name)] = tensor.detach().to(device="cpu", dtype=kept).contiguous()
    if wrong := sorted(expected ^ set(state)):
        raise CheckpointError(
            f"{len(wrong)} weights are missing or do not belong to {type(model).__name__}, first "
            f"'{wrong[0]}'; nothing was written; give the gathered weights of this very model"
        )
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(
                f"weight '{name}' holds NaN or infinity; nothing was written; go back to an "
                "earlier checkpoint and lower the learning rate"
            )
    return state


def _generation_config(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end for end in stop_ids(tokenizer) if end is not None] or None,
        pad_token_id=tokenizer.pad_token_id,
        # Neither a reserved token nor a padded row without one may ever be generated.
        suppress_tokens=[*reserved_ids(tokenizer), *range(len(tokenizer), num_rows)] or None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartCheck:
    """What was measured on an untrained model; losses in nats per token."""

    loss: float
    expected_loss: float
    num_parameters: int


@torch.no_grad()
def check_start(model: LlamaForCausalLM, seed: int) -> StartCheck:
    """Check that an untrained model knows nothing and that no token sees a later one.

    Errors:
        UsageError: the loss on random tokens is more than 5 % off ln(vocab_size), or changing a
            token changes logits before it.
    """
    config = model.config
    length = min(32, config.max_position_embeddings)
    # As many rows as cost little: the 7B's head alone takes seconds a row on a CPU.
    rows = max(2, CHECKED_LOGITS // (config.vocab_size * length))
    ids_bt = torch.randint(
        config.vocab_size, (rows, length), generator=named_generator(seed, "check_start")
    ).to(model.device)
    model.eval()
    logits_btv = model(input_ids=ids_bt, use_cache=False).logits.float()
    loss = nn.functional.cross_entropy(logits_btv[:, :-1].flatten(0, 1), ids_bt[:, 1:].flatten())
    expected = math.log(config.vocab_size)
    if not abs(loss.item() - expected) <= LOSS_TOLERANCE * expected:
        raise UsageError(
            f"the untrained model's loss is {loss.item():.3f}, more than 5 % off ln(vocab_size) = "
            f"{expected:.3f}; set a smaller init.std"
        )
    changed_bt = ids_bt.clone()
    changed_bt[:, length // 2 :] = (changed_bt[:, length // 2 :] + 1) % config.vocab_size
    again_btv = model(input_ids=changed_bt, use_cache=False).logits.float()
    before = slice(0, length // 2)
    if not torch.allclose(logits_btv[:, before], again_btv[:, before], rtol=1e-4, atol=1e-4):
        raise UsageError(
            f"changing token {length // 2} changed logits before it: attention "
            f"'{config._attn_implementation}' is not causal; use another one"
        )
    model.train()
    return StartCheck(
        loss=loss.item(),
        expected_loss=expected,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
