"""A pickle that runs code when it is loaded, put in the place of every file that we read."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, CheckpointError, SevenfoldError, UsageError
from sevenfold.data.shards import open_shards
from sevenfold.model.config import InitConfig, LoRAAdapterConfig, ModelConfig
from sevenfold.model.llama import initialize, load_model, load_tokenizer, save_model
from sevenfold.model.lora import add_adapter, load_adapter, save_adapter
from sevenfold.train.checkpoint import Checkpoints
from sevenfold.verify.likelihood import token_counts

pytestmark = pytest.mark.fault("L01")

CONFIG = LoRAAdapterConfig(r=2, alpha=2.0, dropout=0.0, targets=("q_proj",))


class Payload:
    """Makes a folder when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


Write = Callable[[Path, Path], None]


def write_plain(path: Path, marker: Path) -> None:
    """Write a pickle of the oldest kind, which is plain text."""
    path.write_bytes(f"cos\nmkdir\n(S'{marker}'\ntR.".encode())


def write_torch(path: Path, marker: Path) -> None:
    content = io.BytesIO()
    torch.save({"weight": Payload(marker)}, content)
    path.write_bytes(content.getvalue())


def write_numpy(path: Path, marker: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)


WRITERS = (write_plain, write_torch, write_numpy)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


@pytest.fixture
def model() -> Any:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        max_seq_len=16,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    return initialize(config, InitConfig(std=0.06, scale_residual=False, dtype="float32"), 0)


def test_the_payloads_are_real(tmp_path: Path, marker: Path) -> None:
    """Loaded without care they run: what follows would prove nothing otherwise."""
    write_torch(tmp_path / "a", marker)
    torch.load(tmp_path / "a", weights_only=False)
    assert marker.exists()
    marker.rmdir()
    for write in (write_numpy, write_plain):
        write(tmp_path / "a", marker)
        np.load(tmp_path / "a", allow_pickle=True)
        assert marker.exists()
        marker.rmdir()


@pytest.mark.fault("B16")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
def test_in_a_checkpoint(tmp_path: Path, marker: Path, name: str, write: Write) -> None:
    """Whoever can write there can make the manifest agree; so it is the format that protects."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        with storage.new_folder(checkpoints.path(step), kind="checkpoint", step=step) as folder:
            for part in ("model", "optimizer", "random"):
                save_file({"a": torch.ones(2)}, folder / f"{part}.safetensors")
            storage.write_json(folder / "state.json", {})
            if step == 2:
                write(folder / name, marker)
                for other in ("rng_state.pth", "optimizer.pt", ".metadata"):
                    write(folder / other, marker)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    assert not marker.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_in_a_model_folder(tmp_path: Path, marker: Path, write: Write, model: Any) -> None:
    folder = tmp_path / "model"
    save_model(model, None, folder, torch.float32)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        write(folder / name, marker)
    load_model(folder)
    write(folder / "model.safetensors", marker)
    with pytest.raises(CheckpointError, match="does not load as a causal language model"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="other weight files are not read; convert the model"):
        load_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        write(folder / name, marker)
        with pytest.raises(SevenfoldError):
            load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_in_an_adapter(tmp_path: Path, marker: Path, name: str, write: Write, model: Any) -> None:
    adapted = add_adapter(model, CONFIG)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.fill_(0.1)
    save_adapter(adapted, tmp_path / "adapter", base_fingerprint="x")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    write(tmp_path / "adapter" / name, marker)
    storage.write_manifest(tmp_path / "adapter", kind="adapter", base_fingerprint="x")
    message = "other weight files are not read" if name.endswith("bin") else "does not fit this mod"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapted.unload(), tmp_path / "adapter", base_fingerprint="x")
    assert not marker.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_in_arrays(tmp_path: Path, marker: Path, write: Write) -> None:
    """Packed tokens, and the stored scores of the reference model."""
    path = tmp_path / "packed" / "train-00000.npy"
    path.parent.mkdir()
    write(path, marker)
    with pytest.raises(BadDataError, match=r"train-00000\.npy"):
        open_shards(path.parent, vocab_size=64, min_length=8)
    with pytest.raises(ValueError, match="magic string|Object arrays"):
        storage.read_array(path)
    with pytest.raises((ValueError, AttributeError)):
        token_counts([path], 64)
    shutil.copy(path, tmp_path / "record.json")
    with pytest.raises(BadDataError, match="not valid JSON"):
        storage.read_json(tmp_path / "record.json")
    assert not marker.exists()
