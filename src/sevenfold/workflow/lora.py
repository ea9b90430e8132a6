"""Stage lora: SFT of small adapters on a frozen model; adapter and merged model are kept."""

from __future__ import annotations

import torch

from sevenfold.base import records
from sevenfold.model import lora as adapters
from sevenfold.model.llama import save_model
from sevenfold.objective.next_token import NEXT_TOKEN
from sevenfold.workflow import training, workbench
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.sft import conversation_rows


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
        data=training.open_data(run, "lora"),
        options=options,
    )
    if job is None:
        return
    rows, held_out = conversation_rows(job, run.data("lora"))
    scorer = workbench.load_scorer(job)
    torch.manual_seed(recipe.seed)
    scorer.model = adapters.add_adapter(scorer.model, recipe.lora.adapter)
    workbench.place(scorer, job.config, job.processes)
    bench = workbench.assemble(job, scorer, NEXT_TOKEN, rows, held_out)
    last = workbench.train(job, bench)
    if job.processes.is_main:
        adapters.save_adapter(scorer.model, run.stage("lora") / "adapter")
        merged = adapters.merge_adapter(scorer.model)
        save_model(merged, job.tokenizer, run.model("lora"), training.model_dtype(job))
        training.close(job, bench, last, row_fill=rows.fill)
    job.processes.wait()
