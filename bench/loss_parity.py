"""Does training in few bits learn what training in fp32 learns? Same rows, order and first weights.

    python bench/loss_parity.py prepare $DATA/pretrain/books runs/parity      # on any machine
    python bench/loss_parity.py train runs/parity/data/packed loss_parity.json   # on a GPU
    python bench/loss_parity.py show loss_parity.json

``prepare`` makes rows by the steps 01 to 03 of preset small. ``train`` trains, all at the same time
on one GPU, preset small and a cut of the 7B (two layers, else its shape):

    autocast     fp32 weights, AdamW, products in bf16: the reference
    bf16         bf16 weights with stochastic rounding, 8-bit AdamW
    fp8          as bf16, products in FP8 (ours)
    fp8_torchao  the same with torchao's tensorwise recipe; only with --variant fp8_torchao
    fp32         as autocast, products in fp32 (TF32 on a GPU); only with --variant fp32

through `loop.fit`, with the recipe's schedule over the steps below, each as often as SEEDS (or
--seeds) says, with other random numbers each time, where weights are rounded by such: runs of one
recipe drift apart, and a difference means something where it is larger than that. It prints per
variant the held-out loss at the end and its spread over the runs, and how far the mean of its
training curves (means of SMOOTHED steps) is from another's.
--set goes to every variant. A variant that is stopped leaves its curve as far as it came; ``show``
says so and does not judge what is compared with it.
--rehearse is for a CPU: a tiny model, six steps, FP8 emulated; rows from ``prepare --rehearse``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from sevenfold.base import storage
from sevenfold.base.console import print_raw, print_table

Run = list[dict[str, Any]]
SMOOTHED, WRITE_EVERY_S = 20, 15
STEPS = {"small": 180, "7b": 200}
SEEDS = {"small": 3, "7b": 1}
# All variants compile at the same time.
COMPILE_THREADS = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
COMMON = [
    "tracking=none",
    "evaluate.tasks=[{name: validation, kind: text}]",
    "kernels.cce=false",
    "pretrain.contexts=[{length: 2048, until: 1.0}]",
    "pretrain.schedule.warmup_fraction=0.1",
    "pretrain.validate_every=40",
    "pretrain.log_every=1",
]
MODELS = {
    # So that all find room in 80 GB; and slowly, since with a tenth of the steps to warm up all
    # variants pass a spike in their 25th step, by which they stay apart.
    "small": ["pretrain.micro_batch=8", "pretrain.schedule.warmup_fraction=0.3"],
    "7b": ["model.num_layers=2", "pretrain.tokens_per_batch=8192", "pretrain.micro_batch=2"],
}
TINY_VOCABULARY = ["model.vocab_size=512", "tokenizer.vocab_size=512"]
TINY = [
    *TINY_VOCABULARY,
    "pretrain.contexts=[{length: 256, until: 1.0}]",
    *("model.hidden_size=64", "model.intermediate_size=128", "model.num_layers=2"),
    *("model.num_heads=4", "model.num_kv_heads=2", "pretrain.compile=none"),
    *("pretrain.tokens_per_batch=2048", "pretrain.micro_batch=8", "pretrain.validate_every=3"),
]
FP32 = ["pretrain.weights=fp32", "pretrain.optimizer.kind=adamw"]
BITS8 = ["pretrain.weights=bf16", "pretrain.optimizer.kind=adamw_8bit"]
VARIANTS = {
    "autocast": [*FP32, "pretrain.precision=bf16"],
    "bf16": [*BITS8, "pretrain.precision=bf16"],
    "fp8": [*BITS8, "pretrain.precision=fp8"],
    "fp8_torchao": [*BITS8, "pretrain.precision=fp8_torchao"],
    "fp32": [*FP32, "pretrain.precision=fp32"],
}
TRAINED = ("autocast", "bf16", "fp8")
DONE = ("seconds", "seconds_in_steps", "steps_skipped", "peak_gib", "planned_gib")
# Which curve is compared with which, and how many per cent apart they may be: the loss held out at
# the end, and (None: not asked) the smoothed training loss at its worst.
COMPARED = (
    ("autocast", "fp32", None, None),
    ("bf16", "fp32", 0.5, None),
    ("bf16", "autocast", 0.5, None),
    ("fp8", "bf16", 1.0, 1.0),
    ("fp8", "autocast", None, None),
    ("fp8_torchao", "bf16", None, None),
    ("fp8", "fp8_torchao", None, None),
)


def prepare(books: Path, folder: Path, *, rehearse: bool) -> None:
    """Make packed rows of the books by our own steps."""
    program = [sys.executable, "-m", "sevenfold.workflow.cli"]
    changes = [*COMMON[:2], *(TINY_VOCABULARY if rehearse else [])]
    settings = [part for change in changes for part in ("--set", change)]
    for step in (
        ["download", "--preset", "small", *settings, "--source", str(books)],
        ["clean"],
        ["tokenize"],
    ):
        subprocess.run([*program, *step, "--run", str(folder)], check=True)


def unigram_nats(packed: Path) -> float:
    """Return the held-out loss of a model that knows only how frequent each token is."""
    facts = storage.read_manifest(packed)
    counts = {}
    for split in ("train", "validation"):
        arrays = [
            np.load(path, mmap_mode="r", allow_pickle=False)
            for path in sorted(packed.glob(f"{split}-*.npy"))
        ]
        ids = np.concatenate([array.reshape(-1) for array in arrays])
        counts[split] = np.bincount(ids, minlength=facts["vocab_size"])
    likelihood = np.log((counts["train"] + 1) / (counts["train"] + 1).sum())
    return float(-(counts["validation"] * likelihood).sum() / counts["validation"].sum())


def train_variant(options: argparse.Namespace, model_name: str, variant: str, number: int) -> None:
    """Train one variant, for the time ``number``; print a line of JSON a step, and at the end."""
    import torch

    from sevenfold.train import loop, memory, planner
    from sevenfold.workflow import recipe as recipes
    from sevenfold.workflow import training

    started = time.perf_counter()
    changes = [*COMMON, *MODELS[model_name], *(TINY if options.rehearse else [])]
    steps = 6 if options.rehearse else options.steps or STEPS[model_name]
    changes += [f"pretrain.duration={{steps: {steps}}}", *VARIANTS[variant], *options.set]
    recipe = recipes.resolve(model_name, None, changes, Path("runs/loss-parity-unused"))[1]
    config = recipe.pretrain
    emulated = options.rehearse and config.precision == "fp8" and not torch.cuda.is_available()
    if emulated:
        config = dataclasses.replace(config, precision="bf16")
    decided = training.decide(config, stage="pretrain")
    tried = build(recipe, decided, emulated=emulated, seed=recipe.seed + number)
    bench = put_on_bench(tried, options.rows, steps, Printed(), whole=not options.rehearse)
    count = bench.validation[0].num_rows
    print_line({"event": "built", "seconds": time.perf_counter() - started, "held_out_rows": count})
    last = loop.fit(bench)
    demand = memory.Demand(
        model=recipe.model,
        train=tried.config,
        precision="fp8" if emulated else tried.config.precision,
        loss_kernel=tried.scorer.kernel,
        compiled=tried.config.compile != "none",
    )
    planned = planner.plan(demand, num_steps=steps).peak_gib
    seconds = time.perf_counter() - started
    known = seconds, bench.elapsed_s, bench.guard.num_skipped, last["mem_gib"], planned
    print_line({"event": "done", **dict(zip(DONE, known, strict=True))})


def build(recipe: Any, config: Any, *, emulated: bool, seed: int) -> Any:
    """Return a trial with the weights that script 04 draws and stores, loaded as 05 does.

    ``seed`` is that of random numbers while training; the weights depend on the recipe's.
    """
    import torch

    from sevenfold.model import attention, float8, llama
    from sevenfold.train import optimizer, parallel
    from sevenfold.workflow import trial, workbench

    processes = parallel.join()
    kernel = workbench.set_backends(config, recipe.kernels)
    model = llama.initialize(
        recipe.model, recipe.init, recipe.seed, llama.DTYPES[recipe.init.dtype], processes.device
    )
    model.set_attn_implementation(attention.IMPLEMENTATION)
    rotary = copy.deepcopy(model.model.rotary_emb)  # whose frequencies stay in fp32, as in 05
    model.to(workbench.DTYPES[config.weights]).train()
    model.model.rotary_emb = rotary
    if emulated:
        float8.convert_to_float8(model, emulate=True)
    torch.manual_seed(seed)
    scorer = workbench.make_scorer(model, config, kernel)
    workbench.place(scorer, recipe, "pretrain", config, processes)
    return trial.Trial(
        recipe=recipe,
        stage="pretrain",
        config=config,
        processes=processes,
        scorer=scorer,
        optimizer=optimizer.make_optimizer(scorer, config.optimizer),
    )


def put_on_bench(tried: Any, packed: Path, steps: int, progress: Any, *, whole: bool) -> Any:
    """Put the trial on a bench with real rows; held out are all, or one batch if not ``whole``."""
    from sevenfold.data.batches import Batches, PackedText
    from sevenfold.data.shards import open_shards
    from sevenfold.train.recovery import StepGuard
    from sevenfold.workflow import trial

    config, recipe = tried.config, tried.recipe
    shards = open_shards(
        packed, vocab_size=recipe.model.vocab_size, min_length=config.longest_context
    )
    bos_id = storage.read_manifest(packed)["bos_id"]
    rows, held = (PackedText(each, bos_id=bos_id) for each in (shards.train, shards.validation))
    batches = Batches(
        rows,
        tokens_per_batch=config.tokens_per_batch,
        contexts=config.contexts,
        num_steps=steps,
        seed=recipe.seed,
    )
    num_batches = held.num_rows // batches.rows_per_batch if whole else 1
    numbers = np.arange(num_batches * batches.rows_per_batch)
    return dataclasses.replace(
        trial.make_bench(tried, config.longest_context, num_steps=steps, rows=rows),
        batches=batches,
        validation=[held.batch(numbers, held.row_length)],
        config=config,
        guard=StepGuard(sigma=config.spike_sigma, max_in_a_row=config.max_skipped_steps),
        progress=progress,
    )


class Printed:
    """Progress as lines of JSON, which the parent process reads."""

    def update(self, row: dict[str, Any]) -> None:
        """Print one row of metrics."""
        print_line(row)


def print_line(row: dict[str, Any]) -> None:
    """Print one JSON object, at once."""
    print_raw(json.dumps(row) + "\n")
    sys.stdout.flush()


def train(options: argparse.Namespace) -> bool:
    """Train all variants at the same time, write what they say, and show it; True if all ended."""
    models = options.model or list(MODELS)
    asked = []
    for model_name, variant in itertools.product(models, options.variant or TRAINED):
        # Only stochastic rounding draws anything.
        runs = options.seeds or SEEDS[model_name] if BITS8[0] in VARIANTS[variant] else 1
        asked += [(model_name, variant, number) for number in range(runs)]
    curves: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    unigram = unigram_nats(options.rows)
    with ThreadPoolExecutor(len(asked)) as pool:
        running: dict[Future[int], str] = {}
        for model_name, variant, number in asked:
            rows: Run = []
            curves[model_name][variant].append(rows)
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--only", model_name, variant, str(number)]
            name = f"{model_name} {variant} {number}"
            running[pool.submit(follow, command, name, rows)] = variant
        waiting = set(running)
        while waiting:
            waiting = wait(waiting, timeout=WRITE_EVERY_S).not_done
            storage.write_json(options.out, {"unigram_nats": unigram, "curves": curves})
    show(options.out)
    return not any(future.result() for future in running)


def follow(command: list[str], name: str, rows: list[dict[str, Any]]) -> int:
    """Collect the lines of JSON that a process prints, pass on the others, return its exit code."""
    environment = COMPILE_THREADS | os.environ
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                print_raw(f"{name}: {line}")
                continue
            rows.append(json.loads(line))
            if "event" in rows[-1] or "validation_loss" in rows[-1]:
                print_raw(f"{name}: {line}")
                sys.stdout.flush()
    return process.returncode


def smoothed(runs: list[Run]) -> np.ndarray:
    """Return the mean training loss of every SMOOTHED steps in a row, and of all runs."""
    all_losses = [[row["loss"] for row in rows if "loss" in row] for rows in runs]
    count = min(map(len, all_losses))
    width = min(SMOOTHED, max(1, count))
    losses = np.array([losses[:count] for losses in all_losses]).mean(0)
    return np.convolve(losses, np.full(width, 1 / width), mode="valid") if count else losses


def held_out(runs: list[Run]) -> dict[int, list[float]]:
    """Return the held-out losses of all runs by step, where all have one."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in (row for rows in runs for row in rows if "validation_loss" in row):
        found[row["step"]].append(row["validation_loss"])
    return {step: losses for step, losses in sorted(found.items()) if len(losses) == len(runs)}


