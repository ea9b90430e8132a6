"""What the training stages share: open the input, build the bench, train, write the record."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sevenfold.base import records, storage
from sevenfold.base.config import fingerprint, to_plain
from sevenfold.base.console import TrainingProgress, print_line
from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import OOMHandler, detect_gpu_type, setup_torch_backends
from sevenfold.data.batches import Batch, Batches, RowSource
from sevenfold.model import attention, float8, kernels, llama
from sevenfold.model.config import from_hf
from sevenfold.objective.next_token import Objective, Scorer
from sevenfold.train import checkpoint, loop, optimizer, parallel
from sevenfold.train.config import TrainConfig
from sevenfold.train.recovery import FiniteGuard
from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What a script's flags say beyond the recipe."""

    oom_recovery: bool = False
    resume: bool = True
    start_from: Path | None = None
    force: str | None = None
    data: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One stage of one run, with its inputs open and checked.

    ``settings`` are all settings of the stage as plain values, ``config`` the training part with
    what the hardware decides decided.
    """

    run: records.Run
    recipe: Recipe
    stage: str
    config: TrainConfig
    settings: dict[str, Any]
    source: records.Source
    inputs: dict[str, str]
    options: StageOptions
    processes: parallel.Processes

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.run.stage(self.stage)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that goes with the model: its own where it came from outside."""
        return self.source.folder if self.source.external else self.run.tokenizer


def decide(config: TrainConfig) -> TrainConfig:
    """Replace ``auto`` by what this machine's GPU is best at.

    Errors:
        UsageError: FP8 is asked for, or decided, and cannot be had here; the reason is named.
    """
    gpu = detect_gpu_type()
    precision, compile_mode = config.precision, config.compile
    if precision == "auto":
        precision = "fp8" if gpu["supports_fp8"] else "bf16" if gpu["num_gpus"] else "fp32"
    if compile_mode == "auto":
        compile_mode = gpu["compile_mode"]  # type: ignore[assignment]
    if precision == "fp8":
        float8.require_float8()
    return dataclasses.replace(config, precision=precision, compile=compile_mode)


def open_source(run: records.Run, previous: str, options: StageOptions) -> records.Source:
    """Open the model to start from: the previous stage's, if promoted, or one from outside.

    Errors:
        GateRefusedError: the previous stage has no passing verdict for these bytes.
        UsageError: there is no such model.
    """
    if options.start_from is None:
        return records.open_promoted(run, previous, force=options.force)
    folder = options.start_from.resolve()
    if not (folder / "config.json").is_file():
        raise UsageError(f"--start-from {folder}: no config.json; name a Hugging Face model folder")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = fingerprint({path.name: storage.sha256_file(path) for path in files})
    return records.Source(folder=folder, fingerprint=found, stage="external", external=True)


def open_data(run: records.Run, name: str) -> str:
    """Check prepared rows byte for byte and return their fingerprint.

    Errors:
        UsageError: they have not been prepared; the message names the script.
        BadDataError: a file has changed since.
    """
    script = "scripts/08_prepare_dpo_data.py" if name == "dpo" else "scripts/06_prepare_sft_data.py"
    storage.read_manifest(run.data(name), made_by=script)
    return str(storage.verify_folder(run.data(name))["fingerprint"])


def open_job(
    run: records.Run,
    recipe: Recipe,
    stage: str,
    *,
    section: Any,
    config: TrainConfig,
    source: records.Source,
    data: str,
    options: StageOptions,
) -> Job | None:
    """Return the stage's job, or None where it is finished already.

    ``section`` is the stage's part of the recipe, ``config`` its training settings, ``data`` the
    fingerprint of what it trains on.
    """
    decided = decide(config)
    job = Job(
        run=run,
        recipe=recipe,
        stage=stage,
        config=decided,
        settings=_settings(section, decided),
        source=source,
        inputs={"model": source.fingerprint, "data": data},
        options=options,
        processes=parallel.join(),
    )
    return None if _is_finished(job) else job


