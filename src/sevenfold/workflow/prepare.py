"""Steps 01, 02, 03, 06 and 08: from sources to what the training stages read.

Each step is done again only where its inputs or its settings have changed; its folder is then
replaced at once, after everything in it has been checked.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import storage, workers
from sevenfold.base.config import fingerprint, to_plain
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.records import Run
from sevenfold.data import chat, sources, tables, tokenizer
from sevenfold.data.clean import (
    SPLITS,
    fraction_of,
    read_shards,
)
from sevenfold.data.sources import SourceConfig
from sevenfold.workflow import tokenizing
from sevenfold.workflow.clean import clean
from sevenfold.workflow.contamination import INPUT, EvaluationItems
from sevenfold.workflow.prepared import (
    SCRIPTS,
    is_current,
    pair_context,
    rows_config,
    say,
    settings,
    verified,
)
from sevenfold.workflow.raw_data import VILLAGE_LICENCE, download, source_fingerprint
from sevenfold.workflow.recipe import Recipe

__all__ = [
    "clean",
    "download",
    "make_tokenizer",
    "prepare_dpo",
    "prepare_rows",
    "prepare_sft",
    "source_fingerprint",
    "tokenize_and_pack",
]

log = logging.getLogger(__name__)

VILLAGE_ROWS = {"sft": "instructions", "lora": "domain", "dpo": "preferences"}


# --- 03 -----------------------------------------------------------------------------------------


def tokenize_and_pack(run: Run, recipe: Recipe, *, num_workers: int | None = None) -> None:
    """Write ``tokenizer`` and ``data/packed``, with at most so many processes; None: one a core.

    What is written does not depend on their number. ``data/tokens`` holds what is done of it when
    the step is stopped, and goes when it ends.

    Errors:
        UsageError: there is no ``data/clean``, or the tokenizer to take over does not fit.
        BadDataError: not enough text for one row to train on and one held out.
    """
    cleaned = verified(run, "clean")
    made = make_tokenizer(run, recipe)
    target = run.data("packed")
    inputs = {"clean": cleaned["fingerprint"], "tokenizer": _tokenizer_fingerprint(run)}
    inputs[INPUT] = cleaned["inputs"][INPUT]
    config = settings(recipe, "packed")
    if is_current(target, inputs, config):
        storage.remove_folder(run.data("tokens"))
        return
    most = num_workers or workers.usable_cores()
    plan = tokenizing.plan(run.data("clean"), cleaned, made, recipe.pack, most)
    found = {split: tokenizing.encode(run.data("tokens"), plan, split) for split in SPLITS}
    with storage.new_folder(target, kind="packed", inputs=inputs, config=config) as folder:
        counts = {split: tokenizing.pack(folder, plan, split, found[split]) for split in SPLITS}
        for split, count in counts.items():
            if not count["rows"]:
                raise BadDataError(
                    f"{run.data('clean')}: the {split} text has {count['tokens']} tokens, not one "
                    f"row of {recipe.pack.row_length}; give more text, raise "
                    "data.validation_fraction or shorten pack.row_length"
                )
        storage.manifest_facts(
            folder,
            vocab_size=len(made),
            bos_id=made.bos_token_id,
            eos_id=made.eos_token_id,
            pad_id=plan.encoding.pad_id,
            sources=cleaned["sources"],
            decontaminated=cleaned["decontaminated"],
            row_length=recipe.pack.row_length,
            counts=counts,
            tokens_by_source=tokenizing.tokens_by_source(found),
            tokeniser=plan.tokeniser.facts(),
            bytes_per_token=cleaned["bytes"]["train"] / counts["train"]["tokens"],
        )
    storage.remove_folder(run.data("tokens"))
    tokens = " and ".join(f"{counts[split]['tokens']:,} {split}" for split in SPLITS)
    length = cleaned["bytes"]["train"] / counts["train"]["tokens"]
    say(target, f"{tokens} tokens of {length:.2f} bytes in rows of {recipe.pack.row_length}")


def make_tokenizer(run: Run, recipe: Recipe) -> Any:
    """Return the run's tokenizer; train it, or take over ``tokenizer.path``, where that is due.

    Errors:
        UsageError: there is no text to train on, or the tokenizer to take over does not fit.
    """
    config = recipe.tokenizer
    if config.path is None:
        cleaned = storage.read_manifest(run.data("clean"), made_by=SCRIPTS["clean"])
        inputs = {"clean": cleaned["fingerprint"]}
    else:
        folder = Path(config.path).expanduser()
        files = sorted(folder.glob("*.json")) + sorted(folder.glob("*.jinja"))
        inputs = {"path": fingerprint(storage.sha256_files(folder, files))}
    if not is_current(run.tokenizer, inputs, to_plain(config)):
        if config.path is None:
            share = config.sample_characters / max(1, cleaned["characters"]["train"])
            made = tokenizer.train_tokenizer(_sample(run, share), config)
        else:
            made = tokenizer.adopt_tokenizer(config)
        facts = {"vocab_size": len(made), "reserved": len(tokenizer.reserved_ids(made))}
        with storage.new_folder(
            run.tokenizer, kind="tokenizer", inputs=inputs, config=to_plain(config), **facts
        ) as folder:
            made.save_pretrained(str(folder))
        say(run.tokenizer, f"{facts['vocab_size']:,} entries, {facts['reserved']:,} reserved")
    storage.verify_folder(run.tokenizer)
    return tokenizer.load_tokenizer(run.tokenizer)


def _sample(run: Run, share: float) -> Iterator[str]:
    """Yield about this share of the training text, drawn by the documents' names."""
    for document in read_shards(run.data("clean"), "train"):
        if share >= 1 or fraction_of(document["id"]) < share:
            yield document["text"]


