"""What a run was trained on: sources with their licences, amounts, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sevenfold.base.records import Run
from sevenfold.verify.charts import finite
from sevenfold.verify.lineage import (
    DATA_FOLDERS,
    read_manifest_if_there,
    read_record_if_there,
)

# Reasons that are about other documents or rows; repetition within one (Gopher's) is none of them.
DUPLICATES = ("duplicate", "near_duplicate", "near_duplicate_prompt")
AMOUNTS = ("documents", "rows", "tokens", "bytes")
LEFT_OUT = ("rejected", "truncated")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source; ``licence`` is empty where it is not known, ``unit`` what ``amount`` counts."""

    name: str
    location: str
    licence: str
    amount: float | None
    unit: str
    used_as: str


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One prepared folder; amounts are (to train on, held out)."""

    label: str
    folder: str
    amounts: dict[str, tuple[float, float | None]]
    dropped: dict[str, float]


def sources(run: Run) -> list[DataSource]:
    """Return the sources that were read, each where it first came in.

    Folders made from other folders repeat their sources; those are not listed again. Packed rows
    from outside stand in the record of the stage that was trained on them.
    """
    found = []
    for folder, label in DATA_FOLDERS.items():
        if folder in ("clean", "packed") and read_manifest_if_there(run.data("raw")) is not None:
            continue
        manifest = read_manifest_if_there(run.data(folder)) or {}
        found += _listed(run, manifest.get("sources"), label)
    given = read_record_if_there(run, "pretrain").get("data_sources")
    found += _listed(run, given, DATA_FOLDERS["packed"])
    return list(dict.fromkeys(found))


def _listed(run: Run, sources: Any, label: str) -> list[DataSource]:
    listed = sources if isinstance(sources, list) else []
    return [_source(run, source, label) for source in listed if isinstance(source, Mapping)]


def _source(run: Run, source: Mapping[str, Any], label: str) -> DataSource:
    name = str(source.get("name") or "unnamed")
    location = str(source.get("location") or source.get("path_or_dataset") or "")
    for folder in (run.folder, run.folder.resolve()):
        location = location.removeprefix(f"{folder}/")
    licence = str(source.get("licence") or "").strip()
    amounts = [(finite(source.get(unit)), unit) for unit in ("documents", "rows")]
    parts = [finite(source.get(split)) for split in ("train", "validation")]
    if any(part is not None for part in parts):
        amounts.append((sum(part or 0.0 for part in parts), "documents"))
    amount, unit = next((given for given in amounts if given[0] is not None), (None, ""))
    return DataSource(
        name=name,
        location="" if location == name else location,
        licence="" if licence.lower().startswith(("unknown", "none")) else licence,
        amount=amount,
        unit=unit.removesuffix("s") if amount == 1 else unit,
        used_as=label,
    )


def prepared(run: Run) -> list[Prepared]:
    """Return the prepared folders that exist, with amounts and what was dropped and why."""
    found = []
    for folder, label in DATA_FOLDERS.items():
        manifest = read_manifest_if_there(run.data(folder))
        if manifest is None:
            continue
        facts = {**manifest, **_mapping(manifest.get("counts"))}
        amounts = {name: amount for name in AMOUNTS if (amount := _amount(facts, name)) is not None}
        dropped = {**_mapping(facts.get("dropped")), **{name: facts.get(name) for name in LEFT_OUT}}
        found.append(
            Prepared(
                label=label,
                folder=f"data/{folder}",
                amounts=amounts,
                dropped={str(k): n for k, v in dropped.items() if (n := finite(v))},
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What one step did with one source; ``kept`` is documents or rows, held-out ones included."""

    name: str
    used_as: str
    read: float | None
    kept: float | None
    tokens: float | None
    duplicates: float
    dropped: dict[str, float]
    personal: dict[str, float]


def by_source(run: Run) -> list[SourceCounts]:
    """Return what cleaning and the preparation of rows counted of each source."""
    packed = read_manifest_if_there(run.data("packed")) or {}
    tokens = _mapping(packed.get("tokens_by_source"))
    found = []
    for folder in ("clean", "sft", "dpo", "lora"):
        manifest = read_manifest_if_there(run.data(folder)) or {}
        for name, facts in _mapping(manifest.get("by_source")).items():
            counts = dict(_mapping(facts))
            if folder == "clean":
                counts["tokens"] = _total(tokens.get(name))
            found.append(_source_counts(str(name), DATA_FOLDERS[folder], counts))
    return found


