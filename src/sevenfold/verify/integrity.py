"""Every byte of a run against what was written, from what the run itself says of its files.

Folders have a manifest, files that stand alone a seal or checksums of their lines
(``base/seals.py``), and a stage's record lists what training, measuring and judging left beside it.
So a changed byte, a missing file and one too many are each found by one look at the whole tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sevenfold.base import seals, storage
from sevenfold.base.errors import BadDataError, CheckpointError, SevenfoldError
from sevenfold.base.records import EVIDENCE, SEALED, STAGES

IN_RUN = frozenset(("run.json", "report.html", "data_card.json"))
ITEMS, METRICS = "evaluation_items.jsonl", "metrics.jsonl"
RECORD, VERDICT = "record.json", "verdict.json"
# Under which key of the record's evidence the SHA-256 of a file is that steps 11 and 12 wrote.
LISTED_LATER = {**EVIDENCE, VERDICT: "verdict_sha256", "judge.json": "judge_sha256"}
IN_STAGE = frozenset((METRICS, RECORD, *LISTED_LATER, "recovery.json", "data_files.json"))
# What is not looked at, by the beginning of a name in its path, and why.
NOT_COVERED = {
    ".": "hidden: the lock, which every command rewrites, and what a stopped step has begun, whose "
    "checksums that step looks at before it goes on",
    "wandb": "wandb's own log, which wandb goes on writing",
    "tensorboard": "TensorBoard's, likewise; the same numbers stand in metrics.jsonl",
}
# What may be missing without being missed, and why.
NOT_MISSED = {
    "report.html": "made anew from the rest by `sevenfold report`",
    "data_card.json": "made anew from the rest by `sevenfold report`",
    "README.md": "a model's card, made anew from the record by step 12",
}


@dataclass
class Examined:
    """What was found: problems by file, and files without a seal.

    These are no problem in a run that ``is_old``: begun by a version that sealed nothing.
    """

    is_old: bool
    num_folders: int = 0
    num_files: int = 0
    problems: dict[Path, SevenfoldError] = field(default_factory=dict)
    unsealed: list[Path] = field(default_factory=list)


def examine(run: Path) -> Examined:
    """Look at every file of the run in ``run``; files are hashed once."""
    facts = _readable(run / "run.json")
    found = Examined(is_old=bool(facts) and facts.get(SEALED) is not True)
    files = [path for path in _files(run) if not _is_left_out(path, run)]
    folders = {path.parent for path in files if path.name == storage.MANIFEST}
    for folder in sorted(folders):
        _folder(found, folder, _error(folder, run))
    for path in files:
        if not folders.isdisjoint(path.parents):
            continue
        known = IN_STAGE if _is_stage(path.parent, run) else IN_RUN if path.parent == run else ()
        if path.name in known and path.is_file():
            _alone(found, path)
        else:
            found.problems |= _unknown(path, run)
    for stage in sorted(p for p in run.iterdir() if p.is_dir() and _is_stage(p, run)):
        found.problems |= {p: e for p, e in _listed(stage) if p not in found.problems}
    if not found.is_old:
        found.problems |= {p: e for p, e in _made_from(run) if p not in found.problems}
        for path in found.unsealed:
            found.problems[path] = _error(path, run)(
                f"{path}: its seal is damaged or missing; put it back as it was, or run the step "
                "that makes it again"
            )
    return found


def _files(run: Path) -> list[Path]:
    """Return all below ``run`` that is no folder; a folder may be a link to another disk."""
    found: list[Path] = []
    for name, folders, files in os.walk(run, followlinks=True):
        here = Path(name)
        if here.is_symlink() and here.resolve() in [p.resolve() for p in here.parents]:
            folders.clear()  # a link to a folder that it lies in leads round and round
            found.append(here)
            continue
        found += [here / file for file in files]
    return sorted(found)


def _is_left_out(path: Path, run: Path) -> bool:
    return any(part.startswith(tuple(NOT_COVERED)) for part in path.relative_to(run).parts)


def _is_stage(folder: Path, run: Path) -> bool:
    """True of a stage's folder, also of one that --no-resume has set aside."""
    return folder.parent == run and folder.name.partition(".old-")[0] in STAGES


def _unknown(path: Path, run: Path) -> dict[Path, SevenfoldError]:
    """Return what is wrong with a file that nothing lists: its folder's manifest, or itself."""
    parts = path.relative_to(run).parts
    depth = 1 if parts[0] == "tokenizer" else 3 if "checkpoints" in parts else 2
    if parts[0] in ("data", "tokenizer", *STAGES) and len(parts) > depth:
        lost = run.joinpath(*parts[:depth], storage.MANIFEST)
        told = f"{lost}: missing, and with it what the files beside it should be; put it back"
        return {lost: _error(path, run)(told)}
    return {path: _error(path, run)(f"{path}: nothing in the run lists it; remove it")}


