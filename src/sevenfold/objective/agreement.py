"""Whether packed rows say of a model from outside what the model says of each document alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sevenfold.base.errors import UsageError
from sevenfold.data.batches import NO_TARGET, Batch
from sevenfold.model.attention import IMPLEMENTATION
from sevenfold.objective.next_token import Scorer

# Together as long as FlexAttention's smallest block: shorter rows go another way there.
LENGTHS = (11, 60, 1, 56)
# Mean differences in nats, on a CPU in fp32 and otherwise (bf16, TF32 on a GPU). SmolLM2 has 5e-6
# in fp32 and 0.07 in bf16, whose rounding adds up over 30 layers of random tokens; logits that are
# scaled otherwise, or documents that see each other, more than 1.
EXACT, ROUNDED = 1e-3, 0.3
SEED = 7


def require_agreement(scorer: Scorer) -> None:
    """Refuse a model that the scorer does not score as the model does itself.

    Four documents of random tokens stand in one row, and each alone in the model's own forward.

    Errors:
        UsageError: the scores differ, or the model's parts are not where Llama's are.
    """
    causal = scorer.causal_model
    kind = causal.config.model_type
    other = "start from a model like Llama, Mistral, Qwen or SmolLM2"
    head = causal.get_output_embeddings()
    if head is None or not hasattr(causal.get_decoder(), "layers"):
        raise UsageError(
            f"model type '{kind}' has no decoder layers and head to train here; {other}"
        )
    if getattr(head, "bias", None) is not None:
        raise UsageError(f"model type '{kind}' adds a bias to its logits, left out here; {other}")
    difference = _difference(scorer, causal)
    is_exact = causal.dtype == torch.float32 and causal.device.type == "cpu"
    if not difference <= (EXACT if is_exact else ROUNDED):
        raise UsageError(
            f"model type '{kind}': packed documents score {difference:.2g} nats a token off what "
            f"the model says of each alone, so it computes something that is not done here; {other}"
        )


@torch.no_grad()
def _difference(scorer: Scorer, causal: Any) -> float:
    """Return the mean absolute difference of the targets' scores, in nats."""
    generator = torch.Generator().manual_seed(SEED)
    num_rows = causal.get_input_embeddings().weight.shape[0]
    documents = [torch.randint(num_rows, (length,), generator=generator) for length in LENGTHS]
    numbers = torch.cat([torch.full_like(ids, i) for i, ids in enumerate(documents)])
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    following = [functional.pad(ids[1:], (0, 1), value=NO_TARGET) for ids in documents]
    batch = Batch(
        inputs_bt=torch.cat(documents)[None],
        targets_bt=torch.cat(following)[None],
        positions_bt=positions[None],
        documents_bt=numbers[None],
    ).to(causal.device)
    was_training = causal.training
    causal.eval()
    packed_t = scorer(batch)[0].float()
    causal.set_attn_implementation("eager")
    alone = []
    for ids, targets in zip(documents, following, strict=True):
        logits_tv = causal(input_ids=ids[None].to(causal.device), use_cache=False).logits[0]
        targets = targets.to(causal.device)
        alone.append(functional.cross_entropy(logits_tv.float(), targets, reduction="none"))
    causal.set_attn_implementation(IMPLEMENTATION)
    causal.train(was_training)
    wanted = batch.targets_bt[0] != NO_TARGET
    return float((packed_t - torch.cat(alone))[wanted].abs().mean())
