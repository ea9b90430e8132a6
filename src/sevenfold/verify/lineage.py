"""From every artifact of a run to what it was made from, matched by fingerprint."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import fingerprint
from sevenfold.base.records import STAGES, Run
from sevenfold.verify import report_text

PACKAGES = ("torch", "transformers")
DATA_FOLDERS = {
    "raw": "source text",
    "clean": "clean text",
    "packed": "packed tokens",
    "sft": "SFT rows",
    "dpo": "preference pairs",
    "lora": "LoRA rows",
}


@dataclass(frozen=True, kw_only=True)
class Parent:
    """One input of an artifact.

    ``state`` is ``here`` where the run still holds exactly these bytes, ``changed`` where it now
    holds another artifact of that name, ``outside`` where the input came from elsewhere.
    """

    name: str
    label: str
    fingerprint: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One folder of a run, with the fingerprint of its bytes and its parents."""

    name: str
    label: str
    fingerprint: str
    parents: tuple[Parent, ...]


@dataclass(frozen=True, kw_only=True)
class Making:
    """How the model of a stage was made and measured: everything but the files it was made from.

    ``settings`` and ``items`` are fingerprints of the stage's settings and of the items it was
    measured on; what is not known is empty.
    """

    stage: str
    settings: str
    seed: str
    code: str
    device: str
    packages: str
    items: str


def makings(run: Run) -> list[Making]:
    """Return how each finished stage was made, in their order."""
    found = []
    for stage in STAGES:
        record = read_record_if_there(run, stage)
        if not record:
            continue
        path = run.stage(stage) / "evaluation.json"
        data = _mapping(storage.read_json(path), "data") if path.is_file() else {}
        versions = _mapping(record, "versions")
        settings = record.get("config_fingerprint") or fingerprint(_mapping(record, "config"))
        found.append(
            Making(
                stage=stage,
                settings=str(settings),
                seed=str(record.get("seed", "")),
                code=str(record.get("code", "")),
                device=report_text.device(record.get("gpu"), record.get("num_gpus")),
                packages=", ".join(f"{k} {versions[k]}" for k in PACKAGES if k in versions),
                items=f"{len(data)} task{'s' * (len(data) > 1)}, {fingerprint(data)[:12]}"
                if data
                else "",
            )
        )
    return found


def trace(run: Run) -> list[Artifact]:
    """Return the artifacts that exist in ``run``, inputs before what is made from them."""
    found: list[tuple[str, str, str, Mapping[str, Any]]] = []
    holders: dict[str, str] = {}
    folders = [("tokenizer", "tokenizer", run.tokenizer)]
    folders += [(f"data/{name}", label, run.data(name)) for name, label in DATA_FOLDERS.items()]
    for name, label, folder in folders:
        manifest = read_manifest_if_there(folder)
        if manifest is not None:
            inputs = _mapping(manifest, "inputs")
            found.append((name, label, str(manifest["fingerprint"]), inputs))
            # Prepared rows may be made from single files of another folder, the village's.
            files = ({Path(f["path"]).name: f["sha256"]} for f in manifest["files"])
            holders |= {fingerprint(file): name for file in files}
    for stage in STAGES:
        manifest = read_manifest_if_there(run.model(stage))
        if manifest is not None:
            inputs = _stage_inputs(run, stage)
            found.append((stage, f"{stage} model", str(manifest["fingerprint"]), inputs))
    holders |= {bytes_fingerprint: name for name, _, bytes_fingerprint, _ in found}
    labels = {name: label for name, label, _, _ in found}
    artifacts = [
        Artifact(
            name=name,
            label=label,
            fingerprint=bytes_fingerprint,
            parents=tuple(dict.fromkeys(_parents(name, inputs, holders, labels, run.folder))),
        )
        for name, label, bytes_fingerprint, inputs in found
    ]
    return _inputs_first(artifacts)


def _stage_inputs(run: Run, stage: str) -> Mapping[str, Any]:
    """Return a stage's inputs under names of this run: ``model`` is the stage before it."""
    record = read_record_if_there(run, stage)
    before = STAGES[max(0, STAGES.index(stage) - 1)]
    model = "starting model" if record.get("external") is True else before
    data = "data/packed" if stage == "pretrain" else f"data/{stage}"
    names = {"model": model, "data": data}
    return {names.get(name, name): value for name, value in _mapping(record, "inputs").items()}


def read_manifest_if_there(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of ``folder``, or None where it has not been made.

    Errors:
        BadDataError: it is there and cannot be read, or does not belong to its list of files.
    """
    if not (folder / storage.MANIFEST).is_file():
        return None
    return storage.read_manifest(folder)


def read_record_if_there(run: Run, stage: str) -> dict[str, Any]:
    """Return the record of ``stage``, empty where it has not finished."""
    return run.record(stage) if (run.stage(stage) / "record.json").is_file() else {}


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def _parents(
    child: str,
    inputs: Mapping[str, Any],
    holders: Mapping[str, str],
    labels: Mapping[str, str],
    root: Path,
) -> Iterator[Parent]:
    for given, value in inputs.items():
        holder = holders.get(str(value))
        name = holder or _named(given, labels, root)
        if name == child:
            name = holder = None
        yield Parent(
            name=name or given,
            label=labels[name] if name else given,
            fingerprint=str(value),
            state="here" if holder else "changed" if name else "outside",
        )


def _named(given: str, known: Container[str], root: Path) -> str | None:
    """Return the artifact of this run that an input's name, or the path of a file in it, means."""
    name = f"data/{given}" if given in DATA_FOLDERS else given
    folder = Path(given).absolute().parent
    if name not in known and folder.is_relative_to(root.absolute()):
        name = folder.relative_to(root.absolute()).as_posix()
    return name if name in known else None


def _inputs_first(artifacts: list[Artifact]) -> list[Artifact]:
    ordered: list[Artifact] = []
    waiting = list(artifacts)
    while waiting:
        placed = {artifact.name for artifact in ordered}
        known = {artifact.name for artifact in waiting}
        ready = next(
            (
                artifact
                for artifact in waiting
                if all(p.name in placed or p.name not in known for p in artifact.parents)
            ),
            waiting[0],
        )
        ordered.append(ready)
        waiting.remove(ready)
    return ordered
