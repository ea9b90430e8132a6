"""What a run was trained on: sources with their licences, amounts, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sevenfold.base.records import Run
from sevenfold.verify.charts import finite
from sevenfold.verify.lineage import (
    DATA_FOLDERS,
    read_manifest_if_there,
    read_record_if_there,
)

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
