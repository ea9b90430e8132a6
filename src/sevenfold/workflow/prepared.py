"""What has been prepared already: whether it is current, whole, and made by which script."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import to_plain
from sevenfold.base.console import print_line
from sevenfold.base.errors import CheckpointError, UsageError
from sevenfold.base.records import Run
from sevenfold.data.chat import ChatDataConfig
from sevenfold.model.config import describe_folder
from sevenfold.workflow.recipe import Recipe

DATA_FILES = "data_files.json"
SCRIPTS = {
    "raw": "scripts/01_download_data.py",
    "clean": "scripts/02_clean_data.py",
    "tokenizer": "scripts/03_tokenize_and_pack.py",
    "packed": "scripts/03_tokenize_and_pack.py",
    "sft": "scripts/06_prepare_sft_data.py",
    "lora": "scripts/06_prepare_sft_data.py",
    "dpo": "scripts/08_prepare_dpo_data.py",
}


def is_current(folder: Path, inputs: dict[str, str], config: Any) -> bool:
    """True where the folder was made from these inputs with these settings."""
    storage.sweep(folder.parent)
    if not (folder / storage.MANIFEST).is_file():
        return False
    manifest = storage.read_manifest(folder)
    plain = json.loads(json.dumps(to_plain(config)))
    current = bool(manifest.get("inputs") == inputs and manifest.get("config") == plain)
    if current:
        say(folder, "nothing has changed")
    return current


def verified(run: Run, name: str) -> dict[str, Any]:
    """Return the manifest of prepared data after checking every byte.

    Errors:
        UsageError: it is not there; the message names the script that makes it.
        BadDataError: a file has changed since it was made.
    """
    storage.read_manifest(run.data(name), made_by=SCRIPTS[name])
    return storage.verify_folder(run.data(name))


def rows_config(recipe: Recipe, stage: str) -> ChatDataConfig:
    """Return what a stage's rows are made by.

    LoRA without sources of its own takes the village's new domain, or else what SFT takes.
    """
    config: ChatDataConfig = getattr(recipe, stage).data
    if stage == "lora" and not config.sources and recipe.data.village is None:
        wanted = recipe.sft.data
        return dataclasses.replace(config, sources=wanted.sources, weights=wanted.weights)
    return config


def pair_context(recipe: Recipe) -> dict[str, int]:
    """Return what bounds each of a pair's answers with its prompt, where ``max_length`` does not.

    That is the model's ``context``, in rows that are longer.
    """
    context = recipe.model.max_seq_len
    return {"context": context} if recipe.dpo.data.max_length > context else {}


def require_context(folder: Path, recipe: Recipe, stage: str) -> None:
    """Refuse a model that reads less than the stage's longest conversation or answer.

    Errors:
        UsageError: it does; the message has both lengths.
    """
    reads, length = describe_folder(folder).max_seq_len, getattr(recipe, stage).data.max_length
    if min(length, recipe.model.max_seq_len) > reads:
        raise UsageError(
            f"{folder}: the model reads {reads} tokens, but {stage}.data.max_length is {length}; "
            "lower it to that"
        )


def settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return what the recipe says about making a prepared folder, as its manifest keeps it."""
    data = recipe.data
    if name == "raw":
        found: Any = {"sources": data.sources, "mixture": data.mixture, "village": data.village}
    elif name == "clean":
        found = {"clean": recipe.clean, "validation_fraction": data.validation_fraction}
    else:
        sections = {"tokenizer": recipe.tokenizer, "packed": recipe.pack}
        found = sections[name] if name in sections else rows_config(recipe, name)
    plain: dict[str, Any] = json.loads(json.dumps(to_plain(found)))
    return plain | ({"context": pair_context(recipe).get("context")} if name == "dpo" else {})


def require_current(run: Run, recipe: Recipe, name: str) -> None:
    """Refuse prepared data made from something replaced since, or with other settings.

    Errors:
        UsageError: naming the script that makes it anew.
    """
    folders = {"raw": run.data("raw"), "clean": run.data("clean"), "tokenizer": run.tokenizer}
    chain = ("packed", "clean", "tokenizer", "raw") if name == "packed" else (name, "tokenizer")
    for part in chain:
        folder = folders.get(part, run.data(part))
        if part == "raw" and not folder.exists():
            continue
        manifest = storage.read_manifest(folder, made_by=SCRIPTS[part])
        _require_settings(folder, manifest.get("config"), settings(recipe, part), SCRIPTS[part])
        made_from = manifest.get("inputs", {})
        for input_name, found in made_from.items():
            made = folders.get(input_name)
            if made is None or not (made / storage.MANIFEST).is_file():
                continue
            if storage.read_manifest(made)["fingerprint"] != found:
                raise UsageError(
                    f"{folder}: made from an earlier {made.name} than the one that is there now; "
                    f"run {SCRIPTS[part]} again"
                )


def _require_settings(folder: Path, made_with: Any, wanted: dict[str, Any], script: str) -> None:
    """Refuse a folder made with other settings: those of the recipe would have no effect."""
    for key, now in wanted.items():
        # The village's rows have no sources in the recipe; what they were read from is an input.
        if key == "sources" and not now:
            continue
        then = made_with.get(key) if isinstance(made_with, dict) else None
        if then != now:
            bound = "a bound for an answer with its prompt (model.max_seq_len) of"
            raise UsageError(
                f"{folder}: made with {bound if key == 'context' else key} {then}, now it is "
                f"{now}; run {script} with that setting first, or set it back"
            )


def require_same_files(stage_folder: Path, data_folder: Path, files: Mapping[str, str]) -> None:
    """Refuse to go on with a stage whose data are not those it began with, naming the file.

    ``files`` are the SHA-256 of the files in ``data_folder``, by their paths in it.

    Errors:
        CheckpointError: one was changed, added, removed or renamed.
    """
    known = known_files(stage_folder)
    if known is None:
        return
    for name in sorted({*known, *files}):
        if known.get(name) == files.get(name):
            continue
        what = "changed" if name in known and name in files else "added"
        if name not in files:
            heirs = [new for new, found in files.items() if found == known[name]]
            what = f"renamed to {heirs[0]}" if heirs else "removed"
        raise CheckpointError(
            f"{data_folder / name}: {what} since {stage_folder.name} began to train on it; put it "
            "back as it was, or start the stage again with --no-resume"
        )


def known_files(stage_folder: Path) -> dict[str, str] | None:
    """Return what :func:`note_files` has written down, None where a stage has not begun.

    Errors:
        CheckpointError: it cannot be read.
    """
    path = stage_folder / DATA_FILES
    return dict(storage.read_json(path, CheckpointError)) if path.is_file() else None


def note_files(stage_folder: Path, files: Mapping[str, str]) -> None:
    """Write down which files a stage trains on, for :func:`require_same_files`."""
    if not (stage_folder / DATA_FILES).is_file():
        storage.write_json(stage_folder / DATA_FILES, dict(files))


def packed_sources(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Return what a record says about packed rows given with ``--data``.

    The sources in the folder's own manifest where it has one; else the folder, licence unknown.
    """
    if (folder / storage.MANIFEST).is_file():
        listed = storage.read_manifest(folder).get("sources")
        if isinstance(listed, list) and listed:
            return listed
    unknown = {"licence": "unknown (given with --data)", "rows": num_rows}
    return [{"name": folder.name, "location": str(folder), **unknown}]


def say(folder: Path, text: str) -> None:
    """Print a line about a prepared folder."""
    print_line(f"{folder}: {text}")
