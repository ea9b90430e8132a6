"""What the training stages share: open the input, build the bench, train, write the record."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sevenfold.base import records, storage
from sevenfold.base.config import fingerprint, to_plain
from sevenfold.base.console import print_line
from sevenfold.base.errors import SevenfoldError, StoppedError, UsageError
from sevenfold.base.hardware import detect_gpu_type
from sevenfold.data.shards import open_shards
from sevenfold.model import float8, llama
from sevenfold.train import checkpoint, layout, loop, parallel
from sevenfold.train.config import TrainConfig
from sevenfold.workflow import choosing, contamination, prepare, prepared
from sevenfold.workflow.recipe import Recipe

log = logging.getLogger(__name__)

ABSENT = "not there"
CHECKPOINTS = "checkpoints"
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


def goes_on(folder: Path, options: StageOptions) -> bool:
    """Whether the stage in ``folder`` goes on from a checkpoint, or ends with an error.

    Where there is one, it never starts from the beginning.
    """
    return options.resume and bool(checkpoint.Checkpoints(folder / CHECKPOINTS, keep=1).steps())


def decide(config: TrainConfig, *, stage: str) -> TrainConfig:
    """Replace ``auto`` by what this machine's GPU is best at.

    Errors:
        UsageError: FP8 is asked for, or decided, and cannot be had here; the reason is named; or
            ``recompute`` asks for what only compiled layers do.
    """
    gpu = detect_gpu_type()
    processes, compile_mode = parallel.join(), config.compile
    # Before its processes have started, a stage is for all GPUs of this machine.
    num_gpus, per_node = processes.world, processes.per_node
    if num_gpus == 1:
        num_gpus = per_node = max(1, gpu["num_gpus"])
    precision = layout.precision_on(
        config, gpu, num_gpus=num_gpus, per_node=per_node, compares=stage == "dpo"
    )
    if compile_mode == "auto":
        compile_mode = gpu["compile_mode"]  # type: ignore[assignment]
    if precision == "fp8_torchao" != config.precision:
        log.warning("fp8: sharded weights train with torchao's recipe (precision fp8_torchao)")
    if precision in ("fp8", "fp8_torchao"):
        float8.require_float8(torchao=precision == "fp8_torchao")
    if config.recompute == "cheap" and compile_mode == "none":
        raise UsageError(
            "recompute: cheap is torch.compile's choice of what to compute again, and compile is "
            "none here; set recompute to false or true, or compile to default"
        )
    return dataclasses.replace(config, precision=precision, compile=compile_mode)


def open_source(run: records.Run, previous: str, options: StageOptions) -> records.Source:
    """Open the model to start from: the previous stage's, if promoted, or one from outside.

    One from outside stands in the place of the previous stage by now (`outside.take_in`), but for
    pretraining, before which there is no gate.

    Errors:
        GateRefusedError: the previous stage has no passing verdict for these bytes.
        UsageError: there is no such model, or ``--force`` would have no effect.
    """
    if options.start_from is None or previous != "init":
        parallel.join().wait()  # for the first process to take a model in
        return records.open_promoted(run, previous, force=options.force)
    can_resume = options.resume and (run.stage("pretrain") / "checkpoints").is_dir()
    if options.force is not None and not can_resume:
        raise UsageError(
            "--force has no effect with --start-from: no gate stands before pretraining, and "
            "there is no checkpoint of it to go on from; leave it out"
        )
    folder = options.start_from.resolve()
    if not (folder / "config.json").is_file():
        raise UsageError(f"--start-from {folder}: no config.json; name a Hugging Face model folder")
    found = outside_fingerprint(folder)
    return records.Source(folder=folder, fingerprint=found, stage="external", external=True)


def outside_fingerprint(folder: Path) -> str:
    """Identify the bytes of a model folder that has no manifest of ours."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return fingerprint(storage.sha256_files(folder, files))


def check_named_inputs(run: records.Run, recipe: Recipe, options: StageOptions) -> None:
    """Open what ``--start-from`` and ``--data`` name, for a dry run, which opens nothing else.

    Errors:
        UsageError: nothing of the kind is there.
        BadDataError: the data are not what training needs.
    """
    rows = recipe.model.vocab_size
    if options.start_from is not None:
        folder = open_source(run, "init", dataclasses.replace(options, force=None)).folder
        rows = int(storage.read_json(folder / "config.json").get("vocab_size", rows))
    if options.data is not None:
        open_shards(options.data, vocab_size=rows, min_length=recipe.pretrain.longest_context)


def open_rows(run: records.Run, recipe: Recipe, stage: str, source: records.Source) -> str:
    """Check a stage's prepared rows byte for byte and return their fingerprint.

    A model from outside brings its own tokenizer, so the rows are made anew with that one.

    Errors:
        UsageError: they have not been prepared, or from something that was replaced since; the
            message names the script. Or the model reads less than they have.
        BadDataError: a file has changed since.
    """
    prepared.require_context(source.folder, recipe, stage)
    if _has_foreign_tokenizer(run, source):
        processes = parallel.join()
        if processes.is_main:
            prepare.prepare_rows(run, recipe, stage, source.folder)
        processes.wait()
    else:
        require_same_tokenizer(run, source)
        prepared.require_current(run, recipe, stage)
        contamination.require_searched(run, recipe, stage)
    return str(storage.verify_folder(run.data(stage))["fingerprint"])


