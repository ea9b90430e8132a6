"""Step 01: the documents of the recipe's sources, or of the village, as ``data/raw``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError
from sevenfold.base.records import Run
from sevenfold.data import sources
from sevenfold.data.clean import SPLITS, DocumentWriter
from sevenfold.data.sources import SourceConfig
from sevenfold.data.village import Village
from sevenfold.workflow.prepared import is_current, say, settings
from sevenfold.workflow.recipe import Recipe

VILLAGE_LICENCE = "generated"


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
