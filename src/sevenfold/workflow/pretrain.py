"""Stage pretrain: next tokens of packed text, with a curriculum of context lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sevenfold.base import records, storage
from sevenfold.base.errors import UsageError
from sevenfold.data.batches import PackedText
from sevenfold.data.shards import PackedShards, open_shards
from sevenfold.model import llama
from sevenfold.objective.next_token import NEXT_TOKEN
from sevenfold.train import parallel
from sevenfold.workflow import contamination, prepare, prepared, training, workbench
from sevenfold.workflow.initialize import initialize
from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)


def pretrain(run: records.Run, recipe: Recipe, options: training.StageOptions) -> None:
    """Train the initial model on ``data/packed``, or on the folder given with ``--data``."""
    config = recipe.pretrain
    if options.data is None:
        prepared.require_current(run, recipe, "packed")
        contamination.require_searched(run, recipe, "packed")
    elif options.start_from is None:
        _initialize_for_ids(run, recipe, options.data, _known_files(run, options))
    source = training.open_source(run, "init", options)
    tokenizer = _tokenizer_of(source)
    shards = _open_shards(run, recipe, options, source, tokenizer)
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
    if job.processes.is_main:
        prepared.note_files(job.folder, shards.files)
    bos_id = None if tokenizer is None else tokenizer.bos_token_id
    if config.mask_documents and bos_id is None:
        log.warning("no tokenizer says where documents begin: rows are read as plain text")
    bos_id = bos_id if config.mask_documents else None
    scorer = workbench.load_scorer(job)
    workbench.place(scorer, job.recipe, job.stage, job.config, job.processes)
    bench = workbench.assemble(
        job,
        scorer,
        NEXT_TOKEN,
        PackedText(shards.train, bos_id=bos_id, pad_id=shards.pad_id),
        PackedText(shards.validation, bos_id=bos_id, pad_id=shards.pad_id),
    )
    last = workbench.train(job, bench)
    training.export(job, bench)
    if job.processes.is_main:
        facts: dict[str, Any] = {}
        if options.data is not None:
            num_rows = shards.train.num_rows + shards.validation.num_rows
            facts["data_sources"] = prepared.packed_sources(options.data, num_rows)
        training.close(job, bench, last, **facts)


def _open_shards(
    run: records.Run,
    recipe: Recipe,
    options: training.StageOptions,
    source: records.Source,
    tokenizer: Any,
) -> PackedShards:
    """Open the packed rows, once it is sure that their ids are the model's."""
    tokenized = None
    if tokenizer is not None and not source.external:
        training.require_same_tokenizer(run, source)
        tokenized = str(storage.read_manifest(run.tokenizer)["fingerprint"])
    elif tokenizer is not None and options.data is None:
        require_same_ids(run, source, tokenizer)
    folder = options.data or run.data("packed")
    shards = open_shards(
        folder,
        vocab_size=recipe.model.vocab_size if tokenizer is None else len(tokenizer),
        min_length=recipe.pretrain.longest_context,
        tokenizer_fingerprint=tokenized,
        known=_known_files(run, options),
    )
    if options.resume:
        prepared.require_same_files(run.stage("pretrain"), folder, shards.files)
    return shards


def _known_files(run: records.Run, options: training.StageOptions) -> dict[str, str] | None:
    """Return the files whose ids need not be looked at again.

    A checkpoint goes on with the model that they were looked at for, unless it is forced to.
    """
    stage = run.stage("pretrain")
    if options.force is not None or not training.goes_on(stage, options):
        return None
    return prepared.known_files(stage)


def _initialize_for_ids(
    run: records.Run, recipe: Recipe, folder: Path, known: Mapping[str, str] | None
) -> None:
    """Make what steps 01 to 04 would have made for a folder of packed ids.

    The ids are checked first, unless they are known: that they are the same is looked at later. A
    tokenizer is taken over where ``tokenizer.path`` names one.
    """
    if known is None:
        vocab_size, min_length = recipe.model.vocab_size, recipe.pretrain.longest_context
        open_shards(folder, vocab_size=vocab_size, min_length=min_length)
    processes = parallel.join()
    if processes.is_main:
        if recipe.tokenizer.path is not None:
            prepare.make_tokenizer(run, recipe)
        initialize(run, recipe, ids_only=True)
    processes.wait()


def _tokenizer_of(source: records.Source) -> Any:
    """Return the tokenizer beside a model, or None where it was trained on ids alone."""
    if not (source.folder / "tokenizer.json").is_file():
        return None
    return llama.load_tokenizer(source.folder)


def require_same_ids(run: records.Run, source: records.Source, tokenizer: Any) -> None:
    """Refuse a model from outside for which the run's ids stand for other pieces of text.

    The run's tokenizer may have more entries, such as those that were added when it was taken over.

    Errors:
        UsageError: naming an entry.
    """
    own = llama.load_tokenizer(run.tokenizer).get_vocab()
    for piece, token_id in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if own.get(piece) != token_id:
            raise UsageError(
                f"{source.folder}: another tokenizer than the run's, for which id {token_id} is "
                f"not {piece!r}; set tokenizer.path to this folder and run "
                f"{prepared.SCRIPTS['packed']} again, or give rows packed with it by --data"
            )