def _has_foreign_tokenizer(run: records.Run, source: records.Source) -> bool:
    """True if ``source``, or a stage it was trained from, was started from outside the run."""
    if source.external:
        return True
    before = records.GATED_STAGES[: records.GATED_STAGES.index(source.stage) + 1]
    finished = [stage for stage in before if (run.stage(stage) / "record.json").is_file()]
    external = any(run.record(stage).get("external") for stage in finished)
    return external and bool(other_tokenizer_file(run, source.folder))


def require_same_tokenizer(run: records.Run, source: records.Source) -> None:
    """Refuse a model of this run whose tokenizer is not the one that the data are made with.

    Errors:
        UsageError: the tokenizer was made anew after the model; the message names the scripts.
    """
    if name := other_tokenizer_file(run, source.folder):
        again = records.SCRIPTS["init"]
        if source.stage != "init":
            again += f", then {records.SCRIPTS['pretrain']} --no-resume and what follows it,"
        raise UsageError(
            f"{source.folder / name}: not the one in {run.tokenizer}, which was made anew after "
            f"this model; run {again} again"
        )


def other_tokenizer_file(run: records.Run, model: Path) -> str | None:
    """Return the first tokenizer file that is not the same beside the model and in the run."""
    for name in llama.TOKENIZER_FILES:
        files = [folder / name for folder in (run.tokenizer, model)]
        if len({storage.sha256_file(file) if file.is_file() else "" for file in files}) > 1:
            return name
    return None


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
    processes = parallel.join()
    recipe, decided, chosen = choosing.settle_stage(
        run.stage(stage),
        recipe,
        stage,
        decide(config, stage=stage),
        model_folder=source.folder,
        processes=processes,
        keep=options.resume,
    )
    job = Job(
        run=run,
        recipe=recipe,
        stage=stage,
        config=decided,
        settings=_settings(section, config, decided),
        source=source,
        inputs={"model": source.fingerprint, "data": data},
        options=options,
        processes=processes,
    )
    if _is_finished(job):
        return None
    if processes.is_main:
        choosing.note(job.folder, chosen)
    return job


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
            again = f"train it again with {records.SCRIPTS[job.stage]} --no-resume"
            if old == ABSENT:
                raise UsageError(
                    f"{job.folder}: {job.stage} was trained by a version that had no "
                    f"{section}.{name}, now it is {now}; {again}, or go on from it as it is with "
                    "the stage after it"
                )
            raise UsageError(
                f"{job.folder}: {job.stage} was trained with {section}.{name} {old}, now it is "
                f"{now}; {again}, or set it back"
            )
    if not _is_whole(job, record):
        return False
    print_line(f"{job.stage}: already finished, {record['metrics'].get('step')} steps")
    return True


def _is_whole(job: Job, record: Mapping[str, Any]) -> bool:
    """True if the finished stage's model is what was written; else its last checkpoint serves."""
    try:
        found = storage.verify_folder(job.run.model(job.stage))["fingerprint"]
        problem = "" if found == record.get("fingerprint") else f"{job.folder}: another model"
    except SevenfoldError as error:
        problem = str(error)
    if problem:
        log.warning("%s; it is made again from the last checkpoint", problem)
    return not problem


def _old(job: Job, number: int) -> Path:
    return job.folder.parent / f"{job.stage}.old-{number}"


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields whose values differ, by their full names."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            then, now = old.get(key, ABSENT), new.get(key, ABSENT)
            yield from _differences(then, now, f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


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
        "forced_promotions": job.source.forced_promotions,
        "external": job.source.external,
        "decontaminated": contamination.facts_of(_data_folder(job)),
        "elapsed_s": bench.elapsed_s,
        "finished_at_s": time.time(),
        "gpu": gpu["name"],
        "num_gpus": gpu["num_gpus"],
        "precision": job.config.precision,
        "kernels": to_plain(job.recipe.kernels),
        "bit_identical": job.config.deterministic or gpu["num_gpus"] == 0,
        "gpu_hours": hours if gpu["num_gpus"] else 0.0,
        "cost": hours * price if gpu["num_gpus"] and price is not None else None,
        "seed": job.recipe.seed,
        "code": records.code_version(),
        "versions": records.package_versions(),
        "files": records.own_files(job.folder),
        **facts,
    }
    job.run.write_record(job.stage, record)
    print_line(f"{job.stage}: finished, model in {job.run.model(job.stage)}")
    if bench.stopped_at_the_end:
        raise StoppedError(
            f"stopped by a signal in the last step; {job.stage} is finished and saved, run the "
            "same command again to go on"
        )


def _data_folder(job: Job) -> Path:
    if job.stage == "pretrain":
        return job.options.data or job.run.data("packed")
    return job.run.data(job.stage)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def export(job: Job, bench: loop.Workbench) -> None:
    """Write the trained model as a Hugging Face folder."""
    state = parallel.gather_model(bench.scorer.causal_model, job.processes)
    if job.processes.is_main:
        llama.save_model(
            bench.scorer.causal_model,
            job.source.folder,
            job.run.model(job.stage),
            model_dtype(job),
            state_dict=state,
        )
    job.processes.wait()


def model_dtype(job: Job) -> torch.dtype:
    """Type in which the run's model folders hold their weights."""
    return llama.DTYPES[job.recipe.init.dtype]


def _settings(section: Any, asked: TrainConfig, decided: TrainConfig) -> dict[str, Any]:
    """Return a stage's settings as plain values, flat enough that a change names its field.

    Another number of GPUs may go on with a stage, so FP8 that was not asked for by its recipe is
    just that here; which recipe trains is said with the program.
    """
    training = to_plain(decided)
    if decided.precision == "fp8_torchao" != asked.precision:
        training["precision"] = "fp8"
    others = {k: v for k, v in to_plain(section).items() if k != "train" and k not in training}
    return {**others, **training}