def _tokenizer_fingerprint(run: Run) -> str:
    return str(storage.read_manifest(run.tokenizer, made_by=SCRIPTS["tokenizer"])["fingerprint"])


# --- 06 and 08 ----------------------------------------------------------------------------------


def prepare_rows(run: Run, recipe: Recipe, stage: str, tokenizer_folder: Path) -> None:
    """Prepare a stage's rows with the tokenizer of a model from outside the run."""
    if stage == "dpo":
        prepare_dpo(run, recipe, tokenizer_folder)
    else:
        prepare_sft(run, recipe, (stage,), tokenizer_folder)


def prepare_sft(
    run: Run,
    recipe: Recipe,
    stages: Sequence[str] = ("sft", "lora"),
    tokenizer_folder: Path | None = None,
) -> None:
    """Write ``data/sft`` and ``data/lora``: tokenised conversations with their loss masks.

    ``tokenizer_folder`` holds another tokenizer than the run's.

    Errors:
        UsageError: no source, one without a licence, two of one name, or no tokenizer.
        BadDataError: a row is wrong; with file, line and field.
    """
    made, identity = _row_tokenizer(run, recipe, tokenizer_folder)
    items = EvaluationItems(run, recipe)
    for stage in stages:
        chosen, generated = _with_sources(run, recipe, stage, rows_config(recipe, stage))
        inputs = _row_inputs(identity, items, chosen.sources)
        if is_current(run.data(stage), inputs, to_plain(chosen)):
            continue
        with storage.new_folder(
            run.data(stage), kind=stage, inputs=inputs, config=to_plain(chosen)
        ) as folder:
            index = None if generated else items.index
            facts = tables.write_conversations(
                folder, made, chosen, items=index, generated=generated
            )
            _note_rows(folder, facts, items, generated)
        _say_rows(run.data(stage), facts)


