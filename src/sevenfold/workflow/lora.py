"""Stage lora: SFT of small adapters on a frozen model; adapter and merged model are kept."""

from __future__ import annotations

import dataclasses
import logging

import torch

from sevenfold.base import records, storage
from sevenfold.base.errors import CheckpointError
from sevenfold.base.hardware import release_memory
from sevenfold.model import attention, float8, llama
from sevenfold.model import lora as adapters
from sevenfold.objective.next_token import NEXT_TOKEN, Scorer
from sevenfold.train import loop, resuming
from sevenfold.workflow import training, workbench
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.sft import conversation_rows

log = logging.getLogger(__name__)


def lora(run: records.Run, recipe: Recipe, options: training.StageOptions) -> None:
    """Train adapters over the promoted DPO model on ``data/lora``."""
    source = training.open_source(run, "dpo", options)
    job = training.open_job(
        run,
        recipe,
        "lora",
        section=recipe.lora,
        config=recipe.lora.train,
        source=source,
        data=training.open_rows(run, recipe, "lora", source),
        options=options,
    )
    if job is None:
        return
    rows, held_out = conversation_rows(job, run.data("lora"), recipe.lora.packing)
    scorer = workbench.load_scorer(job)
    torch.manual_seed(recipe.seed)
    scorer.model = adapters.add_adapter(scorer.model, recipe.lora.adapter)
    workbench.place(scorer, job.recipe, job.stage, job.config, job.processes)
    bench = workbench.assemble(job, scorer, NEXT_TOKEN, rows, held_out)
    last = workbench.train(job, bench)
    trained = resuming.trained_state(bench)
    if job.processes.is_main:
        _export(job, trained)
        facts = _four_bits(job, bench) if recipe.lora.base == "nf4" else {}
        training.close(job, bench, last, row_fill=rows.fill, **facts)
    job.processes.wait()


def _export(job: training.Job, trained: dict[str, torch.Tensor]) -> None:
    """Write the adapter, and the model it merges into.

    The base is opened anew in fp32, so that neither FP8, nor bf16, nor sharding during training
    gets into the merge.

    Errors:
        CheckpointError: the base is no longer the model that the adapter was trained on.
    """
    _require_same_base(job)
    whole = adapters.add_adapter(llama.load_model(job.source.folder), job.recipe.lora.adapter)
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in trained.items()
        if not name.endswith(float8.HISTORY)
    }
    found = whole.load_state_dict(weights, strict=False)
    odd = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
    assert not odd, odd
    adapters.save_adapter(
        whole,
        job.folder / "adapter",
        base=f"{job.source.stage}/model",
        base_fingerprint=job.source.fingerprint,
    )
    merged = adapters.merge_adapter(whole)
    llama.save_model(merged, job.source.folder, job.run.model("lora"), training.model_dtype(job))


def _four_bits(job: training.Job, bench: loop.Workbench) -> dict[str, dict[str, float]]:
    """Return what the four bits cost: held-out losses on the base trained on, and once merged."""
    trained_on = loop.validation_loss(bench)
    bench.scorer.cpu()  # a GPU that has room for four bits may have none for both
    release_memory()
    model = llama.load_model(
        job.run.model("lora"),
        workbench.DTYPES[job.config.weights],
        job.processes.device,
        attn_implementation=attention.IMPLEMENTATION,
    )
    merged = dataclasses.replace(bench, scorer=Scorer(model, kernel=bench.scorer.kernel))
    losses = {"validation_loss": trained_on, "merged": loop.validation_loss(merged)}
    log.info("nf4: held-out loss %(validation_loss).4f, merged %(merged).4f", losses)
    return {"four_bits": losses}


def _require_same_base(job: training.Job) -> None:
    folder = job.source.folder
    found = storage.verify_folder(folder, CheckpointError, exact=True)["fingerprint"]
    if found != job.source.fingerprint:
        raise CheckpointError(
            f"{folder}: changed since the adapter began to be trained on it, so it is not merged; "
            "put the model back and run scripts/10_lora.py again, or train anew with --no-resume"
        )
