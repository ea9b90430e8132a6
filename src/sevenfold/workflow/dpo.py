"""Stage dpo: chosen answers above rejected ones, relative to the model it starts from."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sevenfold.base import records, storage
from sevenfold.base.config import fingerprint
from sevenfold.base.errors import SevenfoldError
from sevenfold.base.hardware import OOMHandler, detect_gpu_type, release_memory
from sevenfold.data.packing import PackedPreferences, Preference
from sevenfold.model import float8, llama
from sevenfold.objective.next_token import Objective, Scorer
from sevenfold.objective.preference import (
    input_magnitudes,
    preference_objective,
    reference_scores,
)
from sevenfold.train import parallel
from sevenfold.workflow import training, workbench
from sevenfold.workflow.recipe import DPOConfig, Recipe

log = logging.getLogger(__name__)

# Beside the log-probabilities: what FP8's inputs reached when they were computed.
MAGNITUDES = "input_magnitudes.npy"
TORCHAOS_SCALES = (
    "dpo: torchao's FP8 casts by scales of the rows that are computed together, so margins begin "
    "some nats from 0; with --no-fp8 they begin at 0, as in FP8 on one node with bf16 weights"
)
_T = TypeVar("_T")


def dpo(run: records.Run, recipe: Recipe, options: training.StageOptions) -> None:
    """Train the promoted SFT model on ``data/dpo``."""
    source = training.open_source(run, "sft", options)
    job = training.open_job(
        run,
        recipe,
        "dpo",
        section=recipe.dpo,
        config=recipe.dpo.train,
        source=source,
        data=training.open_rows(run, recipe, "dpo", source),
        options=options,
    )
    if job is None:
        return
    rows, held_out = preference_rows(job)
    scorer = workbench.load_scorer(job)
    workbench.place(scorer, job.recipe, job.stage, job.config, job.processes)
    refer(job, scorer, {"train": rows, "validation": held_out})
    bench = workbench.assemble(job, scorer, objective(recipe.dpo), rows, held_out)
    last = workbench.train(job, bench)
    training.export(job, bench)
    if job.processes.is_main:
        training.close(job, bench, last)


def objective(config: DPOConfig) -> Objective:
    """Return what the recipe's settings say is to be minimised."""
    return preference_objective(
        beta=config.beta,
        nll_weight=config.nll_weight,
        loss=config.loss,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
    )


def preference_rows(job: training.Job) -> tuple[PackedPreferences, PackedPreferences]:
    """Pack the prepared preferences, for training and held out."""
    from datasets import load_from_disk

    pad_id = llama.load_tokenizer(job.source.folder).pad_token_id or 0
    packed = []
    for part in ("rows", "validation"):
        table = load_from_disk(str(job.run.data("dpo") / part))
        columns = zip(table["prompt_ids"], table["chosen_ids"], table["rejected_ids"], strict=True)
        preferences = [Preference(*row) for row in columns]
        packed.append(
            PackedPreferences(
                preferences,
                job.config.longest_context,
                pad_id=pad_id,
                seed=job.recipe.seed,
                packing=job.recipe.dpo.packing,
                share_prompts=job.recipe.dpo.share_prompts,
            )
        )
    return packed[0], packed[1]


def refer(job: training.Job, scorer: Scorer, parts: dict[str, PackedPreferences]) -> None:
    """Give every pair the reference model's log-probabilities, computed once and kept.

    What is stored under another key, or is damaged, is computed again. In FP8 the scales by which
    they were computed are those of training, too, so that both round alike.
    """
    key = reference_key(job, scorer)
    folder = job.folder / "reference"
    if job.processes.is_main:
        _set_aside_if_damaged(folder, parts)
    job.processes.wait()
    if (folder / storage.MANIFEST).is_file() and storage.read_manifest(folder).get("key") == key:
        if (folder / MAGNITUDES).is_file():
            float8.hold_inputs(scorer, torch.from_numpy(storage.read_array(folder / MAGNITUDES)))
        for name, rows in parts.items():
            rows.reference_n2 = storage.read_array(folder / f"{name}.npy")
        return
    magnitudes = _with_fewer_rows(job, functools.partial(_magnitudes, job, scorer, parts["train"]))
    if magnitudes is not None:
        float8.hold_inputs(scorer, torch.from_numpy(magnitudes))
    scores = {}
    for name, rows in parts.items():
        found = _with_fewer_rows(job, functools.partial(_scores, job, scorer, rows))
        scores[name] = rows.reference_n2 = found
    if job.processes.is_main:
        with storage.new_folder(folder, kind="reference", key=key) as new:
            for name, array in scores.items():
                storage.write_array(new / f"{name}.npy", array)
            if magnitudes is not None:
                storage.write_array(new / MAGNITUDES, magnitudes)
    job.processes.wait()