def prepare_dpo(run: Run, recipe: Recipe, tokenizer_folder: Path | None = None) -> None:
    """Write ``data/dpo``: tokenised preference pairs; ``tokenizer_folder`` as for SFT.

    Errors:
        UsageError: no source, one without a licence, two of one name, or no tokenizer.
        BadDataError: a row is wrong; with file, line and field.
    """
    made, identity = _row_tokenizer(run, recipe, tokenizer_folder)
    items = EvaluationItems(run, recipe)
    chosen, generated = _with_sources(run, recipe, "dpo", recipe.dpo.data)
    assert isinstance(chosen, chat.PreferenceDataConfig)
    sources.require_licences(chosen.replay, "dpo.data.replay")
    sources.refuse_shared_names((*chosen.sources, *chosen.replay))
    inputs = _row_inputs(identity, items, (*chosen.sources, *chosen.replay))
    config = to_plain(chosen) | pair_context(recipe)
    if is_current(run.data("dpo"), inputs, config):
        return
    with storage.new_folder(run.data("dpo"), kind="dpo", inputs=inputs, config=config) as folder:
        index = None if generated and not chosen.replay else items.index
        facts = tables.write_preferences(
            folder,
            made,
            chosen,
            items=index,
            generated=generated,
            single=bool(generated),
            **pair_context(recipe),
        )
        _note_rows(folder, facts, items, generated)
    _say_rows(run.data("dpo"), facts)


def _row_tokenizer(run: Run, recipe: Recipe, folder: Path | None) -> tuple[Any, str]:
    """Return the tokenizer that rows are made with, and what identifies it in their manifest."""
    if folder is None:
        return _existing_tokenizer(run, recipe), _tokenizer_fingerprint(run)
    made = tokenizer.load_tokenizer(folder)
    return made, tokenizer.tokenizer_fingerprint(made)


def _existing_tokenizer(run: Run, recipe: Recipe) -> Any:
    """Return the run's tokenizer; one that is taken over needs no text and is made here."""
    if recipe.tokenizer.path is not None:
        return make_tokenizer(run, recipe)
    storage.read_manifest(run.tokenizer, made_by=SCRIPTS["tokenizer"])
    storage.verify_folder(run.tokenizer)
    return tokenizer.load_tokenizer(run.tokenizer)


def _note_rows(
    folder: Path, facts: dict[str, Any], items: EvaluationItems, generated: Sequence[SourceConfig]
) -> None:
    names = [source.name for source in generated]
    searched = items.facts(facts["counts"]["dropped"], generated=names)
    storage.manifest_facts(folder, decontaminated=searched, **facts)


def _with_sources(
    run: Run, recipe: Recipe, stage: str, config: chat.ChatDataConfig
) -> tuple[chat.ChatDataConfig, Sequence[SourceConfig]]:
    """Return ``config`` with the village's rows where it names no sources, and those rows."""
    generated: tuple[SourceConfig, ...] = ()
    if not config.sources and recipe.data.village is not None:
        storage.read_manifest(run.data("raw"), made_by=SCRIPTS["raw"])
        rows = run.data("raw") / f"{VILLAGE_ROWS[stage]}.jsonl"
        generated = (SourceConfig(name="village", path=str(rows), licence=VILLAGE_LICENCE),)
        config = dataclasses.replace(config, sources=generated)
    if not config.sources:
        raise UsageError(
            f"{stage}.data.sources: empty; name sources there, or run {SCRIPTS[stage]} with "
            "--source PATH"
        )
    sources.refuse_repeated(config.sources)
    sources.require_licences(config.sources, f"{stage}.data.sources")
    return config, generated


def _row_inputs(
    tokenizer_identity: str, items: EvaluationItems, chosen: Sequence[SourceConfig]
) -> dict[str, str]:
    found = {source.location: source_fingerprint(source) for source in chosen}
    return {"tokenizer": tokenizer_identity, INPUT: items.fingerprint, **found}


def _say_rows(folder: Path, facts: dict[str, Any]) -> None:
    counts = facts["counts"]
    dropped = sum(counts["dropped"].values())
    notes = [f"{facts['rows']:,} rows and {facts['validation_rows']:,} held out"]
    notes += [f"{dropped:,} dropped"] if dropped else []
    notes += [f"{counts['truncated']:,} shortened"] if counts["truncated"] else []
    notes += [f"{counts['rejected']:,} rejected"] if counts["rejected"] else []
    say(folder, ", ".join(notes))