def show(path: Path) -> None:
    """Print the table of what a file of curves says."""
    found = storage.read_json(path)
    for model_name, curves in found["curves"].items():
        table = []
        for variant, runs in curves.items():
            losses = held_out(runs)
            last = max(losses, default=0)
            ends = losses.get(last) or [float("nan")]
            done = [next((r for r in rows if r.get("event") == "done"), {}) for rows in runs]
            spread = 100 * (max(ends) / min(ends) - 1)
            table.append(
                [variant, len(runs), last, f"{np.mean(ends):.3f}", f"{spread:.2f}"]
                + [max((d[k] for d in done if k in d), default=None) for k in DONE]
                + [_rate(runs)]
            )
        title = f"{model_name}; a unigram model's held-out loss is {found['unigram_nats']:.3f}"
        columns = ["variant", "runs", "step", "held-out loss", "spread, %", *DONE]
        print_table(title, [*columns, "median tok/s, sharing the GPU"], table)
        compared = [_compared(curves, *asked) for asked in COMPARED if {*asked[:2]} <= {*curves}]
        columns = ["compared", "held-out at the end", "training, largest", "training, mean"]
        title = f"{model_name}: differences in per cent; training curves as means of {SMOOTHED}"
        print_table(title, [*columns, "held-out, largest", "asked"], compared)


