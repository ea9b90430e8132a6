"""``sevenfold export``: a stage's model or adapter in a new folder, compared before it is."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from sevenfold.base import console, records, storage
from sevenfold.base.errors import BadDataError, SevenfoldError, UsageError
from sevenfold.base.records import Run, open_run
from sevenfold.verify.model_card import write_card


def export(options: argparse.Namespace) -> None:
    """Write a stage's model or adapter to a new folder, with its card beside it.

    Copies are compared byte for byte; a GGUF file is read back by two readers and compared tensor
    by tensor, token by token and logit by logit. Where something differs, no folder is left.

    Errors:
        UsageError: the stage has not finished, has no adapter, or the target exists; or GGUF
            cannot hold the model.
        BadDataError: the run's own files, or what was read back, are not what they should be.
    """
    run = open_run(options.run)
    run.record(options.stage)
    if options.target.exists():
        raise UsageError(f"{options.target}: exists already; name a new folder")
    if options.type is not None and options.format != "gguf":
        raise UsageError(f"--type has no effect on --format {options.format}; leave it out")
    if options.format == "gguf":
        said = _export_gguf(run, options.stage, options.target, options.type)
    else:
        said = _export_copy(run, options.stage, options.target, options.format)
    word = "promoted" if _is_promoted(run, options.stage) else "NOT promoted by its gate"
    console.print_line(f"{options.target}: {said} of stage {options.stage}, {word}")


def _origin(run: Run, stage: str) -> str:
    """Return where it comes from, without a path of this machine."""
    return f"{run.folder.resolve().name}/{stage}"


def _export_copy(run: Run, stage: str, target: Path, kind: str) -> str:
    source = run.model(stage) if kind == "model" else run.stage(stage) / "adapter"
    if kind == "adapter" and not source.is_dir():
        raise UsageError(f"{source}: stage {stage} has no adapter; stage lora has one")
    manifest = storage.verify_folder(source, exact=True)
    with storage.new_folder(target, kind=kind, exported_from=_origin(run, stage)) as folder:
        for file in manifest["files"]:
            destination = folder / file["path"]
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file["path"], destination)
    if storage.read_manifest(target)["fingerprint"] != manifest["fingerprint"]:
        storage.remove_folder(target)
        raise BadDataError(f"{target}: the copy differed from {source}; the disk may be failing")
    if kind == "model":
        write_card(run, stage, target)
    return kind


def _export_gguf(run: Run, stage: str, target: Path, weight_type: str | None) -> str:
    from sevenfold.model.gguf_check import compare_gguf
    from sevenfold.model.gguf_file import require_gguf, stored_type, write_gguf

    require_gguf()
    source = run.model(stage)
    manifest = storage.verify_folder(source, exact=True)
    weight_type = weight_type or stored_type(source)
    origin = _origin(run, stage)
    facts: dict[str, Any] = {
        "exported_from": origin,
        "model_fingerprint": manifest["fingerprint"],
        "weight_type": weight_type,
    }
    name = f"{origin.replace('/', '-')}-{weight_type}.gguf"
    with (
        console.working(f"{name}: written, read back and compared"),
        storage.new_folder(target, kind="gguf", **facts) as folder,
    ):
        write_gguf(source, folder / name, weight_type, name=origin)
        found = compare_gguf(source, folder / name, weight_type)
        write_card(run, stage, folder, gguf_file=name)
        storage.manifest_facts(
            folder, max_logit_change=found.max_logit_change, mean_kl_nats=found.mean_kl_nats
        )
    return (
        f"{name}, {found.num_tensors} tensors read back and compared, logits at most "
        f"{found.max_logit_change:.2g} off (KL {found.mean_kl_nats:.2g} nats),"
    )


def _is_promoted(run: Run, stage: str) -> bool:
    try:
        records.open_promoted(run, stage)
    except SevenfoldError:
        return False
    return True
