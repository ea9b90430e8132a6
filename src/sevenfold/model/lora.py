"""LoRA adapters with PEFT: add, check, merge, save, load.

PEFT takes seconds to import, so it is imported when an adapter is first touched.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from sevenfold.base import storage
from sevenfold.base.errors import CheckpointError, UsageError, nearest
from sevenfold.model import adapting
from sevenfold.model.adapting import ADAPTER
from sevenfold.model.config import LoRAAdapterConfig
from sevenfold.model.llama import unwrap_compiled_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: LoRAAdapterConfig) -> PeftModel:
    """Freeze ``model`` and add an adapter that changes nothing until it is trained.

    With DoRA on bf16 weights that holds to rounding only. Its weights are fp32, drawn from
    PyTorch's CPU generator: seed that first. Its products are computed in the type of what the
    layer reads (DoRA's in fp32).

    Errors:
        UsageError: a target matches no linear module; the message names the nearest.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = find_targets(model, config.targets)
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if not config.use_dora and not config.dropout:
        settings._register_custom_module({nn.Linear: adapting.make_linear})
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property that was renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, settings)
    variant = _InTypeOfInput()  # one for all, so that layers look the same to a compiler
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and not config.use_dora:
            module.cast_input_dtype_enabled = False
            module.lora_variant[ADAPTER] = variant
    adapting.share_inputs(adapted)
    return adapted


class _InTypeOfInput:
    """How PEFT computes a layer's adapter: in bf16 where the layer is, from weights in fp32.

    PEFT's own way would write each input and each output in fp32, twice the bytes of the layer's.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return ``result`` [..., o] with what the adapter makes of ``x`` [..., i] added."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        if x.dtype == up.weight.dtype:
            change: Tensor = up(down(x)) * scaling
        else:
            inner = functional.linear(x, down.weight.to(x.dtype))
            change = functional.linear(inner, (up.weight * scaling).to(x.dtype))
        return result + change


def find_targets(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """Return the last parts of the names of the linear modules that ``targets`` means.

    The head is not offered: where it is tied, adapting it would change the embedding as well.

    Errors:
        UsageError: a target matches nothing, or there is no target.
    """
    head = model.get_output_embeddings()
    known = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if targets == ALL_LINEAR:
        return sorted(known)
    if not targets:
        raise UsageError(f"lora.targets is empty; name modules or write {ALL_LINEAR}")
    for target in targets:
        if target not in known:
            raise UsageError(
                f"lora.targets: '{target}' matches no linear module of this model"
                f"{nearest(target, known | {ALL_LINEAR})}"
            )
    return sorted(targets)


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter that cannot be the result of training.

    Errors:
        UsageError: ``model`` holds no adapter.
        CheckpointError: a weight is not finite, or the adapter is zero everywhere.
    """
    trained: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if "lora_" in name
    }
    if not trained:
        raise UsageError(
            "the model holds no LoRA adapter, or it was merged already; give the model that "
            "add_adapter returned"
        )
    for name, parameter in trained.items():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(
                f"adapter weight '{name}' holds NaN or infinity; go back to an earlier checkpoint "
                "and lower schedule.peak_lr"
            )
    if not any(bool(weight.any()) for name, weight in trained.items() if "lora_B" in name):
        raise CheckpointError(
            "the adapter is zero everywhere, so it was not trained; run the lora stage "
            "(scripts/10_lora.py) again and look at lora.train.duration and schedule.peak_lr"
        )


@torch.no_grad()
def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Add the adapter to the weights, in place, and return the plain model.

    Each product is computed in fp64 and each sum in fp32, then rounded once to the weight's type;
    with DoRA, rows get their learnt lengths before that.

    Errors:
        UsageError, CheckpointError: as :func:`check_adapter`.
    """
    from peft.tuners.lora import LoraLayer

    inner: Any = unwrap_compiled_model(model)
    check_adapter(inner)
    for module in inner.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            # fp64 because TF32 may be on for fp32 products.
            module.lora_A.double()
            module.lora_B.double()
            change = module.get_delta_weight(ADAPTER)
            merged = weight.float() + change.float()
            if ADAPTER in module.lora_magnitude_vector:
                lengths = module.lora_magnitude_vector[ADAPTER].weight.double()
                merged = merged * (lengths / merged.double().norm(dim=1))[:, None]
            weight.copy_(merged.to(weight.dtype))
    plain: PreTrainedModel = inner.unload()
    return plain


def save_adapter(
    model: PeftModel,
    target: Path,
    *,
    base: str = "",
    base_fingerprint: str = "",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Write the adapter as a PEFT folder, and return its manifest.

    Args:
        model: what :func:`add_adapter` returned, compiled or not.
        target: the folder to make.
        base: what to call the base model inside; never a path of this machine.
        base_fingerprint: fingerprint of the base model's folder, kept in the manifest.
        state_dict: the weights, where ``model`` itself holds only a share of them.

    Errors:
        UsageError: ``base`` is an absolute path, or as :func:`check_adapter`.
        CheckpointError: as :func:`check_adapter`.
    """
    if Path(base).is_absolute():
        raise UsageError(f"base '{base}' is a path of this machine; give a name such as dpo/model")
    inner: Any = unwrap_compiled_model(model)
    check_adapter(inner)
    settings = inner.peft_config[ADAPTER]
    settings.base_model_name_or_path = base or None
    with storage.new_folder(target, kind="adapter", base_fingerprint=base_fingerprint) as folder:
        inner.save_pretrained(
            folder, safe_serialization=True, save_embedding_layers=False, state_dict=state_dict
        )
        # PEFT writes its targets in an order that differs from process to process, and a model
        # card of placeholders; equal adapters should be equal bytes.
        written = storage.read_json(folder / "adapter_config.json", CheckpointError)
        written["target_modules"] = sorted(written["target_modules"])
        text = json.dumps(written, indent=2, ensure_ascii=False)  # PEFT's own, without a seal
        storage.write_text(folder / "adapter_config.json", f"{text}\n")
        storage.write_text(folder / "README.md", _card(base, settings))
    return storage.read_manifest(target)


def _card(base: str, settings: Any) -> str:
    kind = "DoRA" if settings.use_dora else "LoRA"
    return (
        "---\nlibrary_name: peft\n---\n\n"
        f"{kind} adapter of rank {settings.r} (alpha {settings.lora_alpha:g}), made with Sevenfold "
        f"on {base or 'the model it was trained from'}. Load it with "
        "`peft.PeftModel.from_pretrained(model, folder)`.\n"
    )


def load_adapter(
    model: PreTrainedModel, folder: Path, *, base_fingerprint: str | None = None
) -> PeftModel:
    """Put a saved adapter on its base model.

    Errors:
        CheckpointError: the adapter was trained on another base, its bytes have changed, its
            weights are no safetensors, or it does not fit this model.
    """
    from peft import PeftModel

    manifest = storage.verify_folder(folder, CheckpointError)
    if not (folder / WEIGHTS).is_file():
        # PEFT would go on to look for a pickle.
        raise CheckpointError(
            f"{folder}: no {WEIGHTS}, and other weight files are not read; save the adapter with "
            "safetensors"
        )
    trained_on = manifest.get("base_fingerprint")
    if base_fingerprint is not None and trained_on != base_fingerprint:
        raise CheckpointError(
            f"{folder}: trained on the base model {str(trained_on)[:12]}, not on this one "
            f"({base_fingerprint[:12]}); load it on the model it was trained on"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: the adapter does not fit this model: {reason}; load it on the model it "
            "was trained on"
        ) from error