def _is_finished(job: Job) -> bool:
    """True if the stage has been trained from these inputs with these settings.

    With ``--no-resume`` a finished or half-finished stage is moved to ``<stage>.old-N`` first.

    Errors:
        UsageError: it was trained from other inputs or with other settings.
    """
    if not job.options.resume and job.processes.is_main and job.folder.exists():
        numbers = (n for n in range(1, 10_000) if not _old(job, n).exists())
        storage.move_folder(job.folder, _old(job, next(numbers)))
    job.processes.wait()
    if not (job.folder / "record.json").is_file():
        return False
    record = job.run.record(job.stage)
    for section, new in (("inputs", job.inputs), ("config", job.settings)):
        for name, old, now in _differences(record.get(section, {}), new):
            raise UsageError(
                f"{job.folder}: {job.stage} was trained with {section}.{name} {old}, now it is "
                f"{now}; train it again with {records.SCRIPTS[job.stage]} --no-resume, or set it "
                "back"
            )
    print_line(f"{job.stage}: already finished, {record['metrics'].get('step')} steps")
    return True


def _old(job: Job, number: int) -> Path:
    return job.folder.parent / f"{job.stage}.old-{number}"


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields whose values differ, by their full names."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def load_scorer(job: Job) -> Scorer:
    """Load the model to train, with the kernels, attention and precision that are asked for."""
    config, device = job.config, job.processes.device
    gpu = detect_gpu_type()
    setup_torch_backends(deterministic=config.deterministic)
    attention.prefer_fast_kernels(gpu["compute_capability"], deterministic=config.deterministic)
    wanted = job.recipe.kernels
    active = kernels.setup_kernel_optimizations(liger=wanted.liger, cce=wanted.cce)
    attention.register_attention()
    torch.manual_seed(job.recipe.seed)
    model = llama.load_model(
        job.source.folder,
        DTYPES[config.weights],
        device,
        attn_implementation=attention.IMPLEMENTATION,
    )
    if config.precision == "fp8":
        float8.convert_to_float8(model)
    if config.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    on_gpu = device.type == "cuda"
    kernel = (
        "cce" if active["cce"] else "chunked" if on_gpu and config.compile != "none" else "plain"
    )
    return Scorer(model, kernel=kernel)


def place(job: Job, scorer: Scorer) -> None:
    """Compile layer by layer and shard over the processes, once adapters are in place."""
    layers = list(scorer.causal_model.get_decoder().layers)
    if job.config.compile != "none":
        mode = {"max-autotune": "max-autotune-no-cudagraphs"}.get(job.config.compile)
        for layer in layers:
            layer.compile(mode=mode, dynamic=False)
    parallel.shard(scorer, layers, job.processes, bf16=job.config.precision != "fp32")


def validation_batches(job: Job, rows: RowSource) -> list[Batch]:
    """Return the held-out batches of this process, at the longest context."""
    config, world = job.config, job.processes.world
    per_batch = config.tokens_per_batch // rows.row_length
    count = min(rows.num_rows, config.validation_batches * per_batch) // world * world
    if count == 0:
        raise UsageError(
            f"{job.stage}: {rows.num_rows} held-out rows for {world} processes; raise the "
            "validation fraction"
        )
    whole = rows.batch(np.arange(count), rows.row_length)
    return [whole.rows(job.processes.rank, whole.num_rows, world)]


def assemble(
    job: Job, scorer: Scorer, objective: Objective, rows: RowSource, held_out: RowSource
) -> loop.Workbench:
    """Put everything on one bench, and go back to the latest checkpoint where there is one."""
    config, processes = job.config, job.processes
    num_steps = config.num_steps(rows.num_rows, rows.row_length)
    model_config = from_hf(scorer.causal_model.config)
    gpu = detect_gpu_type()
    bench = loop.Workbench(
        stage=job.stage,
        scorer=scorer,
        objective=objective,
        batches=Batches(
            rows,
            tokens_per_batch=config.tokens_per_batch,
            contexts=config.contexts,
            num_steps=num_steps,
            seed=job.recipe.seed,
            rank=processes.rank,
            world=processes.world,
        ),
        validation=validation_batches(job, held_out),
        optimizer=optimizer.make_optimizer(scorer, config.optimizer),
        config=config,
        processes=processes,
        checkpoints=checkpoint.Checkpoints(
            job.folder / "checkpoints", keep=config.keep_checkpoints
        ),
        metrics=storage.JsonLines(job.folder / "metrics.jsonl"),
        memory=OOMHandler(config.micro_batch, enabled=job.options.oom_recovery),
        progress=_Unseen(),
        identity={"inputs": job.inputs, "config": {**job.settings, "num_steps": num_steps}},
        flops_per_token=model_config.flops_per_token,
        peak_flops=gpu["peak_bf16_tflops"] * 1e12,
        guard=FiniteGuard(config.max_skipped_steps),
    )
    if loop.resume(bench) and processes.is_main:
        print_line(f"{job.stage}: resuming from step {bench.step} of {num_steps}")
    return bench


