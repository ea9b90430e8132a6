"""A run on disk: its folder, the record of each stage, and the door to promoted models."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sevenfold import __version__
from sevenfold.base import seals, storage
from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError, GateRefusedError, UsageError, nearest

STAGES = ("init", "pretrain", "sft", "dpo", "lora")
GATED_STAGES = STAGES[1:]
SCRIPTS = {
    "init": "scripts/04_init_model.py",
    "pretrain": "scripts/05_pretrain.py",
    "sft": "scripts/07_sft.py",
    "dpo": "scripts/09_dpo.py",
    "lora": "scripts/10_lora.py",
}
# In run.json: every file of the run that stands alone has a seal, as it was begun with them.
SEALED = "sealed"
# What a verdict rests on, and under which key record.json keeps its SHA-256.
EVIDENCE = {"evaluation.json": "evaluation_sha256", "evaluation_items.jsonl": "items_sha256"}
# The oldest versions without a known hole in what we do with them, and what the hole is.
FLOORS = {
    "torch": ("2.10", "CVE-2026-24747: a checkpoint can corrupt memory while it is read"),
    "transformers": ("5.0", "CVE-2026-1839: a checkpoint's random state can run code"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template can leave its sandbox"),
}
PACKAGES = (
    *("torch", "transformers", "tokenizers", "datasets", "peft", "safetensors", "numpy"),
    *("datatrove", "ftfy", "py3langid", "rensa"),  # what cleaning asks for, if settings do
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory.

    ``facts`` is what ``run.json`` holds: preset, the resolved recipe, its fingerprint, versions.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def preset(self) -> str:
        """Name of the preset, which is also the run's section in the gate file."""
        return str(self.facts["preset"])

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        return dict(self.facts["recipe"])

    @property
    def tokenizer(self) -> Path:
        """Folder of the run's tokenizer."""
        return self.folder / "tokenizer"

    def data(self, name: str) -> Path:
        """Folder of prepared data: raw, clean, packed, sft, dpo or lora."""
        return self.folder / "data" / name

    def stage(self, stage: str) -> Path:
        """Folder of a stage."""
        if stage not in STAGES:
            raise UsageError(f"stage '{stage}' does not exist{nearest(stage, STAGES)}")
        return self.folder / stage

    def model(self, stage: str) -> Path:
        """Hugging Face folder that a stage wrote."""
        return self.stage(stage) / "model"

    def record(self, stage: str) -> dict[str, Any]:
        """Return ``record.json`` of a stage.

        Errors:
            UsageError: the stage has not been finished; the message names its script.
        """
        path = self.stage(stage) / "record.json"
        if not path.is_file():
            raise UsageError(f"{path}: {stage} has not finished yet; run {SCRIPTS[stage]} first")
        record: dict[str, Any] = storage.read_json(path)
        return record

    def write_record(self, stage: str, record: Mapping[str, Any]) -> None:
        """Write ``record.json`` of a stage."""
        storage.write_json(self.stage(stage) / "record.json", record)


def own_files(stage: Path) -> dict[str, str]:
    """Return the SHA-256 of what a stage has left, for its record: files, and folders' manifests.

    Checkpoints come and go, and what steps 11 and 12 write is listed when they do.
    """
    later = ("record.json", "verdict.json", "judge.json", *EVIDENCE)
    paths = [*stage.glob("[!.]*"), *stage.glob(f"[!.]*/{storage.MANIFEST}")]
    return {
        path.relative_to(stage).as_posix(): storage.sha256_file(path)
        for path in sorted(paths)
        if path.is_file() and path.name not in later
    }


def open_run(folder: Path) -> Run:
    """Open an existing run directory.

    Errors:
        UsageError: there is no run, or its ``run.json`` lacks a field.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no run here; name an existing one with --run")
    facts = storage.read_json(path)
    for field in ("preset", "recipe", "fingerprint"):
        if field not in facts:
            raise UsageError(f"{path}: field '{field}' is missing; this is not a run of Sevenfold")
    return Run(folder=folder, facts=facts)


def write_run(folder: Path, *, preset: str, recipe: Mapping[str, Any]) -> Run:
    """Write ``run.json`` for a new run, or with changed settings for an existing one."""
    path = folder / "run.json"
    known = storage.read_json(path) if path.is_file() else None
    facts = {
        "preset": preset,
        "fingerprint": fingerprint(recipe),
        "created_at_s": time.time() if known is None else known["created_at_s"],
        SEALED: known is None or known.get(SEALED) is True,
        "code": code_version(),
        "versions": package_versions(),
        "recipe": dict(recipe),
    }
    storage.write_json(path, facts)
    return Run(folder=folder, facts=facts)


@functools.cache
def code_version() -> str:
    """Return the package version, and the git commit where the code is a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return f"{__version__}+{answer.stdout.strip()}" if answer.returncode == 0 else __version__


