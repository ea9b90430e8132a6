"""What the peers share: the same stage of the same recipe, our line, theirs, and the ratio.

A peer gets the rows of `sevenfold bench`, drawn by the same seed, and a Llama of the recipe's sizes
with random weights. Ours is measured first, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As in our own processes: idle threads sleep. Before torch, which reads it once.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from sevenfold.train.config import TrainConfig
from sevenfold.workflow import choosing, recipe, remaining, trial

WARM_UP = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is compared, as the command line says it."""

    what: str
    recipe: recipe.Recipe
    config: TrainConfig
    options: argparse.Namespace

    @property
    def micro_batch(self) -> int:
        """Rows or pairs of the peer's forward pass."""
        return int(self.options.micro_batch or self.config.rows_at_once)

    @property
    def rows_a_step(self) -> float:
        """Rows that the peer takes in a step: as many as ours, unless it is to take fewer."""
        tokens = self.options.peer_tokens or self.config.tokens_per_batch
        return float(tokens / self.config.longest_context)

    @property
    def device(self) -> torch.device:
        """Where the peer trains."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ask(description: str, stages: tuple[str, ...]) -> Asked:
    """Read the command line; ``stages`` are those that the peer can do."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("what", choices=stages)
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=4, help="measured steps, of both")
    parser.add_argument("--micro-batch", type=int, help="of the peer; default: the recipe's")
    parser.add_argument(
        "--peer-tokens", type=int, help="tokens of the peer's step; default: the recipe's"
    )
    parser.add_argument("--recompute", action="store_true", help="the peer's, of all layers")
    parser.add_argument("--compile", action="store_true", help="the peer's whole model")
    parser.add_argument("--alone", action="store_true", help="measure the peer only")
    options = parser.parse_args()
    found = recipe.resolve(options.preset, options.config, options.set, Path(".peer"))[1]
    config = remaining.train_config(found, options.what)
    if choosing.is_open(config):  # as ours would choose for products in bf16
        in_bf16 = dataclasses.replace(config, precision="bf16")
        rows = choosing.for_trial(found, options.what, in_bf16).rows_at_once
        config = dataclasses.replace(config, micro_batch=rows)
    return Asked(options.what, found, config, options)


def random_rows(asked: Asked) -> trial.Rows:
    """Return the rows of `sevenfold bench`."""
    return trial.random_rows(
        asked.recipe,
        asked.what,
        asked.config,
        length=asked.config.longest_context,
        num_steps=trial.WARM_UP + asked.options.steps,
    )


def llama(asked: Asked, attention: str = "sdpa") -> Any:
    """Return transformers' Llama with random weights on the device."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(asked.recipe.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[asked.config.weights])
    try:
        with asked.device:
            config = asked.recipe.model.to_hf(bos_token_id=3, eos_token_id=2, pad_token_id=1)
            return LlamaForCausalLM._from_config(config, attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)


class Timer:
    """Seconds of each step, and what each step counted."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}

    def count(self, **numbers: float) -> None:
        """Add to what the present step counts."""
        for name, number in numbers.items():
            self._now[name] = self._now.get(name, 0.0) + number

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        self.begin()
        yield
        self.end()

    def begin(self) -> None:
        """Begin a step."""
        _wait()
        self._now = {}
        self._started = time.perf_counter()

    def end(self) -> None:
        """End a step."""
        _wait()
        self.steps.append({"step_s": time.perf_counter() - self._started, **self._now})

    def rates(self) -> dict[str, float]:
        """Return medians over the steps after the warm-up: of seconds, and of counts a second."""
        warm = self.steps[WARM_UP:]
        counted = [name for name in warm[0] if name != "step_s"]
        found = {"step_s": statistics.median(step["step_s"] for step in warm)}
        for name in counted:
            found[name] = statistics.median(step[name] / step["step_s"] for step in warm)
        return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finish(asked: Asked, peer: str, rates: dict[str, float], key: str, **facts: Any) -> None:
    """Print the peer's line, ours, and the ratio of ``key``, a rate that both lines hold."""
    config = asked.config
    line = {
        "peer": peer,
        "case": asked.what,
        "seq_len": config.longest_context,
        "micro_batch": asked.micro_batch,
        "recompute": asked.options.recompute,
        "compile": asked.options.compile,
        "weights": config.weights,
        **facts,
        **rates,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }
    write(line)
    if asked.options.alone:
        return
    write({"peer": peer, "case": asked.what, f"{key}_ratio": OURS[key] / rates[key]})


OURS: dict[str, Any] = {}


def measure_ours(asked: Asked) -> None:
    """Run `sevenfold bench` on the same recipe, print its line, and keep it for the ratio."""
    options = asked.options
    if options.alone:
        return
    command = [sys.executable, "-m", "sevenfold.workflow.cli", "bench", asked.what]
    command += ["--steps", str(options.steps), "--length", str(asked.config.longest_context)]
    command += ["--config", str(options.config)] if options.config else []
    command += ["--preset", options.preset]
    for assignment in options.set:
        command += ["--set", assignment]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    OURS.update(json.loads(done.stdout.splitlines()[-1]))
    write(OURS)


def write(line: dict[str, Any]) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
