"""A recipe so small that all twelve steps take seconds, and gates that let it pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.warm import Warm, forks_work

REPOSITORY = Path(__file__).parents[2]
WARM = Warm(
    *(f"sevenfold.workflow.{name}" for name in ("evaluation", "outside", "pipeline", "planning")),
    *(f"sevenfold.workflow.{name}" for name in ("prepare", "steps", "workbench")),
    *(f"sevenfold.workflow.{name}" for name in ("pretrain", "sft", "dpo", "lora")),
    *("sevenfold.verify.report", "datasets", "peft", "torch._dynamo"),
    "transformers.models.llama.modeling_llama",
)
VILLAGE = {
    "seed": 3,
    "num_documents": 600,
    "num_validation_documents": 60,
    "num_instructions": 300,
    "instruction_replay": 0.2,
    "num_preferences": 120,
    "unsafe_share": 0.5,
    "preference_replay": 0.3,
    "num_domain_rows": 150,
    "domain_replay": 0.5,
    "num_evaluation_items": 8,
}
MODEL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 128,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
}
STAGES = ("pretrain", "sft", "dpo", "lora")


def training(steps: int, peak_lr: float, contexts: list[tuple[int, float]]) -> dict[str, Any]:
    return {
        "duration": {"steps": steps},
        "tokens_per_batch": 512,
        "contexts": [{"length": length, "until": until} for length, until in contexts],
        "micro_batch": 2,
        "mask_documents": True,
        "optimizer": {
            "kind": "adamw",
            "betas": [0.9, 0.95],
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        "schedule": {
            "kind": "cosine",
            "peak_lr": peak_lr,
            "final_lr": 0.0,
            "warmup_fraction": 0.1,
        },
        "precision": "fp32",
        "weights": "fp32",
        "compile": "none",
        "recompute": False,
        "deterministic": False,
        "validate_every": 5,
        "validation_batches": 1,
        "checkpoint_every": 4,
        "keep_checkpoints": 3,
        "log_every": 1,
        "keep_best": False,
        "spike_sigma": 6.0,
        "max_skipped_steps": 0,
        "max_rollbacks": 0,
    }


PREFERRING = {
    "packing": "tight",
    "beta": 0.1,
    "loss": "sigmoid",
    "label_smoothing": 0.0,
    "length_normalized": False,
    "nll_weight": 1.0,
    "share_prompts": True,
}


def recipe() -> dict[str, Any]:
    """Return the recipe as plain values; JSON is YAML too."""
    rows = {"sources": [], "max_length": 128, "validation_fraction": 0.05}
    whole = [(128, 1.0)]
    shape = {"r": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
    adapter = {"packing": "drawn", "base": "full", "adapter": shape}
    tasks = [
        {"name": "validation", "kind": "text"},
        {"name": "village_statements", "kind": "choice"},
        {"name": "village_facts", "kind": "exact"},
        {"name": "village_safety", "kind": "safety"},
        {"name": "village_preferences", "kind": "preference"},
    ]
    return {
        "seed": 3,
        "model": MODEL,
        "tracking": "none",
        "data": {"sources": [], "mixture": None, "validation_fraction": 0.0, "village": VILLAGE},
        "clean": {
            "min_characters": 4,
            "document_characters": 4000,
            "unicode_form": "NFC",
            "repair": False,
            "languages": None,
            "quality": [],
            "mask_pii": False,
            "deduplicate": "exact",
        },
        "decontaminate": {"ngram": 13},
        "tokenizer": {
            "vocab_size": 512,
            "path": None,
            "max_digits": 3,
            "sample_characters": 200000,
        },
        "pack": {"row_length": 128, "dtype": "uint16", "strategy": "concatenate"},
        "init": {"std": 0.06, "scale_residual": False, "dtype": "float32"},
        "kernels": {"liger": False, "cce": False},
        "pretrain": training(12, 5e-3, [(32, 0.4), (128, 1.0)]),
        "sft": {
            "data": rows,
            "packing": "tight",
            "neftune_noise_alpha": 0.5,
            "train": training(10, 2e-3, whole),
        },
        "dpo": {**PREFERRING, "data": rows, "train": training(9, 1e-3, whole)},
        "lora": {**adapter, "data": rows, "train": training(10, 4e-3, whole)},
        "evaluate": {
            "tasks": tasks,
            "confidence": 0.95,
            "seed": 1,
            "max_new_tokens": 12,
            "sample_prompts": ["What is the job of Tom?"],
        },
    }


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write the recipe with top-level ``changes``."""
    path = folder / "miniature.yaml"
    path.write_text(json.dumps({**recipe(), **changes}))
    return path


def write_gates(folder: Path, *, limit: float = 5.0) -> Path:
    """Write a gate file in which everything passes below ``limit`` bits per byte."""
    check = {"metric": "bits_per_byte", "max": limit, "min_samples": 20}
    sections = {"custom": {stage: [check] for stage in STAGES}}
    path = folder / "gates.yaml"
    path.write_text(json.dumps({"confidence": 0.95, **sections}))
    return path


def environment(faults: str) -> dict[str, str]:
    """Return what a process that is started here is to find in its environment."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "SEVENFOLD_FAULTS": faults,
    }


def sevenfold(
    *arguments: str | Path,
    faults: str = "",
    timeout_s: float = 300,
    program: tuple[str, str] = ("-m", "sevenfold.workflow.cli"),
    cwd: Path = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
    """Run a verb as people do, in a process of its own."""
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(faults),
        cwd=cwd,
        check=False,
    )


def forked(
    *arguments: str | Path, faults: str = "", cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a verb like `sevenfold`, in a fork of a process that has imported what it needs."""
    if not forks_work():
        return sevenfold(*arguments, faults=faults, cwd=cwd)
    function = "sevenfold.workflow.cli:main"
    return WARM.call(function, *arguments, environment=environment(faults), cwd=cwd)


def fingerprint(run: Path, stage: str) -> str:
    """Return the fingerprint of a stage's finished model."""
    found: str = json.loads((run / stage / "model" / "manifest.json").read_text())["fingerprint"]
    return found


def losses(run: Path, stage: str) -> dict[int, str]:
    """Return the loss of each step, as a hexadecimal number."""
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: float(row["loss"]).hex() for row in rows if "event" not in row}


def without(run: Path, stage: str) -> None:
    """Take back a stage and those after it."""
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(run / later)