def _rate(runs: list[Run]) -> float | None:
    rates = [row["tok_s"] for rows in runs for row in rows if "tok_s" in row]
    return float(np.median(rates)) if rates else None


def _compared(
    curves: dict[str, list[Run]], name: str, other: str, end: float | None, worst: float | None
) -> list[Any]:
    """Return a row of the table: differences of one mean curve from another, in % of that."""
    ours, theirs = smoothed(curves[name]), smoothed(curves[other])
    common = min(len(ours), len(theirs))
    off = 100 * (ours[:common] / theirs[:common] - 1)
    losses, others = held_out(curves[name]), held_out(curves[other])
    steps = sorted({*losses} & {*others})
    at = [100 * (np.mean(losses[step]) / np.mean(others[step]) - 1) for step in steps]
    if not common or not at:
        return [f"{name} against {other}", *[None] * 4, "not trained far enough"]
    largest = float(abs(off).max())
    asked = _stopped(curves, name, other)
    if end is not None and not asked:
        met = abs(at[-1]) <= end and (worst is None or largest <= worst)
        asked = f"within {end} %: {'yes' if met else 'no'}"
    text = [f"{at[-1]:+.3f}", f"{largest:.3f}", f"{abs(off).mean():.3f}"]
    return [f"{name} against {other}", *text, f"{max(map(abs, at)):.3f}", asked]


