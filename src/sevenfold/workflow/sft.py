"""Stage sft: answers in conversations, several to a row, each alone in its row's attention."""

from __future__ import annotations

from pathlib import Path

from sevenfold.base import records
from sevenfold.data.best_fit import Packing
from sevenfold.data.packing import PackedConversations, Piece
from sevenfold.model import llama
from sevenfold.objective.next_token import NEXT_TOKEN
from sevenfold.workflow import training, workbench
from sevenfold.workflow.recipe import Recipe


def sft(run: records.Run, recipe: Recipe, options: training.StageOptions) -> None:
    """Train the promoted pretrained model on ``data/sft``."""
    source = training.open_source(run, "pretrain", options)
    job = training.open_job(
        run,
        recipe,
        "sft",
        section=recipe.sft,
        config=recipe.sft.train,
        source=source,
        data=training.open_rows(run, recipe, "sft", source),
        options=options,
    )
    if job is None:
        return
    rows, held_out = conversation_rows(job, run.data("sft"), recipe.sft.packing)
    scorer = workbench.load_scorer(job)
    scorer.neftune_noise_alpha = recipe.sft.neftune_noise_alpha
    workbench.place(scorer, job.recipe, job.stage, job.config, job.processes)
    bench = workbench.assemble(job, scorer, NEXT_TOKEN, rows, held_out)
    last = workbench.train(job, bench)
    training.export(job, bench)
    if job.processes.is_main:
        training.close(job, bench, last, row_fill=rows.fill)


def conversation_rows(
    job: training.Job, folder: Path, packing: Packing
) -> tuple[PackedConversations, PackedConversations]:
    """Pack the prepared conversations, for training and held out."""
    from datasets import load_from_disk

    pad_id = llama.load_tokenizer(job.source.folder).pad_token_id or 0
    packed = []
    for part in ("rows", "validation"):
        table = load_from_disk(str(folder / part))
        columns = zip(table["input_ids"], table["loss_mask"], strict=True)
        pieces = [Piece(ids, mask) for ids, mask in columns]
        packed.append(
            PackedConversations(
                pieces,
                job.config.longest_context,
                pad_id=pad_id,
                seed=job.recipe.seed,
                packing=packing,
            )
        )
    return packed[0], packed[1]