@functools.cache
def package_versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that shape results."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def require_packages() -> None:
    """Refuse packages with holes that are known; nothing of them is imported.

    Errors:
        UsageError: one is missing or older than its floor; the message says how to install it.
    """
    for name, (floor, reason) in FLOORS.items():
        install = f"pip install --upgrade '{name}>={floor}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f"{name} is not installed; {install}") from None
        if _numbers(found) < _numbers(floor):
            raise UsageError(
                f"{name} {found} is installed, at least {floor} is needed ({reason}); {install}"
            )


def _numbers(version: str) -> list[int]:
    """Return 2.13.0+cpu as [2, 13, 0]; what is no number ends it."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model that a stage may start from.

    ``fingerprint`` identifies its bytes; ``forced`` is the reason given where no gate promoted it,
    ``forced_earlier`` the stages before it that were gone past like that, each with its reason;
    ``external`` is true for a model from outside the run.
    """

    folder: Path
    fingerprint: str
    stage: str
    forced: str | None = None
    external: bool = False
    forced_earlier: tuple[dict[str, str], ...] = ()

    @property
    def forced_promotions(self) -> list[dict[str, str]]:
        """Every gate that was gone past on the way to what starts from this model."""
        own = [{"stage": self.stage, "reason": self.forced}] if self.forced else []
        return [*self.forced_earlier, *own]


def open_promoted(run: Run, stage: str, *, force: str | None = None) -> Source:
    """Return the model of ``stage`` if its gate promoted exactly these bytes.

    Every file is hashed again, so a changed weight is noticed here.

    Errors:
        UsageError: the stage has not finished, or a stage it descends from was trained again.
        BadDataError: the model is not what was written, or not the one that the record is about.
        GateRefusedError: there is no verdict, it says no, or it is about other bytes; with
            ``force`` this is recorded instead of raised.
    """
    record = run.record(stage)
    path = run.stage(stage) / "record.json"
    if run.facts.get(SEALED) is True and seals.look(path.read_bytes()) == "none":
        raise BadDataError(
            f"{path}: its seal is missing; put it back as it was, or move {path.parent} away and "
            f"run {SCRIPTS[stage]}"
        )
    folder = run.model(stage)
    found = storage.verify_folder(folder, exact=True)["fingerprint"]
    if record.get("fingerprint") != found:
        raise BadDataError(
            f"{folder}: not the model that {path} is about; run {SCRIPTS[stage]} again"
        )
    if stage == "init":
        return Source(folder=folder, fingerprint=found, stage=stage)
    _require_same_ancestors(run, stage)
    refusal = _refusal(run, stage, found)
    if refusal and force is None:
        raise GateRefusedError(f'{refusal}; to go on all the same, add --force "reason"')
    return Source(
        folder=folder,
        fingerprint=found,
        stage=stage,
        forced=force if refusal else None,
        external="outside" in record,
        forced_earlier=tuple(record.get("forced_promotions", ())),
    )


def _require_same_ancestors(run: Run, stage: str) -> None:
    """Refuse a model whose line goes back to one that has been replaced since."""
    for index in range(STAGES.index(stage), 0, -1):
        heir, previous = STAGES[index], STAGES[index - 1]
        made_from = run.record(heir)
        manifest = run.model(previous) / storage.MANIFEST
        is_first = "outside" in made_from or previous == STAGES[0]
        if (made_from.get("external") and is_first) or not manifest.is_file():
            return
        known = made_from.get("inputs", {}).get("model")
        if known is not None and known != storage.read_manifest(run.model(previous))["fingerprint"]:
            raise UsageError(
                f"{run.stage(heir)}: {heir} was trained from an earlier {previous} model than the "
                f"one that is there now; train it again with {SCRIPTS[heir]} --no-resume"
            )


def _refusal(run: Run, stage: str, found: str) -> str | None:
    """Return why ``stage`` is not promoted, or None."""
    path = run.stage(stage) / "verdict.json"
    judge = f"run scripts/11_evaluate.py {stage}, then scripts/12_check_gates.py {stage}"
    if not path.is_file():
        return f"{path}: {stage} has not been judged; {judge}"
    evidence = run.record(stage).get("evidence", {})
    judged = evidence.get("verdict_sha256")
    if judged is not None and judged != storage.sha256_file(path):
        return f"{path}: the verdict was changed after the gate wrote it; {judge}"
    verdict = storage.read_json(path)
    if verdict.get("fingerprint") != found:
        return f"{path}: the verdict is about another model than {run.model(stage)}; {judge}"
    if verdict.get("promoted") is not True:
        failed = [
            f"{check.get('metric')} {check.get('result')}"
            for check in verdict.get("checks", [])
            if check.get("result") != "pass"
        ]
        searched = verdict.get("decontamination")
        if isinstance(searched, dict) and searched.get("problem"):
            failed.insert(0, str(searched["problem"]))
        return f"{path}: {stage} was not promoted ({', '.join(failed) or 'no check passed'})"
    if judged is None:
        return f"{path}: the verdict is older than {run.stage(stage) / 'record.json'}; {judge}"
    for name, key in EVIDENCE.items():
        measured = run.stage(stage) / name
        known = evidence.get(key)
        if not (known and measured.is_file() and storage.sha256_file(measured) == known):
            return f"{measured}: not the evidence that the gate judged; {judge}"
    return None
