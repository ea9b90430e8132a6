"""`sevenfold bench`: how fast a stage trains here, saves and goes on; one JSON line a case.

Random weights and random tokens, everything else as in a run (`trial`). The lines go to standard
output, all else to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sevenfold.base import console, gpu_clock, hardware, records, storage
from sevenfold.base.errors import UsageError
from sevenfold.data.packing import PackedPreferences
from sevenfold.data.random_rows import RandomRows
from sevenfold.model import accumulating, kernels
from sevenfold.train import checkpoint, optimizer, parallel, replicas
from sevenfold.train.config import TrainConfig
from sevenfold.train.watching import OTHER, WAIT, Stopwatch, totals
from sevenfold.workflow import (
    bench_data,
    bench_dedup,
    bench_mmlu,
    bench_resume,
    choosing,
    steps,
    training,
    trial,
)
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.flags import DATA_BENCHMARKS, TEXT_BENCHMARKS
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.remaining import train_config

log = logging.getLogger(__name__)

TRAINING = ("pretrain", "sft", "dpo", "lora")
# Steps that are measured unless --steps says so; of checkpoint, steps from one save to the next.
STEPS = {**dict.fromkeys(TRAINING, 20), "checkpoint": 6, "resume": 1, "optimizer": 20}
LEAST_STEPS = {"checkpoint": trial.WARM_UP + 2}
FOLDER = ".bench-checkpoints"
# Where a checkpoint is saved before the one that is measured: the second reuses pinned memory.
NUM_SAVES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and with what."""

    what: str
    preset: str
    recipe: Recipe
    stage: str
    config: TrainConfig
    num_steps: int
    lengths: tuple[int, ...]
    folder: Path


def bench(options: argparse.Namespace) -> None:
    """Measure one thing, on all visible GPUs, and print one JSON line a case.

    Errors:
        UsageError: a flag means nothing for what is measured.
        SevenfoldError: as in `trial.measure`.
    """
    _require_sense(options)
    others = {"dedup": bench_dedup.bench, "mmlu": bench_mmlu.bench}
    others |= dict.fromkeys(DATA_BENCHMARKS, bench_data.bench)
    if options.what in others:
        others[options.what](options)
        return
    folder = options.folder / FOLDER
    if bench_resume.part() is None and os.environ.get("RANK", "0") == "0":
        storage.remove_folder(folder)  # of a benchmark that was killed
    if options.what == "resume" and bench_resume.part() is None:
        try:
            bench_resume.start_both(_arguments(options))
        finally:
            storage.remove_folder(folder)
        return
    if steps.on_all_gpus(_arguments(options)):
        return
    # A folder that holds no run: what is measured is the preset, not what was made of it once.
    run, recipe = recipes.resolve(options.preset, options.config, options.set, folder / "none")
    stage = options.what if options.what in TRAINING else "pretrain"
    decided = training.decide(train_config(recipe, stage), stage=stage)
    config = choosing.for_trial(recipe, stage, decided)
    if options.what == "optimizer":
        config = dataclasses.replace(config, compile="none")
    asked = Bench(
        what=options.what,
        preset=run.preset,
        recipe=recipe,
        stage=stage,
        config=config,
        num_steps=max(options.steps or STEPS[options.what], LEAST_STEPS.get(options.what, 1)),
        lengths=_lengths(options, config),
        folder=folder,
    )
    cases = {"checkpoint": _checkpoint, "resume": _resume, "optimizer": _optimizer}
    try:
        for found in cases.get(options.what, _training)(asked):
            if parallel.join().is_main:
                console.print_raw(json.dumps(found) + "\n")
    finally:
        if bench_resume.part() is None and parallel.join().is_main:
            storage.remove_folder(folder)


def _arguments(options: argparse.Namespace) -> list[str]:
    arguments = ["bench", options.what, "--folder", str(options.folder)]
    for name in ("preset", "config", "steps"):
        value = getattr(options, name)
        arguments += [] if value is None else [f"--{name}", str(value)]
    for name in ("set", "length"):
        for value in getattr(options, name):
            arguments += [f"--{name}", str(value)]
    return [*arguments, *(["--debug"] if options.debug else [])]


