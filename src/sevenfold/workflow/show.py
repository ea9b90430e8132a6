"""Commands that look at a run, or at this machine, and train nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from sevenfold.base import console, records, storage
from sevenfold.base.errors import BadDataError, SevenfoldError, UsageError
from sevenfold.base.records import GATED_STAGES, STAGES, Run, open_run
from sevenfold.verify import lineage as lineages
from sevenfold.verify.model_card import write_card

WATCH_EVERY_S = 2.0
EXTRAS = {
    "torchao": ("fp8", "FP8 training"),
    "liger-kernel": ("kernels", "fused RoPE, norm and SwiGLU"),
    "cut-cross-entropy": ("kernels", "loss without logits in memory"),
    "datatrove": ("data", "large-scale cleaning"),
    "lm-eval": ("eval", "the usual benchmarks"),
    "pytest": ("dev", "the tests"),
}


def report(options: argparse.Namespace) -> None:
    """Write ``report.html`` anew."""
    from sevenfold.verify.report import write_report

    console.print_line(str(write_report(open_run(options.run))))


def lineage(options: argparse.Namespace) -> None:
    """Print every artifact with what it was made from, and every gate that was gone past."""
    run = open_run(options.run)
    rows = []
    for artifact in lineages.trace(run):
        parents = [f"{p.name} ({p.state}, {p.fingerprint[:12]})" for p in artifact.parents]
        rows.append([artifact.name, artifact.fingerprint[:12], ", ".join(parents) or "-"])
    console.print_table(f"lineage of {run.folder}", ["artifact", "fingerprint", "from"], rows)
    for stage in GATED_STAGES:
        for gate in lineages.read_record_if_there(run, stage).get("forced_promotions", ()):
            said = f"{stage} rests on {gate['stage']}, whose gate was gone past: {gate['reason']}"
            console.print_line(said, style="yellow")


def verify(options: argparse.Namespace) -> None:
    """Recompute the checksums of every folder of the run that has a manifest.

    Errors:
        BadDataError: one or more folders are not what their manifest says; each is named.
    """
    run = open_run(options.run)
    manifests = sorted(run.folder.rglob(storage.MANIFEST))
    folders = [path.parent for path in manifests if not _is_hidden(path, run.folder)]
    broken, num_files = [], 0
    for folder in folders:
        try:
            num_files += len(storage.verify_folder(folder)["files"])
        except SevenfoldError as error:
            broken.append(str(error))
            console.print_line(str(error), style="red")
    if broken:
        raise BadDataError(
            f"{run.folder}: {len(broken)} of {len(folders)} folders are damaged, first "
            f"{broken[0]}; run the step that makes it again"
        )
    console.print_line(f"{run.folder}: {len(folders)} folders, {num_files} files, all as written")


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def export(options: argparse.Namespace) -> None:
    """Copy a stage's model, checked byte for byte, to a new folder, and write its card beside it.

    Errors:
        UsageError: the stage has not finished, or the target exists.
    """
    run = open_run(options.run)
    run.record(options.stage)
    source, target = run.model(options.stage), options.target
    if target.exists():
        raise UsageError(f"{target}: exists already; name a new folder")
    manifest = storage.verify_folder(source, exact=True)
    origin = f"{run.folder.resolve().name}/{options.stage}"
    with storage.new_folder(target, kind="model", exported_from=origin) as folder:
        for file in manifest["files"]:
            destination = folder / file["path"]
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file["path"], destination)
    if storage.read_manifest(target)["fingerprint"] != manifest["fingerprint"]:
        raise BadDataError(f"{target}: the copy differs from {source}; the disk may be failing")
    write_card(run, options.stage, target)
    word = "promoted" if _is_promoted(run, options.stage) else "NOT promoted by its gate"
    console.print_line(f"{target}: model of stage {options.stage}, {word}")


def _is_promoted(run: Run, stage: str) -> bool:
    try:
        records.open_promoted(run, stage)
    except SevenfoldError:
        return False
    return True


def watch(options: argparse.Namespace) -> None:
    """Show the newest metrics of the stage that is training, until interrupted."""
    run = open_run(options.run)
    shown: tuple[str, Any] | None = None
    while True:
        stage, row = _newest(run)
        if stage is not None and (stage, row.get("step")) != shown:
            shown = (stage, row.get("step"))
            console.print_line(f"{stage} step {row.get('step')}  {console.describe_step(row)}")
        if options.once:
            if stage is None:
                console.print_line(f"{run.folder}: nothing has trained yet")
            return
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return


def _newest(run: Run) -> tuple[str | None, Mapping[str, Any]]:
    files = [run.stage(stage) / "metrics.jsonl" for stage in STAGES]
    written = [path for path in files if path.is_file()]
    if not written:
        return None, {}
    newest = max(written, key=lambda path: path.stat().st_mtime)
    rows = [row for row in storage.JsonLines(newest).read() if "loss" in row]
    return newest.parent.name, rows[-1] if rows else {}


def doctor(options: argparse.Namespace) -> None:
    """Say what this machine can do, what is missing, and the command that installs it."""
    from sevenfold.base.hardware import detect_gpu_type

    gpu = detect_gpu_type()
    disk = shutil.disk_usage(Path.cwd())
    rows: list[list[Any]] = [
        ["Python", platform.python_version(), ""],
        ["processors", len(os.sched_getaffinity(0)), ""],
        ["free disk", f"{disk.free / 2**30:.1f} GiB", ""],
        ["GPU", f"{gpu['num_gpus']} x {gpu['name']}" if gpu["num_gpus"] else "none", _means(gpu)],
    ]
    for name, version in records.package_versions().items():
        if name != "python":
            rows.append([name, version, ""])
    for name, (extra, purpose) in EXTRAS.items():
        try:
            rows.append([name, importlib.metadata.version(name), purpose])
        except importlib.metadata.PackageNotFoundError:
            command = f"pip install -e '.[{extra}]'"
            rows.append([name, Text("missing", style="yellow"), f"{purpose}: {command}"])
    console.print_table("this machine", ["what", "found", "meaning"], rows)


def _means(gpu: Mapping[str, Any]) -> str:
    if not gpu["num_gpus"]:
        return "presets demo and custom; small and 7b need a GPU"
    parts = [f"{gpu['memory_gib']:.0f} GiB each", f"compile mode {gpu['compile_mode']}"]
    parts.append("FP8" if gpu["supports_fp8"] else "no FP8, BF16")
    return ", ".join(parts)
