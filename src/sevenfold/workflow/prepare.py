"""Steps 01, 02, 03, 06 and 08: from sources to what the training stages read.

Each step is done again only where its inputs or its settings have changed; its folder is then
replaced at once, after everything in it has been checked.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import fingerprint, to_plain
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.records import Run
from sevenfold.data import chat, shards, sources, tables, tokenizer
from sevenfold.data.clean import (
    SPLITS,
    CleaningCounts,
    Document,
    DocumentWriter,
    assign_splits,
    clean_documents,
    fraction_of,
    read_shards,
)
from sevenfold.data.sources import SourceConfig
from sevenfold.data.village import Village
from sevenfold.workflow.prepared import (
    SCRIPTS,
    is_current,
    rows_config,
    say,
    settings,
    verified,
)
from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)

VILLAGE_LICENCE = "generated"
VILLAGE_ROWS = {"sft": "instructions", "lora": "domain", "dpo": "preferences"}
_BATCH_DOCUMENTS = 512


# --- 01 -----------------------------------------------------------------------------------------


def download(run: Run, recipe: Recipe) -> None:
    """Write ``data/raw``: the documents of the recipe's sources, or of the village.

    Errors:
        UsageError: a source is not there, is given twice, or states no licence.
        BadDataError: a source holds something it must not hold; what was there stays.
    """
    chosen, village = recipe.data.sources, recipe.data.village
    sources.refuse_repeated(chosen)
    sources.require_licences(chosen, "data.sources")
    config = settings(recipe, "raw")
    inputs = {source.location: source_fingerprint(source) for source in chosen}
    if is_current(run.data("raw"), inputs, config):
        return
    with storage.new_folder(run.data("raw"), kind="raw", inputs=inputs, config=config) as folder:
        if village is None:
            facts = _write_documents(folder, chosen)
        else:
            facts = _write_village(folder, Village(village))
        storage.manifest_facts(folder, **facts)
    say(run.data("raw"), f"{facts['documents']:,} documents")


def source_fingerprint(source: SourceConfig) -> str:
    """Return a fingerprint of a source's bytes; of its name and revision if it is on the Hub.

    Errors:
        UsageError: nothing is there.
    """
    if source.dataset is not None:
        return fingerprint([source.dataset, source.subset, source.split, source.revision])
    root, files = sources.list_files(source)
    files = files or sorted(path for path in root.rglob("*") if path.is_file())
    return fingerprint({p.relative_to(root).as_posix(): storage.sha256_file(p) for p in files})


def _write_documents(folder: Path, chosen: Sequence[SourceConfig]) -> dict[str, Any]:
    facts: list[dict[str, Any]] = []
    with DocumentWriter(folder, "documents") as writer:
        for source in chosen:
            num_documents = num_characters = 0
            for document in sources.read_documents(source):
                writer.write(document)
                num_documents += 1
                num_characters += len(document["text"])
            facts.append(
                {
                    "name": source.name,
                    "location": source.location,
                    "licence": source.licence,
                    "documents": num_documents,
                    "characters": num_characters,
                }
            )
    num_documents = sum(source["documents"] for source in facts)
    if num_documents == 0:
        named = ", ".join(source.location for source in chosen)
        raise BadDataError(f"{named}: not one document; give files that hold text")
    return {"documents": num_documents, "sources": facts}


def _write_village(folder: Path, village: Village) -> dict[str, Any]:
    counts = dict.fromkeys(SPLITS, 0)
    documents = (
        *({**document, "split": "train"} for document in village.documents()),
        *({**document, "split": "validation"} for document in village.validation_documents()),
    )
    with DocumentWriter(folder, "documents") as writer:
        for document in documents:
            writer.write(document)
            counts[document["split"]] += 1
    rows = {
        "instructions": list(village.instructions()),
        "preferences": list(village.preferences()),
        "domain": list(village.domain()),
        **{f"evaluation/{task}": items for task, items in village.evaluation().items()},
    }
    for name, items in rows.items():
        _write_lines(folder / f"{name}.jsonl", items)
    source = {"name": "village", "location": "village", "licence": VILLAGE_LICENCE} | counts
    return {
        "documents": sum(counts.values()),
        "rows": {name: len(items) for name, items in rows.items()},
        "sources": [source],
    }


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    storage.write_text(path, "".join(lines))


# --- 02 -----------------------------------------------------------------------------------------


def clean(run: Run, recipe: Recipe) -> None:
    """Write ``data/clean``: documents to train on and held out, no text in both.

    Errors:
        UsageError: there is no ``data/raw``.
        BadDataError: too little is left.
    """
    raw = verified(run, "raw")
    target = run.data("clean")
    inputs = {"raw": raw["fingerprint"]}
    fraction = recipe.data.validation_fraction
    config = settings(recipe, "clean")
    if is_current(target, inputs, config):
        return
    counts = CleaningCounts()
    documents = read_shards(run.data("raw"), "documents")
    kept = clean_documents(documents, recipe.clean, counts)
    with storage.new_folder(target, kind="clean", inputs=inputs, config=config) as folder:
        with (
            DocumentWriter(folder, "train") as train,
            DocumentWriter(folder, "validation") as validation,
        ):
            writers = {"train": train, "validation": validation}
            for split, document in assign_splits(kept, fraction):
                writers[split].write(document)
                counts.keep(document, split)
        storage.manifest_facts(folder, sources=raw["sources"], **counts.facts())
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.dropped.items()))
    kept_counts = f"{counts.documents['train']:,} documents and {counts.documents['validation']:,}"
    say(target, f"{kept_counts} held out; dropped: {dropped or 'none'}")


# --- 03 -----------------------------------------------------------------------------------------


def tokenize_and_pack(run: Run, recipe: Recipe) -> None:
    """Write ``tokenizer`` and ``data/packed``.

    Errors:
        UsageError: there is no ``data/clean``, or the tokenizer to take over does not fit.
        BadDataError: not enough text for one row to train on and one held out.
    """
    cleaned = verified(run, "clean")
    made = make_tokenizer(run, recipe)
    target = run.data("packed")
    inputs = {"clean": cleaned["fingerprint"], "tokenizer": _tokenizer_fingerprint(run)}
    config = settings(recipe, "packed")
    if is_current(target, inputs, config):
        return
    with storage.new_folder(target, kind="packed", inputs=inputs, config=config) as folder:
        counts = {
            split: shards.write_rows(folder, split, _token_documents(run, made, split), recipe.pack)
            for split in SPLITS
        }
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
            sources=cleaned["sources"],
            row_length=recipe.pack.row_length,
            counts=counts,
        )
    tokens = " and ".join(f"{counts[split]['tokens']:,} {split}" for split in SPLITS)
    say(target, f"{tokens} tokens in rows of {recipe.pack.row_length}")


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
        inputs = {"path": fingerprint({path.name: storage.sha256_file(path) for path in files})}
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


def _token_documents(run: Run, made: Any, split: str) -> Iterator[list[int]]:
    documents = read_shards(run.data("clean"), split)
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        yield from tokenizer.encode_documents(made, [_text(document) for document in batch])


def _text(document: Document) -> str:
    return str(document["text"])


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
        UsageError: no source, one without a licence, or no tokenizer.
        BadDataError: a row is wrong; with file, line and field.
    """
    made, identity = _row_tokenizer(run, recipe, tokenizer_folder)
    for stage in stages:
        chosen = _with_sources(run, recipe, stage, rows_config(recipe, stage))
        inputs = _row_inputs(identity, chosen.sources)
        if is_current(run.data(stage), inputs, to_plain(chosen)):
            continue
        with storage.new_folder(
            run.data(stage), kind=stage, inputs=inputs, config=to_plain(chosen)
        ) as folder:
            facts = tables.write_conversations(folder, made, chosen)
            storage.manifest_facts(folder, **facts)
        _say_rows(run.data(stage), facts)


