"""Flags of the verbs that look at a run or use what it made."""

from __future__ import annotations

import argparse
from pathlib import Path

from sevenfold.base.records import STAGES
from sevenfold.workflow.flag_values import above_zero, one_of

ENGINES = ("auto", "vllm", "transformers")
EXPORT_FORMATS = ("model", "gguf", "adapter")
WEIGHT_TYPES = ("f32", "f16", "bf16", "q8_0")


def existing_run(parser: argparse.ArgumentParser) -> None:
    """Take the folder of a run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/demo")
    debug(parser)


def any_stage(parser: argparse.ArgumentParser) -> None:
    """Take a stage of the run."""
    parser.add_argument("stage", metavar="STAGE", type=one_of(STAGES), help="|".join(STAGES))


def chat(parser: argparse.ArgumentParser) -> None:
    """Take what an answer in the terminal depends on."""
    names = STAGES[1:]
    parser.add_argument(
        "--stage",
        type=one_of(names),
        action="append",
        help=f"{'|'.join(names)} (default: latest); of several, each answers",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the probability (1)")
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same answers again")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (256)")


def serve(parser: argparse.ArgumentParser) -> None:
    """Take what is served, and where."""
    names = STAGES[1:]
    parser.add_argument("--stage", type=one_of(names), help=f"{'|'.join(names)} (default: latest)")
    parser.add_argument(
        "--engine",
        type=one_of(ENGINES),
        default=ENGINES[0],
        metavar="NAME",
        help="vllm, transformers or auto (default): vLLM where it is installed and a GPU is there",
    )
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1 (8000); 0: any free")


def watch(parser: argparse.ArgumentParser) -> None:
    """Take how often to look."""
    parser.add_argument("--once", action="store_true", help="show where it stands and end")


def checkpoints(parser: argparse.ArgumentParser) -> None:
    """Take what to do with them."""
    parser.add_argument("--verify", action="store_true", help="recompute every checksum")
    parser.add_argument(
        "--prune",
        type=above_zero,
        metavar="N",
        help="keep each stage's newest N good ones, delete the others and the damaged",
    )


def target(parser: argparse.ArgumentParser) -> None:
    """Take where to write."""
    parser.add_argument("target", type=Path, metavar="DIR", help="new folder to make")


def export(parser: argparse.ArgumentParser) -> None:
    """Take what to write."""
    parser.add_argument(
        "--format",
        type=one_of(EXPORT_FORMATS),
        default=EXPORT_FORMATS[0],
        metavar="NAME",
        help="model (default): the Hugging Face folder; gguf: for llama.cpp; adapter: PEFT's",
    )
    parser.add_argument(
        "--type",
        type=one_of(WEIGHT_TYPES),
        metavar="NAME",
        help=f"of gguf's matrices: {'|'.join(WEIGHT_TYPES)} (default: as stored)",
    )


def debug(parser: argparse._ActionsContainer) -> None:
    """Take whether mistakes are told in full."""
    parser.add_argument("--debug", action="store_true", help="tracebacks, and the whole log")