class _Unseen:
    def update(self, row: dict[str, Any]) -> None:
        """Show nothing: the bar is put in when training starts."""


class _Shown:
    """The progress bar, and wandb where the run tracks with it."""

    def __init__(self, bar: TrainingProgress, tracker: Any):
        self._bar = bar
        self._tracker = tracker

    def update(self, row: dict[str, Any]) -> None:
        """Show one row of metrics."""
        self._bar.update(row)
        if self._tracker is not None:
            self._tracker.log(row, step=row["step"])


def train(job: Job, bench: loop.Workbench) -> dict[str, Any]:
    """Train to the end and return the last row of metrics."""
    if bench.step >= bench.num_steps:
        rows = [row for row in bench.metrics.read() if "loss" in row and "event" not in row]
        return rows[-1]
    main = job.processes.is_main
    title, steps = job.stage, bench.num_steps
    with (
        TrainingProgress(title, num_steps=steps, start_step=bench.step, enabled=main) as bar,
        _tracker(job) as tracker,
    ):
        bench.progress = _Shown(bar, tracker)
        return loop.fit(bench)


@contextlib.contextmanager
def _tracker(job: Job) -> Iterator[Any]:
    """Open a wandb run, offline unless WANDB_MODE says otherwise; None where not asked for."""
    if job.recipe.tracking != "wandb" or not job.processes.is_main:
        yield None
        return
    import wandb

    run = wandb.init(
        project="sevenfold",
        name=f"{job.run.folder.name}-{job.stage}",
        dir=str(job.run.folder),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        config={"stage": job.stage, "preset": job.run.preset, **job.settings},
        settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
    )
    try:
        yield run
    finally:
        run.finish()


def close(job: Job, bench: loop.Workbench, last: Mapping[str, Any], **facts: Any) -> None:
    """Write the stage's record, which names everything that went into the model."""
    gpu = detect_gpu_type()
    hours = bench.elapsed_s / 3600 * max(1, job.processes.world)
    price = job.recipe.gpu_hour_price
    events = [row for row in bench.metrics.read() if "event" in row]
    record = {
        "stage": job.stage,
        "fingerprint": storage.read_manifest(job.run.model(job.stage))["fingerprint"],
        "inputs": job.inputs,
        "config": job.settings,
        "config_fingerprint": fingerprint(job.settings),
        "metrics": {name: value for name, value in last.items() if _is_finite(value)},
        "events": events,
        "num_skipped_steps": bench.guard.num_skipped,
        "forced": job.source.forced,
        "external": job.source.external,
        "elapsed_s": bench.elapsed_s,
        "finished_at_s": time.time(),
        "gpu": gpu["name"],
        "num_gpus": gpu["num_gpus"],
        "gpu_hours": hours if gpu["num_gpus"] else 0.0,
        "cost": hours * price if gpu["num_gpus"] and price is not None else None,
        "seed": job.recipe.seed,
        "code": records.code_version(),
        "versions": records.package_versions(),
        **facts,
    }
    job.run.write_record(job.stage, record)
    print_line(f"{job.stage}: finished, model in {job.run.model(job.stage)}")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def export(job: Job, bench: loop.Workbench) -> None:
    """Write the trained model as a Hugging Face folder."""
    state = parallel.gather_model(bench.scorer.causal_model, job.processes)
    if job.processes.is_main:
        llama.save_model(
            bench.scorer.causal_model,
            job.tokenizer,
            job.run.model(job.stage),
            model_dtype(job),
            state_dict=state,
        )
    job.processes.wait()


def model_dtype(job: Job) -> torch.dtype:
    """Type in which the run's model folders hold their weights."""
    return llama.DTYPES[job.recipe.init.dtype]


def _settings(section: Any, config: TrainConfig) -> dict[str, Any]:
    """Return a stage's settings as plain values, flat enough that a change names its field."""
    training = to_plain(config)
    others = {k: v for k, v in to_plain(section).items() if k != "train" and k not in training}
    return {**others, **training}