def prepare_dpo(run: Run, recipe: Recipe, tokenizer_folder: Path | None = None) -> None:
    """Write ``data/dpo``: tokenised preference pairs; ``tokenizer_folder`` as for SFT.

    Errors:
        UsageError: no source, one without a licence, or no tokenizer.
        BadDataError: a row is wrong; with file, line and field.
    """
    made, identity = _row_tokenizer(run, recipe, tokenizer_folder)
    chosen = _with_sources(run, recipe, "dpo", recipe.dpo.data)
    assert isinstance(chosen, chat.PreferenceDataConfig)
    from_village = not recipe.dpo.data.sources
    sources.require_licences(chosen.replay, "dpo.data.replay")
    inputs = _row_inputs(identity, (*chosen.sources, *chosen.replay))
    if is_current(run.data("dpo"), inputs, to_plain(chosen)):
        return
    with storage.new_folder(
        run.data("dpo"), kind="dpo", inputs=inputs, config=to_plain(chosen)
    ) as folder:
        facts = tables.write_preferences(folder, made, chosen, single=from_village)
        storage.manifest_facts(folder, **facts)
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


def _with_sources(
    run: Run, recipe: Recipe, stage: str, config: chat.ChatDataConfig
) -> chat.ChatDataConfig:
    """Return ``config`` with the village's rows where it names no sources."""
    if not config.sources and recipe.data.village is not None:
        storage.read_manifest(run.data("raw"), made_by=SCRIPTS["raw"])
        rows = run.data("raw") / f"{VILLAGE_ROWS[stage]}.jsonl"
        village = SourceConfig(name="village", path=str(rows), licence=VILLAGE_LICENCE)
        config = dataclasses.replace(config, sources=(village,))
    if not config.sources:
        raise UsageError(
            f"{stage}.data.sources: empty; name sources there, or run {SCRIPTS[stage]} with "
            "--source PATH"
        )
    sources.refuse_repeated(config.sources)
    sources.require_licences(config.sources, f"{stage}.data.sources")
    return config


def _row_inputs(tokenizer_identity: str, chosen: Sequence[SourceConfig]) -> dict[str, str]:
    found = {source.location: source_fingerprint(source) for source in chosen}
    return {"tokenizer": tokenizer_identity, **found}


def _say_rows(folder: Path, facts: dict[str, Any]) -> None:
    counts = facts["counts"]
    dropped = sum(counts["dropped"].values())
    notes = [f"{facts['rows']:,} rows and {facts['validation_rows']:,} held out"]
    notes += [f"{dropped:,} dropped"] if dropped else []
    notes += [f"{counts['truncated']:,} shortened"] if counts["truncated"] else []
    notes += [f"{counts['rejected']:,} rejected"] if counts["rejected"] else []
    say(folder, ", ".join(notes))