def _with_fewer_rows(job: training.Job, work: Callable[[int], _T]) -> _T:
    """Do ``work`` with as many rows at a time as training; where memory runs out, with fewer.

    Errors:
        MemoryExhaustedError: recovery is off, several processes score together, or one row alone
            does not fit.
    """
    recovery = job.options.oom_recovery and job.processes.world == 1
    memory = OOMHandler(job.config.rows_at_once, enabled=recovery)
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return work(memory.micro_batch)
        memory.halve({"phase": "reference", "seq_len": job.config.longest_context})
        release_memory()


def _magnitudes(
    job: training.Job, scorer: Scorer, rows: PackedPreferences, micro_batch: int
) -> NDArray[np.float32] | None:
    """Return what FP8's inputs reach in a batch; None if nothing is cast by held scales."""
    if job.config.precision == "fp8_torchao" and job.processes.is_main:
        log.warning(TORCHAOS_SCALES)
    if job.config.precision != "fp8":
        return None
    return input_magnitudes(
        scorer,
        rows,
        num_rows=job.config.tokens_per_batch // rows.row_length,
        micro_batch=micro_batch,
        device=job.processes.device,
        autocast=parallel.autocast(job.config, job.processes),
    )


def _scores(
    job: training.Job, scorer: Scorer, rows: PackedPreferences, micro_batch: int
) -> NDArray[np.float32]:
    """Score the answers."""
    return reference_scores(
        scorer,
        rows,
        micro_batch=micro_batch,
        device=job.processes.device,
        autocast=parallel.autocast(job.config, job.processes),
    )


def reference_key(job: training.Job, scorer: Scorer) -> str:
    """Return a fingerprint of everything that the reference's log-probabilities depend on.

    Model, data and packing; precision, kernels, compilation, device and the libraries' versions,
    which change rounding. Not the micro-batch, which may shrink within a run.
    """
    versions = records.package_versions()
    facts = {
        "inputs": job.inputs,
        "row_length": job.config.longest_context,
        "packing": job.recipe.dpo.packing,
        "share_prompts": job.recipe.dpo.share_prompts,
        "seed": job.recipe.seed,
        "precision": job.config.precision,
        "held_room": float8.HELD_ROOM,
        "weights": job.config.weights,
        "deterministic": job.config.deterministic,
        "compile": job.config.compile,
        "kernel": scorer.kernel,
        "liger": job.recipe.kernels.liger,
        "device": detect_gpu_type()["name"],
        "processes": job.processes.world,
        "versions": {name: versions.get(name) for name in ("torch", "torchao", "transformers")},
    }
    return fingerprint(facts)


def _set_aside_if_damaged(folder: Path, parts: dict[str, PackedPreferences]) -> None:
    """Move stored log-probabilities out of the way where they are not what was written."""
    storage.sweep(folder.parent)
    if not folder.exists():
        return
    try:
        storage.verify_folder(folder)
        for name in parts:
            storage.read_array(folder / f"{name}.npy")
    except (SevenfoldError, OSError, ValueError) as problem:
        numbers = (n for n in itertools.count(1) if not _damaged(folder, n).exists())
        aside = _damaged(folder, next(numbers))
        storage.move_folder(folder, aside)
        log.warning("%s; set aside as %s, and computed again", problem, aside.name)


def _damaged(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.damaged-{number}")
