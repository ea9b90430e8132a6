"""A training run of a few thousand weights, done in forked children, that faults are tried on.

Everything but its size is what production has: batches from shuffled packed rows, a curriculum of
context lengths, dropout, AdamW, `workbench.assemble`, `loop.fit`, checkpoints with rotation. A
child notes what it does in a file that its death does not touch, and at the end the SHA-256 of
weights, optimizer and random states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import signal
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sevenfold.base import faults
from sevenfold.base.config import to_plain
from sevenfold.base.errors import SevenfoldError
from sevenfold.base.hardware import setup_torch_backends
from sevenfold.base.records import Run, Source
from sevenfold.base.storage import JsonLines
from sevenfold.data.batches import Batch, PackedText
from sevenfold.model import attention, llama
from sevenfold.objective.next_token import NEXT_TOKEN, Objective, Scorer
from sevenfold.train import loop, parallel
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow import workbench
from sevenfold.workflow.training import Job, StageOptions

VOCABULARY, BOS, NUM_ROWS, ROW_LENGTH, ROWS_PER_BATCH = 263, 0, 20, 32, 4
DROPOUT = 0.1
PATIENCE_S = 300  # a child that hangs is ended by SIGALRM
SETTINGS = {
    "model.vocab_size": VOCABULARY,
    "tokenizer.vocab_size": VOCABULARY,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.tie_embeddings": False,
    "tracking": "none",
    "pretrain.tokens_per_batch": ROWS_PER_BATCH * ROW_LENGTH,
    "pretrain.contexts": [{"length": 8, "until": 0.3}, {"length": 32, "until": 1.0}],
    "pretrain.precision": "fp32",
    "pretrain.weights": "fp32",
    "pretrain.compile": "none",
    "pretrain.validation_batches": 1,
    "pretrain.log_every": 1,
    "pretrain.max_skipped_steps": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how a toy run trains.

    The optimizer does nothing in ``held_steps``, counted from 1: what skipping a step must equal.
    """

    steps: int
    checkpoint_every: int
    keep: int = 2
    micro_batch: int = 2
    one_length: bool = False
    held_steps: tuple[int, ...] = ()

    @functools.cached_property
    def recipe(self) -> recipes.Recipe:
        """The demo's recipe, made small."""
        changes = {
            **SETTINGS,
            "pretrain.duration": {"steps": self.steps},
            "pretrain.checkpoint_every": self.checkpoint_every,
            "pretrain.validate_every": self.checkpoint_every,
            "pretrain.keep_checkpoints": self.keep,
            "pretrain.micro_batch": self.micro_batch,
        }
        if self.one_length:
            changes["pretrain.contexts"] = [{"length": ROW_LENGTH, "until": 1.0}]
        assignments = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
        return recipes.resolve("demo", None, assignments)[1]


class _Table:
    """Random rows, with a document start here and there."""

    num_rows, row_length = NUM_ROWS, ROW_LENGTH

    def __init__(self) -> None:
        generator = np.random.default_rng(3)
        self._ids = generator.integers(0, VOCABULARY, (NUM_ROWS, ROW_LENGTH))
        self._ids[generator.random(self._ids.shape) < 0.1] = BOS

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [n, row_length] ids."""
        return self._ids[indices]


def make_bench(plan: Plan, folder: Path) -> loop.Workbench:
    """Put the toy on a bench, and go back to its latest checkpoint where there is one."""
    recipe = plan.recipe
    job = Job(
        run=Run(folder=folder.parent, facts={"preset": "demo", "recipe": to_plain(recipe)}),
        recipe=recipe,
        stage=folder.name,
        config=recipe.pretrain,
        settings=to_plain(recipe.pretrain),
        source=Source(folder=folder, fingerprint="toy", stage="init"),
        inputs={"model": "toy", "data": "toy"},
        options=StageOptions(oom_recovery=True),
        processes=parallel.Processes(rank=0, world=1, device=torch.device("cpu")),
    )
    attention.register_attention()
    torch.manual_seed(recipe.seed)
    model = llama.initialize(recipe.model, recipe.init, recipe.seed)
    model.config._attn_implementation = attention.IMPLEMENTATION
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = DROPOUT
    rows = PackedText(_Table(), bos_id=BOS)
    return workbench.assemble(job, Scorer(model, kernel="plain"), NEXT_TOKEN, rows, rows)


def _digest_of(batch: Batch) -> str:
    tensors = (batch.inputs_bt, batch.targets_bt, batch.positions_bt, batch.documents_bt)
    parts = [np.ascontiguousarray(t.numpy()).tobytes() for t in tensors if t is not None]
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Trace:
    """What the children of one run did, line by line, in a file that outlives them."""

    def __init__(self, path: Path):
        """Append to ``path``."""
        self.path = path

    def note(self, **facts: Any) -> None:
        """Append one line in one write, which a kill cannot halve."""
        line = json.dumps({**facts, "at_s": time.monotonic()}).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line)
        os.close(descriptor)

    def read(self, what: str | None = None) -> list[dict[str, Any]]:
        """Return all lines, or those of one kind."""
        lines = JsonLines(self.path).read()
        return [line for line in lines if what is None or line["what"] == what]


def _train(plan: Plan, folder: Path, trace: Trace) -> None:
    """Train to the end, noting each step's batch when it begins."""
    torch.set_num_threads(1)
    setup_torch_backends(deterministic=plan.recipe.pretrain.deterministic)
    bench = make_bench(plan, folder)
    trace.note(what="start", step=bench.step)

    def weigh(batch: Batch) -> float:
        if bench.scorer.training:
            trace.note(what="step", step=bench.step + 1, batch=_digest_of(batch))
        return NEXT_TOKEN.weigh(batch)

    bench.objective = Objective(weigh=weigh, total=NEXT_TOKEN.total)
    update = bench.optimizer.step

    def held_update() -> None:
        if bench.step + 1 not in plan.held_steps:
            update()

    if plan.held_steps:
        bench.optimizer.step = held_update  # type: ignore[method-assign,assignment]
    loop.fit(bench)
    trace.note(what="end", digest=workbench.digest(bench), operations=faults.operations_done())


def run_child(plan: Plan, folder: Path, trace: Trace, fault: str) -> int:
    """Train in a forked child with ``fault``; return its exit code, negative for a signal's."""
    assert plan.recipe  # read once, before the fork
    trace.note(what="fork", fault=fault)
    with warnings.catch_warnings():
        # Newer Pythons warn of threads that a child does not have; it uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        os._exit(_child(plan, folder, trace, fault))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _child(plan: Plan, folder: Path, trace: Trace, fault: str) -> int:
    code = 1
    with contextlib.suppress(BaseException):
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)
        os.environ[faults.VARIABLE] = fault
        faults.start_counting()
        gc.freeze()  # what the parent has imported need not be looked through again
        _send_output_to(trace.path.with_suffix(".txt"))
        try:
            _train(plan, folder, trace)
            code = 0
        except SevenfoldError as error:
            trace.note(what="error", message=str(error))
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
            trace.note(what="error", message=traceback.format_exc(limit=-1))
    return code


def _send_output_to(path: Path) -> None:
    """Send what the process prints and logs to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)


def prepare() -> None:
    """Import and look up what every child needs, once, before the first is forked."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_bench(Plan(steps=1, checkpoint_every=1), Path(folder) / "pretrain")