def _error(path: Path, run: Path) -> type[SevenfoldError]:
    return CheckpointError if "checkpoints" in path.relative_to(run).parts else BadDataError


def _folder(found: Examined, folder: Path, error: type[SevenfoldError]) -> None:
    found.num_folders += 1
    manifest, card = folder / storage.MANIFEST, folder / storage.CARD
    try:
        listed = storage.verify_folder(folder, error, exact=True)
        found.num_files += len(listed["files"])
    except SevenfoldError as problem:
        found.problems[folder] = problem
        return
    _seal(found, manifest)
    if card.is_file() and storage.CARD not in {file["path"] for file in listed["files"]}:
        _seal(found, card)


def _alone(found: Examined, path: Path) -> None:
    """Check a file by what it says of itself; one that a record lists is checked by that."""
    if path.name == METRICS:
        data = path.read_bytes()
        damaged = seals.damaged_lines(data)
        if damaged and len(damaged) == data.count(b"\n") and b'"crc"' not in data:
            found.unsealed.append(path)
        elif damaged:
            lines = ", ".join(map(str, damaged[:5]))
            found.problems[path] = BadDataError(
                f"{path}:{lines}: not as written; put it back, the training itself is not touched"
            )
    if path.name in (METRICS, ITEMS):
        found.num_files += 1
    else:
        _seal(found, path)


def _seal(found: Examined, path: Path) -> None:
    found.num_files += 1
    seal = seals.look(path.read_bytes())
    if seal == "none":
        found.unsealed.append(path)
    if seal == "wrong":
        found.problems[path] = BadDataError(
            f"{path}: changed since it was written, its seal is of other bytes; put it back as it "
            "was, or run the step that makes it again"
        )


def _listed(stage: Path) -> Iterator[tuple[Path, SevenfoldError]]:
    """Yield what is missing, changed or too many beside the record of a stage."""
    path = stage / RECORD
    if not path.is_file():
        made = [name for name in (*LISTED_LATER, "model") if (stage / name).exists()]
        if made:
            told = f"{path}: missing, though there is {', '.join(made)}; run the step again"
            yield path, BadDataError(told)
        return
    try:
        record = storage.read_json(path)
    except BadDataError as problem:
        yield path, problem
        return
    listed = _sha256(record)
    for name, sha256 in listed.items():
        if not (stage / name).is_file():
            yield stage / name, BadDataError(f"{stage / name}: missing; {path} lists it")
        elif storage.sha256_file(stage / name) != sha256:
            told = f"{stage / name}: not the file that {path} is about; run the step again"
            yield stage / name, BadDataError(told)
    for name in LISTED_LATER:
        if (stage / name).is_file() and name not in listed:
            told = f"{stage / name}: {path} does not list it; run step 11, then 12, again"
            yield stage / name, BadDataError(told)


def _made_from(run: Path) -> Iterator[tuple[Path, SevenfoldError]]:
    """Yield the manifests that are gone of folders from which something that is there was made.

    That another folder has come in its place is no damage: ``lineage`` tells.
    """
    wanted: dict[Path, str] = {}
    folders = {name: run / "data" / name for name in ("raw", "clean")}
    folders["tokenizer"] = run / "tokenizer"
    for folder in (folders["tokenizer"], *sorted(run.glob("data/[!.]*"))):
        for name in _inputs(folder / storage.MANIFEST) & folders.keys():
            wanted[folders[name]] = folder.relative_to(run).as_posix()
    for index, stage in enumerate(STAGES):
        path = run / stage / RECORD
        inputs, record = _inputs(path), _readable(path)
        if "tokenizer" in inputs:
            wanted[folders["tokenizer"]] = stage
        if "model" in inputs and index and not record.get("external"):
            wanted[run / STAGES[index - 1] / "model"] = stage
        if "data" in inputs and "data_sources" not in record:  # which data from outside have
            wanted[run / "data" / ("packed" if stage == "pretrain" else stage)] = stage
    for folder, heir in wanted.items():
        if not (folder / storage.MANIFEST).is_file():
            told = f"{folder}: missing, though {heir} was made from it; put it back"
            yield folder / storage.MANIFEST, BadDataError(told)


def _inputs(path: Path) -> set[str]:
    inputs = _readable(path).get("inputs")
    return set(inputs) if isinstance(inputs, Mapping) else set()


def _readable(path: Path) -> Mapping[str, Any]:
    """Return the object in ``path``; nothing where that is damaged, which is told by itself."""
    try:
        found = storage.read_json(path) if path.is_file() else {}
    except BadDataError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _sha256(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the files beside a record with their SHA-256, by what the record says."""
    listed = dict(record.get("files") or {})
    evidence = record.get("evidence") or {}
    for name, key in LISTED_LATER.items():
        if key in evidence:
            listed[name] = evidence[key]
    return listed
