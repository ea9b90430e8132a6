"""Commands that look at a run, or at this machine, and train nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from sevenfold.base import console, records, storage
from sevenfold.base.errors import BadDataError, CheckpointError, install_command
from sevenfold.base.records import GATED_STAGES, Run, open_run
from sevenfold.verify import integrity, standing
from sevenfold.verify import lineage as lineages
from sevenfold.verify.data_card import sources as data_sources

EXTRAS = {
    "torchao": ("fp8", "FP8 on several nodes, or where weights are sharded"),
    "liger-kernel": ("kernels", "fused RoPE, norm and SwiGLU"),
    "cut-cross-entropy": ("kernels", "loss without logits in memory"),
    "bitsandbytes": ("qlora", "LoRA on a base in four bits"),
    "datatrove": ("data", "large-scale cleaning"),
    "lm-eval": ("eval", "the usual benchmarks"),
    "gguf": ("gguf", "models for llama.cpp"),
    "tensorboard": ("tensorboard", "curves of a run with tracking: tensorboard"),
    "pytest": ("dev", "the tests"),
}


def report(options: argparse.Namespace) -> None:
    """Write ``report.html`` anew."""
    from sevenfold.verify.report import write_report

    console.print_line(str(write_report(open_run(options.run))))


def lineage(options: argparse.Namespace) -> None:
    """Print what each artifact was made from, how, from which sources, and past which gates."""
    run = open_run(options.run)
    rows = []
    for artifact in lineages.trace(run):
        parents = [f"{p.name} ({p.state}, {p.fingerprint[:12]})" for p in artifact.parents]
        rows.append([artifact.name, artifact.fingerprint[:12], ", ".join(parents) or "-"])
    console.print_table(f"lineage of {run.folder}", ["artifact", "fingerprint", "from"], rows)
    made = [
        [m.stage, m.settings[:12], m.seed, m.code, m.device, m.packages, m.items, _gate(run, m)]
        for m in lineages.makings(run)
    ]
    columns = ["model", "settings", "seed", "code", "made on", "with", "measured on", "gate"]
    console.print_table(f"recipe {run.facts['fingerprint'][:12]}", columns, made)
    sources = [[s.name, s.used_as, s.licence or "unknown", s.location] for s in data_sources(run)]
    console.print_table("sources", ["source", "used as", "licence", "from"], sources)
    for stage in GATED_STAGES:
        for gate in lineages.read_record_if_there(run, stage).get("forced_promotions", ()):
            said = f"{stage} rests on {gate['stage']}, whose gate was gone past: {gate['reason']}"
            console.print_line(said, style="yellow")


def _gate(run: Run, made: lineages.Making) -> str:
    """Return what the verdict on a stage's model says, if it still counts, and what was forced."""
    record = lineages.read_record_if_there(run, made.stage)
    path = run.stage(made.stage) / "verdict.json"
    verdict = storage.read_json(path) if path.is_file() else {}
    held = standing.judge(run, made.stage, record=record, verdict=verdict, started=True)
    return f"{held.word}, forced: {held.forced}" if held.forced else held.word


def verify(options: argparse.Namespace) -> None:
    """Check every byte of a run: no file changed, none missing, none too many.

    Errors:
        BadDataError: some are; each is named.
        CheckpointError: only checkpoints are concerned.
    """
    run = open_run(options.run)
    found = integrity.examine(run.folder)
    if found.problems:
        problems = list(found.problems.values())
        for problem in problems:
            console.print_line(str(problem), style="red")
        told = f"{run.folder}: {len(problems)} not as written, first {problems[0]}"
        if all(isinstance(problem, CheckpointError) for problem in problems):
            raise CheckpointError(told)
        raise BadDataError(told)
    if found.unsealed:
        names = ", ".join(sorted({path.name for path in found.unsealed}))
        console.print_line(
            f"{run.folder}: begun before files that stand alone had a seal, so "
            f"{len(found.unsealed)} of them could not be checked: {names}",
            style="yellow",
        )
    checked = found.num_files - len(found.unsealed)
    console.print_line(
        f"{run.folder}: {found.num_folders} folders, {checked} files, all as written"
    )


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
        if name != "python" and name not in EXTRAS:
            rows.append([name, version, ""])
    for name, (extra, purpose) in EXTRAS.items():
        try:
            rows.append([name, importlib.metadata.version(name), purpose])
        except importlib.metadata.PackageNotFoundError:
            said = f"{purpose}: {install_command(extra)}"
            rows.append([name, Text("missing", style="yellow"), said])
    console.print_table("this machine", ["what", "found", "meaning"], rows)


def _means(gpu: Mapping[str, Any]) -> str:
    if not gpu["num_gpus"]:
        return "presets demo and custom; small and 7b need a GPU"
    parts = [f"{gpu['memory_gib']:.0f} GiB each", f"compile mode {gpu['compile_mode']}"]
    parts.append("FP8" if gpu["supports_fp8"] else "no FP8, BF16")
    return ", ".join(parts)
