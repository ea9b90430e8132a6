"""The verbs of the command line and their flags; nothing here does more than read words."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sevenfold import __version__
from sevenfold.base.errors import UsageError, nearest
from sevenfold.base.records import GATED_STAGES
from sevenfold.workflow import run_flags
from sevenfold.workflow.flag_values import above_zero, gpus, one_of, size

EXIT_CODES = """\
exit codes:
  0 done or promoted       5 checkpoint corrupt or not matching
  1 an error of ours       6 diverged
  2 asked wrongly          7 out of memory at micro-batch 1
  3 gate refused           8 run directory in use
  4 bad data              75 stopped after saving; run the same command again
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, with the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and ending the process."""
        if message.startswith("unrecognized arguments: -"):
            word = message.split()[2].partition("=")[0]
            message = f"flag '{word}' does not exist{nearest(word, self._option_string_actions)}"
        raise UsageError(f"{message}; {self.prog} --help lists the flags")


def _common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("every step")
    group.add_argument("--run", type=Path, metavar="DIR", help="run folder (runs/<preset>)")
    _recipe(group)
    group.add_argument(
        "--dry-run", action="store_true", help="check everything, plan memory, write nothing"
    )
    run_flags.debug(group)


def _recipe(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--preset", metavar="NAME", help="recipe and gates (default: demo)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a recipe of your own")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change one value of the recipe; repeatable",
    )


def _source(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--source",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder instead of the preset's source; repeatable",
    )


def _workers(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--workers",
        type=above_zero,
        metavar="N",
        help="processes at most (default: one a core); what is made does not depend on it",
    )


def _cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the work is done; the result is the same")
    group.add_argument(
        "--workers", type=above_zero, default=1, metavar="N", help="tasks at a time (1)"
    )
    group.add_argument(
        "--executor",
        choices=("local", "ray", "slurm"),
        default="local",
        help="processes here (default), a Ray cluster, a Slurm queue",
    )
    group.add_argument("--partition", metavar="NAME", help="Slurm's; needed there")


def _planned(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=gpus,
        metavar="[KIND:]N",
        help="plan for N GPUs: of the kind that is here, or A100, A100-40GB, H100, H200; "
        "more than 8 are in nodes (default: what is here)",
    )


def _training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--fp8",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="FP8 matrix products (Hopper), or bf16; default: what the recipe says",
    )
    group.add_argument(
        "--enable-oom-recovery",
        action="store_true",
        help="halve the micro-batch when memory runs out",
    )
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the latest checkpoint (default); --no-resume sets the old stage aside",
    )
    group.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="any Hugging Face causal model instead of the previous stage",
    )
    _force(group)


def _force(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--force", metavar="REASON", help="go on past a refusing gate; the reason is recorded"
    )


def _packed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of packed .npy files or a data set with input_ids; skips steps 01 to 03",
    )


def _judged_stage(parser: argparse.ArgumentParser) -> None:
    choices = "|".join(GATED_STAGES)
    parser.add_argument("stage", metavar="STAGE", type=one_of(GATED_STAGES), help=choices)


def _gates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gates", type=Path, metavar="FILE", help="thresholds (configs/promotion_gates.yaml)"
    )


def _span(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin at this step")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="end after this step")
    parser.add_argument(
        "--workers",
        type=above_zero,
        metavar="N",
        help="processes for 02 (default: one) and 03 (default: one a core)",
    )
    parser.add_argument("--enable-oom-recovery", action="store_true", help="as in training steps")
    _force(parser)


def _selftest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", type=one_of(("faults",)), help="faults")
    parser.add_argument(
        "--soak", action="store_true", help="kill the real commands too, ten times a stage"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the table as Markdown, too"
    )


DATA_BENCHMARKS = ("tokenize", "pack", "load")
TEXT_BENCHMARKS = ("dedup", "mmlu")
TRAINING_BENCHMARKS = (*GATED_STAGES, "checkpoint", "resume", "optimizer")
BENCHMARKS = (*TRAINING_BENCHMARKS, *TEXT_BENCHMARKS, *DATA_BENCHMARKS)


def _bench(parser: argparse.ArgumentParser) -> None:
    choices = "|".join(BENCHMARKS)
    parser.add_argument("what", metavar="WHAT", type=one_of(BENCHMARKS), help=choices)
    parser.add_argument(
        "--steps", type=above_zero, metavar="N", help="steps to measure; checkpoint: per save"
    )
    parser.add_argument(
        "--length",
        type=above_zero,
        action="append",
        default=[],
        metavar="L",
        help="context length in tokens instead of the recipe's; repeatable",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="on the disk that is measured (runs); nothing is left there",
    )
    group = parser.add_argument_group("|".join((*TEXT_BENCHMARKS, *DATA_BENCHMARKS)))
    _source(group)
    _workers(group)
    group.add_argument(
        "--gigabytes", type=size, metavar="N", help="how much random text, without --source (0.05)"
    )


@dataclasses.dataclass(frozen=True)
class Verb:
    """One command: its name, what it does, the function that does it, and its flags."""

    name: str
    help: str
    perform: str
    flags: tuple[Callable[[argparse.ArgumentParser], None], ...]


_STEPS = "sevenfold.workflow.steps"
_SHOW = "sevenfold.workflow.show"
_TABLE = (
    Verb("download", "01: fetch the texts", f"{_STEPS}:download", (_source, _common)),
    Verb("clean", "02: clean and split the texts", f"{_STEPS}:clean", (_cluster, _common)),
    Verb(
        "tokenize",
        "03: train the tokenizer, pack the texts",
        f"{_STEPS}:tokenize",
        (_workers, _common),
    ),
    Verb("init", "04: write the untrained model", f"{_STEPS}:initialize", (_common,)),
    Verb("pretrain", "05: pretrain", f"{_STEPS}:pretrain", (_packed, _training, _common)),
    Verb("prepare-sft", "06: prepare conversations", f"{_STEPS}:prepare_sft", (_source, _common)),
    Verb("sft", "07: supervised fine-tuning", f"{_STEPS}:sft", (_training, _common)),
    Verb(
        "prepare-dpo", "08: prepare preference pairs", f"{_STEPS}:prepare_dpo", (_source, _common)
    ),
    Verb("dpo", "09: preference optimisation", f"{_STEPS}:dpo", (_training, _common)),
    Verb("lora", "10: train and merge an adapter", f"{_STEPS}:lora", (_training, _common)),
    Verb("evaluate", "11: measure a stage", f"{_STEPS}:evaluate", (_judged_stage, _common)),
    Verb("check", "12: judge a stage", f"{_STEPS}:check", (_judged_stage, _gates, _common)),
    Verb(
        "run",
        "01 to 12 in order, with the gates",
        "sevenfold.workflow.pipeline:run_all",
        (_span, _gates, _common),
    ),
    Verb(
        "plan",
        "memory, tokens, time and cost before anything starts",
        f"{_STEPS}:plan",
        (_planned, _common),
    ),
    Verb(
        "chat",
        "talk to a run's model",
        "sevenfold.workflow.chat:chat",
        (run_flags.existing_run, run_flags.chat),
    ),
    Verb(
        "serve",
        "a chat page and an OpenAI-compatible endpoint on this machine",
        "sevenfold.workflow.serve:serve",
        (run_flags.existing_run, run_flags.serve),
    ),
    Verb(
        "watch",
        "follow a run that is training",
        "sevenfold.workflow.watching:watch",
        (run_flags.existing_run, run_flags.watch),
    ),
    Verb("report", "write report.html", f"{_SHOW}:report", (run_flags.existing_run,)),
    Verb(
        "lineage", "what each artifact was made from", f"{_SHOW}:lineage", (run_flags.existing_run,)
    ),
    Verb(
        "verify", "recompute every checksum of a run", f"{_SHOW}:verify", (run_flags.existing_run,)
    ),
    Verb(
        "checkpoints",
        "list, check and prune a run's checkpoints",
        "sevenfold.workflow.checkpoints:checkpoints",
        (run_flags.existing_run, run_flags.checkpoints),
    ),
    Verb(
        "export",
        "a stage's model in a folder of its own, also for llama.cpp",
        "sevenfold.workflow.exporting:export",
        (run_flags.existing_run, run_flags.any_stage, run_flags.target, run_flags.export),
    ),
    Verb(
        "selftest",
        "break small runs in every way that must do no harm",
        "sevenfold.workflow.selftest:selftest",
        (_selftest, run_flags.debug),
    ),
    Verb(
        "bench",
        "how fast this machine trains, saves, goes on, measures and prepares data",
        "sevenfold.workflow.bench:bench",
        (_bench, _recipe, run_flags.debug),
    ),
    Verb(
        "doctor", "what this machine can do, what is missing", f"{_SHOW}:doctor", (run_flags.debug,)
    ),
)
VERBS = {verb.name: verb for verb in _TABLE}


def parse(
    arguments: list[str], *, verb: str | None, program: str
) -> tuple[Verb, argparse.Namespace]:
    """Read ``arguments``; without ``verb`` the first of them is the verb.

    Errors:
        UsageError: an unknown verb or flag, or a missing or wrong value.
        SystemExit: ``--help`` or ``--version`` was asked for and has been printed.
    """
    if verb is None:
        verb, arguments = _read_verb(arguments, program)
        program = f"{program} {verb}"
    chosen = VERBS[verb]
    parser = Parser(
        prog=program,
        description=f"{chosen.help[0].upper()}{chosen.help[1:]}.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add in chosen.flags:
        add(parser)
    return chosen, parser.parse_args(arguments)


def _read_verb(arguments: list[str], program: str) -> tuple[str, list[str]]:
    lines = "".join(f"  {verb.name:<12} {verb.help}\n" for verb in VERBS.values())
    parser = Parser(
        prog=program,
        usage=f"{program} VERB [flags]",
        description="From raw text to an aligned model, with a gate between all stages.",
        epilog=f"verbs:\n{lines}\n{program} VERB --help lists a verb's flags.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sevenfold {__version__}")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.error("no verb given")
    if arguments[0] not in VERBS:
        raise UsageError(f"verb '{arguments[0]}' does not exist{nearest(arguments[0], VERBS)}")
    return arguments[0], arguments[1:]
