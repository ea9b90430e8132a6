"""Stage pretrain: next tokens of packed text, with a curriculum of context lengths."""

from __future__ import annotations

from sevenfold.base import records, storage
from sevenfold.data.batches import PackedText
from sevenfold.data.shards import open_shards
from sevenfold.model import llama
from sevenfold.objective.next_token import NEXT_TOKEN
from sevenfold.workflow import training, workbench
from sevenfold.workflow.recipe import Recipe


def pretrain(run: records.Run, recipe: Recipe, options: training.StageOptions) -> None:
    """Train the initial model on ``data/packed``, or on the folder given with ``--data``."""
    config = recipe.pretrain
    source = training.open_source(run, "init", options)
    tokenizer = llama.load_tokenizer(source.folder if source.external else run.tokenizer)
    shards = open_shards(
        options.data or run.data("packed"),
        vocab_size=len(tokenizer),
        min_length=config.longest_context,
        tokenizer_fingerprint=storage.read_manifest(run.tokenizer)["fingerprint"],
    )
    job = training.open_job(
        run,
        recipe,
        "pretrain",
        section=recipe.pretrain,
        config=config,
        source=source,
        data=shards.fingerprint,
        options=options,
    )
    if job is None:
        return
    bos_id = tokenizer.bos_token_id if config.mask_documents else None
    scorer = workbench.load_scorer(job)
    workbench.place(scorer, job.config, job.processes)
    bench = workbench.assemble(
        job,
        scorer,
        NEXT_TOKEN,
        PackedText(shards.train, bos_id=bos_id),
        PackedText(shards.validation, bos_id=bos_id),
    )
    last = workbench.train(job, bench)
    training.export(job, bench)
    if job.processes.is_main:
        training.close(job, bench, last)
