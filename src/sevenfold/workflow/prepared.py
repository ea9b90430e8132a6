"""What has been prepared already: whether it is current, whole, and made by which script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sevenfold.base import storage
from sevenfold.base.config import to_plain
from sevenfold.base.console import print_line
from sevenfold.base.errors import UsageError
from sevenfold.base.records import Run

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


def require_current(run: Run, name: str) -> None:
    """Refuse prepared data that was made from something that has been replaced since.

    Errors:
        UsageError: naming the script that makes it anew.
    """
    folders = {"raw": run.data("raw"), "clean": run.data("clean"), "tokenizer": run.tokenizer}
    chain = {"packed": ("packed", "clean", "tokenizer"), "sft": ("sft", "tokenizer")}
    for part in chain.get(name, (name, "tokenizer")):
        folder = folders.get(part, run.data(part))
        made_from = storage.read_manifest(folder, made_by=SCRIPTS[part]).get("inputs", {})
        for input_name, found in made_from.items():
            made = folders.get(input_name)
            if made is None or not (made / storage.MANIFEST).is_file():
                continue
            if storage.read_manifest(made)["fingerprint"] != found:
                raise UsageError(
                    f"{folder}: made from an earlier {made.name} than the one that is there now; "
                    f"run {SCRIPTS[part]} again"
                )


def say(folder: Path, text: str) -> None:
    """Print a line about a prepared folder."""
    print_line(f"{folder}: {text}")
