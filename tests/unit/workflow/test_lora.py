"""The adapter and the model it merges into: on the right base only, and whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.base import faults, storage
from sevenfold.base.errors import CheckpointError
from sevenfold.base.records import Run, Source
from sevenfold.model import float8
from sevenfold.model.config import InitConfig, LoRAAdapterConfig, ModelConfig
from sevenfold.model.llama import initialize, load_model, save_model
from sevenfold.model.lora import add_adapter, load_adapter
from sevenfold.workflow import lora

INIT = InitConfig(std=0.06, scale_residual=False, dtype="float32")
ADAPTER = LoRAAdapterConfig(r=2, alpha=4.0, dropout=0.0, targets="all-linear")
DORA = dataclasses.replace(ADAPTER, use_rslora=True, use_dora=True)
IDS_BT = torch.arange(24).view(2, 12)


def write_base(folder: Path, seed: int) -> str:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_seq_len=16,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    save_model(initialize(config, INIT, seed), None, folder, torch.float32)
    return str(storage.read_manifest(folder)["fingerprint"])


@pytest.fixture(params=["lora", "dora"])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """The parts of a job that the end of the stage reads."""
    run = Run(folder=tmp_path / "run", facts={"preset": "demo"})
    adapter = DORA if request.param == "dora" else ADAPTER
    folder = run.model("dpo")
    found = write_base(folder, 0)
    return types.SimpleNamespace(
        run=run,
        folder=run.stage("lora"),
        source=Source(folder=folder, fingerprint=found, stage="dpo"),
        recipe=types.SimpleNamespace(
            lora=types.SimpleNamespace(adapter=adapter), init=types.SimpleNamespace(dtype="float32")
        ),
    )


@pytest.fixture
def trained(job: Any) -> dict[str, torch.Tensor]:
    """Weights as training leaves them, under the scorer's names."""
    adapted = add_adapter(load_model(job.source.folder), job.recipe.lora.adapter)
    torch.manual_seed(1)
    weights = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    return {f"model.{name}": torch.randn_like(weight) * 0.1 for name, weight in weights.items()}


def fingerprints(job: Any) -> list[str | None]:
    """Identify what the stage wrote, after checking every byte of it."""
    folders = (job.folder / "adapter", job.run.model("lora"))
    return [storage.verify_folder(f)["fingerprint"] if f.exists() else None for f in folders]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS_BT).logits
    return found


@pytest.mark.fault("J01")
def test_the_merged_model_says_what_the_adapter_says(
    job: Any, trained: dict[str, torch.Tensor]
) -> None:
    lora._export(job, trained)
    base = load_model(job.source.folder)
    plain = logits(base)
    adapted = load_adapter(base, job.folder / "adapter", base_fingerprint=job.source.fingerprint)
    assert (logits(adapted) - plain).abs().max() > 1e-2
    assert (logits(load_model(job.run.model("lora"))) - logits(adapted)).abs().max() <= 1e-5


def test_the_scales_of_fp8_stay_out_of_the_adapter(
    job: Any, trained: dict[str, torch.Tensor]
) -> None:
    lora._export(job, trained)
    plain = fingerprints(job)
    history = {f"model.base_model.model.model.{float8.HISTORY}": torch.ones(3, 16)}
    lora._export(job, {**trained, **history})
    assert fingerprints(job) == plain


@pytest.mark.fault("J02")
def test_another_base_than_the_trained_one_is_refused(
    job: Any, trained: dict[str, torch.Tensor]
) -> None:
    write_base(job.source.folder, 1)
    with pytest.raises(CheckpointError, match=r"changed since.*not merged; put the model back and"):
        lora._export(job, trained)
    assert fingerprints(job) == [None, None]
    assert not job.folder.exists()


@pytest.mark.fault("J02")
def test_interrupted_anywhere_the_merge_is_whole_or_absent(
    job: Any, trained: dict[str, torch.Tensor]
) -> None:
    before = faults._operations_done
    lora._export(job, trained)
    num_operations, whole = faults._operations_done - before, fingerprints(job)
    seen = set()
    for part in range(1, 9):
        for folder in (job.folder / "adapter", job.run.model("lora")):
            storage.remove_folder(folder)
        child = os.fork()
        if child == 0:
            os.environ[faults.VARIABLE] = f"kill@fs:{num_operations * part // 9}"
            faults._operations_done = 0
            lora._export(job, trained)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        storage.sweep(job.folder)
        found = fingerprints(job)
        assert found in ([None, None], [whole[0], None], whole)
        seen.add(tuple(found))
        lora._export(job, trained)
        assert fingerprints(job) == whole
        assert not list(job.folder.glob(".*"))
    assert len(seen) > 1