def _stopped(curves: dict[str, list[Run]], *names: str) -> str:
    """Say which of these variants did not come to their end, and how far all their runs came."""
    steps: dict[str, int] = {}
    for name in names:
        for rows in curves[name]:
            if not any(row.get("event") == "done" for row in rows):
                last = max((row["step"] for row in rows if "loss" in row), default=0)
                steps[name] = min(last, steps.get(name, last))
    stopped = " and ".join(f"{name} stopped after step {step}" for name, step in steps.items())
    return stopped and f"not judged: {stopped}"


def main() -> int:
    """Do what is asked; 1 if a variant did not come to its end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    preparing = verbs.add_parser("prepare")
    preparing.add_argument("books", type=Path)
    preparing.add_argument("folder", type=Path)
    preparing.add_argument("--rehearse", action="store_true")
    training = verbs.add_parser("train")
    training.add_argument("rows", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--model", action="append", choices=list(MODELS))
    training.add_argument("--variant", action="append", choices=list(VARIANTS))
    training.add_argument("--steps", type=int)
    training.add_argument("--seeds", type=int)
    training.add_argument("--set", action="append", default=[])
    training.add_argument("--rehearse", action="store_true")
    training.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    showing = verbs.add_parser("show")
    showing.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.books, options.folder, rehearse=options.rehearse)
    elif options.verb == "show":
        show(options.out)
    elif options.only:
        train_variant(options, *options.only[:2], int(options.only[2]))
    return 1 if options.verb == "train" and not options.only and not train(options) else 0


if __name__ == "__main__":
    sys.exit(main())
