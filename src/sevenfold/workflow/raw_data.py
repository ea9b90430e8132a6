"""Step 01: the documents of the recipe's sources, or of the village, as ``data/raw``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import fingerprint
from sevenfold.base.console import print_line
from sevenfold.base.errors import BadDataError
from sevenfold.base.records import Run
from sevenfold.base.unfinished import UnfinishedFolder
from sevenfold.data import sources
from sevenfold.data.clean import SPLITS, DocumentWriter
from sevenfold.data.mixture import DocumentMixture
from sevenfold.data.sources import SourceConfig
from sevenfold.data.village import Village
from sevenfold.workflow.prepared import is_current, say, settings
from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)

VILLAGE_LICENCE = "generated"


def download(run: Run, recipe: Recipe) -> None:
    """Write ``data/raw``: the documents of the recipe's sources, or of the village.

    Whole shards that a stopped process has written are kept, and the next one goes on after them.

    Errors:
        UsageError: a source is not there, is given twice, or states no licence.
        BadDataError: a source holds something it must not hold; what was there stays.
    """
    chosen, village = recipe.data.sources, recipe.data.village
    sources.refuse_repeated(chosen)
    sources.require_licences(chosen, "data.sources")
    config = settings(recipe, "raw")
    inputs = {source.location: source_fingerprint(source) for source in chosen}
    target = run.data("raw")
    if is_current(target, inputs, config):
        UnfinishedFolder(target, "").remove()
        return
    if village is None:
        facts = _gather(target, recipe, inputs, config)
    else:
        with storage.new_folder(target, kind="raw", inputs=inputs, config=config) as folder:
            facts = _write_village(folder, Village(village))
            storage.manifest_facts(folder, **facts)
    say(target, f"{facts['documents']:,} documents")


def _gather(
    target: Path, recipe: Recipe, inputs: dict[str, str], config: dict[str, Any]
) -> dict[str, Any]:
    """Write the sources' documents shard by shard, and make the folder of them at the end."""
    unfinished = UnfinishedFolder(target, fingerprint([inputs, config]))
    with unfinished.working():
        drawn = DocumentMixture(recipe.data.sources, recipe.data.mixture, unfinished.state)
        if unfinished.files:
            print_line(f"{target}: going on after {drawn.num_documents:,} documents")

        def note(shard: str) -> None:
            unfinished.finished(shard, drawn.state())

        first = len(unfinished.files)
        with DocumentWriter(
            unfinished.folder, "documents", first_shard=first, when_full=note
        ) as writer:
            for document in drawn:
                writer.write(document)
        for source in drawn.facts():
            if not source["documents"]:
                raise BadDataError(
                    f"{source['location']}: not one document; give files that hold text, or "
                    "leave the source out"
                )
        for path in sorted(unfinished.folder.glob("documents-*"))[len(unfinished.files) :]:
            note(path.name)
    facts: dict[str, Any] = {"documents": drawn.num_documents, "sources": drawn.facts()}
    _warn_of_short_sources(facts["sources"])
    with storage.new_folder(target, kind="raw", inputs=inputs, config=config) as folder:
        unfinished.hand_over(folder)
        storage.manifest_facts(folder, **facts)
    unfinished.remove()
    return facts


def _warn_of_short_sources(listed: Sequence[dict[str, Any]]) -> None:
    for source in listed:
        wanted = source.get("wanted_characters", 0)
        if source["characters"] < wanted:
            log.warning(
                "%s ended after %s of the %s characters that data.mixture wants of it",
                source["name"],
                f"{source['characters']:,}",
                f"{wanted:,}",
            )


def source_fingerprint(source: SourceConfig) -> str:
    """Return a fingerprint of a source's bytes; of its name and revision if it is on the Hub.

    Errors:
        UsageError: nothing is there.
    """
    if source.dataset is not None:
        return fingerprint([source.dataset, source.subset, source.split, source.revision])
    root, files = sources.list_files(source)
    files = files or sorted(path for path in root.rglob("*") if path.is_file())
    return fingerprint(storage.sha256_files(root, files))


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