def _source_counts(name: str, label: str, facts: Mapping[str, Any]) -> SourceCounts:
    dropped = _numbers(facts.get("dropped"))
    repeated = {reason: n for reason, n in dropped.items() if reason in DUPLICATES}
    read = next((facts[key] for key in ("documents_read", "rows_read") if key in facts), None)
    kept = next((facts[key] for key in ("documents", "rows") if key in facts), None)
    return SourceCounts(
        name=name,
        used_as=label,
        read=finite(read),
        kept=_total(kept),
        tokens=finite(facts.get("tokens")),
        duplicates=sum(repeated.values()),
        dropped={reason: n for reason, n in dropped.items() if reason not in repeated},
        personal=_numbers(facts.get("pii")),
    )


def _numbers(value: Any) -> dict[str, float]:
    found = {str(key): finite(number) for key, number in _mapping(value).items()}
    return {key: number for key, number in found.items() if number}


def _total(value: Any) -> float | None:
    """Return a number, or the sum of one a split."""
    return sum(_numbers(value).values()) if isinstance(value, Mapping) else finite(value)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a folder was searched for the evaluation's items; ``index`` is empty where it was not.

    ``generated`` names sources that were made together with the items, and not searched.
    """

    label: str
    index: str
    ngram: float | None
    tasks: list[str]
    removed: dict[str, float]
    generated: list[str]


def searches(run: Run) -> list[Search]:
    """Return how what is trained on was searched; a folder that says nothing has no index."""
    found = []
    for folder in ("clean", "sft", "dpo", "lora"):
        manifest = read_manifest_if_there(run.data(folder))
        if manifest is None:
            continue
        facts = _mapping(manifest.get("decontaminated"))
        generated = facts.get("generated")
        found.append(
            Search(
                label=DATA_FOLDERS[folder],
                index=str(facts.get("index", "")),
                ngram=finite(facts.get("ngram")),
                tasks=sorted(map(str, _mapping(facts.get("tasks")))),
                removed=_numbers(facts.get("removed")),
                generated=[str(name) for name in generated] if isinstance(generated, list) else [],
            )
        )
    return found


def card(run: Run) -> dict[str, Any]:
    """Return all that the run's manifests say about its data, as ``data_card.json`` holds it.

    ``licence`` is null where it is not known; ``identity`` is what names a source's bytes: their
    SHA-256, or on the Hub data set, subset, split and revision.
    """
    identities: dict[str, Mapping[str, Any]] = {}
    folders = {}
    for folder, label in DATA_FOLDERS.items():
        manifest = read_manifest_if_there(run.data(folder))
        if manifest is None:
            continue
        identities[label] = _mapping(manifest.get("inputs"))
        folders[folder] = {key: manifest.get(key) for key in ("fingerprint", "config", "files")}
    named = [
        {
            **asdict(s),
            "licence": s.licence or None,
            "identity": _identity(s, identities.get(s.used_as, {})),
        }
        for s in sources(run)
    ]
    return {
        "sources": named,
        "by_source": [asdict(counts) for counts in by_source(run)],
        "prepared": [asdict(folder) for folder in prepared(run)],
        "decontamination": [asdict(search) for search in searches(run)],
        "folders": folders,
    }


def _identity(source: DataSource, inputs: Mapping[str, Any]) -> str | None:
    """Return what identifies a source's bytes; its location was an input, in full or shortened.

    ``inputs`` are those of the folder that was made from it: another may have read another split.
    """
    place = source.location or source.name
    full = [location for location in inputs if location == place or location.endswith(f"/{place}")]
    return str(inputs[min(full, key=len)]) if full else None


def _amount(facts: Mapping[str, Any], name: str) -> tuple[float, float | None] | None:
    """Find an amount: a number, one a split, or a mapping of counts a split."""
    given = facts.get(name)
    if isinstance(given, Mapping):
        train, held_out = given.get("train"), given.get("validation")
    elif given is not None:
        train, held_out = given, facts.get(f"validation_{name}")
    else:
        train, held_out = (
            _mapping(facts.get(split)).get(name) for split in ("train", "validation")
        )
    number = finite(train)
    return None if number is None else (number, finite(held_out))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
