"""Models of other families on a GPU: windows in FlexAttention, the check before, four bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.objective.test_outside_models import FAMILIES, alone, build, some_ids

from sevenfold.data.packing import PackedConversations, PackedPreferences, Piece, Preference
from sevenfold.model.config import LoRAAdapterConfig
from sevenfold.model.four_bits import freeze_in_four_bits
from sevenfold.model.lora import add_adapter
from sevenfold.objective.agreement import require_agreement
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer
from sevenfold.objective.preference import answer_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROW = 256
GPU = torch.device("cuda")


def model_on(device: torch.device, family: str, attention: str = "sevenfold") -> Any:
    # Heads of 16 at least, as FlexAttention's kernels need them.
    sizes = {**FAMILIES[family], "hidden_size": 64, "head_dim": 16}
    return build(family, attention, max_position_embeddings=ROW, **sizes).to(device)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_each_alone_on_the_cpu(family: str) -> None:
    ours, theirs = model_on(GPU, family), model_on(torch.device("cpu"), family, "eager")
    generator = np.random.default_rng(3)
    pieces = [
        Piece(some_ids(generator, length), [0] + [1] * (length - 1))
        for length in (ROW, 2, 130, 9, 60, 40)
    ]
    rows = PackedConversations(pieces, ROW, pad_id=0, seed=1)
    batch = rows.batch(np.arange(rows.num_rows), ROW).to(GPU)
    total = NEXT_TOKEN.total(Scorer(ours, kernel="plain"), batch).total
    expected = torch.stack([alone(theirs, list(p.ids[:1]), list(p.ids[1:])) for p in pieces]).sum()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    total.backward()
    expected.backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for (name, mine), known in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert float((mine.grad.cpu() - known.grad).abs().max()) < 0.02 * largest, name


@pytest.mark.parametrize("family", ["mistral", "qwen3-sliding"])
def test_windows_reach_over_a_shared_prompt(family: str) -> None:
    ours, theirs = model_on(GPU, family), model_on(torch.device("cpu"), family, "eager")
    generator = np.random.default_rng(4)
    pairs = [Preference(*(some_ids(generator, n) for n in (60, 40, 70)))]
    rows = PackedPreferences(pairs, ROW, pad_id=0, seed=1, share_prompts=True)
    batch = rows.batch(np.arange(1), ROW).to(GPU)
    with torch.no_grad():
        found = answer_scores(Scorer(ours, kernel="plain")(batch), batch)[0][0, 0].cpu()
        expected = [
            -alone(theirs, pairs[0].prompt, a) for a in (pairs[0].chosen, pairs[0].rejected)
        ]
    assert torch.allclose(found, torch.stack(expected), rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_computed_rightly_are_let_in(family: str, dtype: torch.dtype) -> None:
    require_agreement(Scorer(model_on(GPU, family).to(dtype), kernel="plain"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_learns_on_four_bits_in_compiled_layers() -> None:
    base = model_on(torch.device("cpu"), "llama").bfloat16()
    error = freeze_in_four_bits(base, GPU, torch.bfloat16)
    assert 0.05 < error < 0.12
    torch.manual_seed(0)
    shape = LoRAAdapterConfig(r=4, alpha=8.0, dropout=0.0, targets="all-linear")
    adapted = add_adapter(base, shape).train()
    for layer in adapted.get_base_model().model.layers:
        layer.compile(dynamic=False)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-2)
    ids_bt = torch.arange(128, device=GPU)[None] * 7 % 70
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", torch.bfloat16):
            loss = adapted(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