def _require_sense(options: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    if options.what == "resume" and options.steps is not None:
        raise UsageError("--steps means nothing to bench resume, which does one step; leave it out")
    if options.what in TEXT_BENCHMARKS and options.steps is not None:
        raise UsageError(
            f"--steps means nothing to bench {options.what}, which reads texts; leave it out"
        )
    if options.what not in (*TEXT_BENCHMARKS, *DATA_BENCHMARKS) and options.source:
        raise UsageError(f"--source means nothing to bench {options.what}; leave it out")
    for flag in ("workers", "gigabytes"):
        if options.what not in DATA_BENCHMARKS and getattr(options, flag) is not None:
            raise UsageError(f"--{flag} means nothing to bench {options.what}; leave it out")
    most = {"dedup": 0, "mmlu": 0, "optimizer": 0, "checkpoint": 1, "resume": 1}.get(
        options.what, len(options.length)
    )
    if len(options.length) > most:
        raise UsageError(
            f"--length is given {len(options.length)} times; bench {options.what} takes it {most} "
            "times, leave the others out"
        )


def _lengths(options: argparse.Namespace, config: TrainConfig) -> tuple[int, ...]:
    """Return the context lengths to measure; of what is no training stage, one, the longest."""
    if options.what not in TRAINING:
        return (*options.length, config.longest_context)[:1]
    return tuple(sorted(set(options.length) or {phase.length for phase in config.contexts}))


def _training(asked: Bench) -> Iterator[dict[str, Any]]:
    tried = trial.prepare(asked.recipe, asked.stage, asked.config)
    for length in asked.lengths:
        log.info("bench %s: %d steps at %d tokens", asked.what, asked.num_steps, length)
        found = trial.measure(tried, length, num_steps=asked.num_steps)
        rate = asked.config.tokens_per_batch / found.step_s / tried.processes.world
        yield {
            **_facts(asked, tried, length),
            "tokens_s_per_gpu": rate,
            **_rates(asked, found, rate),
            "mfu": _mfu(asked, rate, length),
            "peak_gib": found.peak_gib,
            "planned_gib": _planned_gib(asked, tried, found, length),
            "step_s": found.step_s,
            **{f"{phase}_s": seconds for phase, seconds in found.phases_s.items()},
            "slowest_step_s": found.slowest_step_s,
            "first_step_s": found.first_step_s,
            "sm_clock_mhz": found.sm_clock_mhz,
            "slowed_by": found.slowed_by,
            **_program(),
        }


def _rates(asked: Bench, found: trial.Measured, rate: float) -> dict[str, float]:
    """Return what else is counted in packed rows: tokens without padding, pairs of answers."""
    rows = found.rows
    if isinstance(rows, RandomRows):
        return {}
    more = {"non_padding_tokens_s_per_gpu": rate * rows.fill}
    if isinstance(rows, PackedPreferences):
        pairs_per_row = len(rows.preferences) / rows.num_rows
        more["pairs_s_per_gpu"] = rate / rows.row_length * pairs_per_row
    return more


def _mfu(asked: Bench, rate: float, length: int) -> float | None:
    """Return the share of the dense BF16 peak; of LoRA, which computes less, there is none."""
    peak = hardware.detect_gpu_type()["peak_bf16_tflops"] * 1e12
    if not peak or asked.stage == "lora":
        return None
    return rate * asked.recipe.model.flops_per_token(length) / peak


def _planned_gib(asked: Bench, tried: trial.Trial, found: trial.Measured, length: int) -> float:
    """Return the peak that the planner expects at one context length."""
    demand = choosing.laid_out(
        asked.recipe, asked.stage, asked.config, asked.recipe.model, tried.processes
    )
    demand = dataclasses.replace(demand, scored_share=found.scored_share)
    return demand.memory(length).peak_gib


def _facts(asked: Bench, tried: trial.Trial, length: int) -> dict[str, Any]:
    config = asked.config
    return {
        "case": asked.what,
        "preset": asked.preset,
        "stage": asked.stage,
        "seq_len": length,
        "tokens_per_batch": config.tokens_per_batch,
        "micro_batch": config.micro_batch,
        "steps": asked.num_steps,
        "precision": config.precision,
        "weights": config.weights,
        "compile": config.compile,
        "recompute": config.recompute,
        "deterministic": config.deterministic,
        "mask_documents": config.mask_documents,
        "optimizer": config.optimizer.kind,
        **({"base": asked.recipe.lora.base} if asked.stage == "lora" else {}),
        "loss_kernel": tried.scorer.kernel,
        "liger": kernels.active_kernels()["liger"],
        "processes": tried.processes.world,
    }


def _program() -> dict[str, Any]:
    return {
        "gpu": hardware.detect_gpu_type()["name"],
        "power_limit_w": gpu_clock.power_limit_w(),
        "code": records.code_version(),
        "versions": records.package_versions(),
    }


class _Timed(checkpoint.Checkpoints):
    """Checkpoints that note how long each took until it was on the disk."""

    durable_s: float = 0.0

    def save(self, snapshot: checkpoint.Snapshot) -> None:
        """Save as ever."""
        started = time.perf_counter()
        super().save(snapshot)
        assert self._writing is not None

        def note(_: object) -> None:
            self.durable_s = time.perf_counter() - started

        self._writing.add_done_callback(note)


def _checkpoint(asked: Bench) -> Iterator[dict[str, Any]]:
    """Save twice while training goes on; only one checkpoint lies on the disk at a time."""
    tried = trial.prepare(asked.recipe, asked.stage, asked.config)
    every, length = asked.num_steps, asked.lengths[0]
    checkpoints = _Timed(asked.folder, keep=1)
    made = trial.make_bench(
        tried,
        length,
        num_steps=NUM_SAVES * every + 1,
        checkpoints=checkpoints,
        checkpoint_every=every,
    )
    for number in range(NUM_SAVES):
        first = made.step
        save_step = (number + 1) * every
        # To the step after the save, which may be slower while the copy is under way.
        seconds = trial.train(made, save_step + 1 - first)
        saving, following = seconds[-2:]
        usual = seconds[trial.WARM_UP if first == 0 else 1 : -2]
        usual_s = statistics.median(totals(usual))
        call_s = saving[OTHER] - statistics.median(step[OTHER] for step in usual)
        extra_s = max(0.0, totals([following])[0] - usual_s)
        size_bytes = 0
        if tried.processes.is_main:
            folder = checkpoints.path(save_step)
            size_bytes = sum(p.stat().st_size for p in folder.iterdir())
            storage.remove_folder(folder)
        tried.processes.wait()
        yield {
            **_facts(asked, tried, length),
            "save": number + 1,
            "blocked_s": call_s + extra_s,
            "call_s": call_s,
            "next_step_extra_s": extra_s,
            "durable_s": checkpoints.durable_s,
            "bytes": size_bytes,
            "step_s": usual_s,
            "slowest_step_s": max(totals(usual)),
            **_program(),
        }


def _resume(asked: Bench) -> Iterator[dict[str, Any]]:
    """Save, in a process that ends then, or go on: model from random weights, warm caches."""

    def prepare() -> trial.Trial:
        return trial.prepare(asked.recipe, asked.stage, asked.config)

    length = asked.lengths[0]
    if bench_resume.part() == bench_resume.SAVE:
        bench_resume.save(prepare, length, asked.folder)
        return
    tried, found = bench_resume.go_on(prepare, length, asked.folder)
    yield {**_facts(asked, tried, length), **found, **_program()}


def _optimizer(asked: Bench) -> Iterator[dict[str, Any]]:
    """Time gradient norm, clipping and update on random gradients, without forward or backward.

    As in a step, an update ends with the weights that GPUs send each other where each keeps them
    whole. Gradients sent before are timed beside; those of shares go with the backward pass.
    """
    tried = trial.prepare(asked.recipe, asked.stage, asked.config)
    made = trial.make_bench(tried, asked.lengths[0], num_steps=1)
    optimizer.set_learning_rate(made.optimizer, asked.config.schedule.peak_lr)
    parameters = list(made.trained.values())
    watch = Stopwatch(0, device=tried.processes.device)
    wholes = [p for p in tried.scorer.parameters() if p.requires_grad]
    for _ in range(trial.WARM_UP + asked.num_steps):
        # In the memory that training has them in, so that the peak is that of an update.
        accumulating.begin_step(tried.scorer)
        optimizer.draw_gradients(wholes)
        watch.mark(WAIT)
        watch.mark("exchange")
        replicas.exchange(tried.scorer)
        watch.mark("clip")
        norm, _value = optimizer.gradient_norm(parameters)
        optimizer.clip_gradients(tried.optimizer, asked.config.optimizer.clip_norm, norm)
        watch.mark("update")
        optimizer.update(made.optimizer, tried.scorer)
        watch.mark(OTHER)
        made.optimizer.zero_grad(set_to_none=True)
    seconds = watch.seconds()
    warm = seconds[trial.WARM_UP :]
    medians_s = {
        f"{part}_s": statistics.median(step[part] for step in warm)
        for part in ("clip", "update", "exchange")
    }
    yield {
        **_facts(asked, tried, asked.lengths[0]),
        "optimizer_s": statistics.median(step["clip"] + step["update"] for step in warm),
        **medians_s,
        "first_step_s": seconds[0]["clip"] + seconds[0]["update"],
        "peak_gib": hardware.peak_memory_gib(),
        "parameters": sum(p.numel() for p in parameters),
        **_program(),
    }
