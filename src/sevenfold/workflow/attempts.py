"""One broken run against an unbroken one: did it come back, is it identical, what did it cost.

The oracle is the same run continued: of every step the loss, the gradient norm, the learning rate
and the held-out loss as hexadecimal numbers and the SHA-256 of its batch, each step once; at the
end the SHA-256 of weights, optimizer and random states. A run has recovered when each of its
processes has ended as it should, nothing unfinished is left behind, and there are no more
checkpoints than are kept, and one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base.errors import SevenfoldError
from sevenfold.base.storage import JsonLines
from sevenfold.train.checkpoint import Checkpoints
from sevenfold.workflow import damage, toy
from sevenfold.workflow.toy import Plan, Trace

NUMBERS = ("loss", "grad_norm", "lr", "validation_loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one broken run; the costs are None where no process had to start again."""

    recovered: bool
    identical: bool
    num_steps_lost: int | None = None
    recovery_s: float | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Child:
    """A process that trains with ``fault`` and ends as expected, saying ``says``.

    ``plan`` is another than the run's, where harmless settings are changed on the way.
    """

    fault: str = ""
    exits: tuple[int, ...] = (0,)
    says: str = ""
    plan: Plan | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """What a run left behind, as far as two runs are compared."""

    steps: dict[int, dict[str, str]]
    batches: dict[int, str]
    digest: str


Deed = Child | Callable[[Path], None]
FINISH = Child()


def killed(fault: str) -> Child:
    """A process that is killed."""
    return Child(fault, (-9,))


def stopped(fault: str) -> Child:
    """A process that saves and stops."""
    return Child(fault, (75,), "run the same command again")


class Laboratory:
    """A folder for broken runs, and the unbroken ones that they are compared with."""

    def __init__(self, folder: Path):
        """Work in ``folder``, which must exist."""
        self.folder = folder
        self._endings: dict[Any, Ending] = {}
        self._bases: dict[Any, Path] = {}
        self._num_runs = 0
        toy.prepare()

    def attempt(
        self,
        plan: Plan,
        deeds: Sequence[Deed],
        *,
        base: Path | None = None,
        like: Ending | None = None,
        except_steps: Sequence[int] = (),
    ) -> Result:
        """Do ``deeds`` to a run of ``plan`` one after the other and judge how it ended.

        ``base`` is the stage folder to begin with; ``like`` how the run must end (default: as an
        unbroken one), but for the numbers of ``except_steps``.
        """
        expected = like or self.unbroken(plan)
        stage, trace = self._new_run(base)
        first_step = max(_checkpoints(stage), default=0)
        if problem := _do(plan, stage, trace, deeds):
            self._clear(stage)
            return Result(recovered=False, identical=False, why=problem)
        ending = read_ending(stage, trace)
        num_steps_done = len(trace.read("step"))
        started_again = base is not None or sum(isinstance(deed, Child) for deed in deeds) > 1
        left = _left_behind(plan, stage)
        difference = _difference(ending, expected, except_steps)
        self._clear(stage)
        return Result(
            recovered=not left,
            identical=not difference,
            num_steps_lost=num_steps_done - (plan.steps - first_step),
            recovery_s=_recovery_s(trace, first_step) if started_again else None,
            why=left or difference,
        )

    def unbroken(self, plan: Plan) -> Ending:
        """Return how a run of ``plan`` ends that nothing disturbs."""
        return self.ending(plan, [FINISH])

    def ending(self, plan: Plan, deeds: Sequence[Deed]) -> Ending:
        """Return how a run ends to which ``deeds`` are done; it is done once."""
        key = (plan, tuple(deeds))
        if key not in self._endings:
            stage, trace = self._sound(plan, deeds)
            self._endings[key] = read_ending(stage, trace)
            self._clear(stage)
        return self._endings[key]

    def base(self, plan: Plan, deed: Child) -> Path:
        """Return a stage folder to begin with, made once by ``deed``."""
        key = (plan, deed)
        if key not in self._bases:
            self._bases[key], _ = self._sound(plan, [deed])
        return self._bases[key]

    def num_operations(self, plan: Plan, base: Path) -> int:
        """Return how many file operations an undisturbed process comes to."""
        stage, trace = self._sound(plan, [FINISH], base)
        self._clear(stage)
        return int(trace.read("end")[-1]["operations"])

    def _sound(
        self, plan: Plan, deeds: Sequence[Deed], base: Path | None = None
    ) -> tuple[Path, Trace]:
        """Make a run that others are compared with.

        Errors:
            SevenfoldError: it does not even end as it should.
        """
        stage, trace = self._new_run(base)
        if problem := _do(plan, stage, trace, deeds):
            raise SevenfoldError(
                f"selftest: a run that others were to be compared with failed: {problem}; look at "
                "this machine with sevenfold doctor"
            )
        return stage, trace

    def _new_run(self, base: Path | None) -> tuple[Path, Trace]:
        self._num_runs += 1
        stage = self.folder / f"run-{self._num_runs}" / "pretrain"
        if base is not None:
            damage.copy_folder(base, stage)
        return stage, Trace(self.folder / f"run-{self._num_runs}.jsonl")

    def _clear(self, stage: Path) -> None:
        damage.remove_folder(stage.parent)


def read_ending(stage: Path, trace: Trace) -> Ending:
    """Read what a finished run left in its folder, and what its last process noted."""
    rows = [row for row in JsonLines(stage / "metrics.jsonl").read() if "event" not in row]
    steps = {row["step"]: {n: float(row[n]).hex() for n in NUMBERS if row.get(n) is not None}
             for row in rows}  # fmt: skip
    if len(steps) != len(rows):
        steps = {}  # a step that stands twice is no log to compare
    return Ending(
        steps=steps,
        batches={line["step"]: line["batch"] for line in trace.read("step")},
        digest=trace.read("end")[-1]["digest"],
    )


def _do(plan: Plan, stage: Path, trace: Trace, deeds: Sequence[Deed]) -> str:
    """Do ``deeds``; say what went otherwise than it should, if anything."""
    for deed in deeds:
        if not isinstance(deed, Child):
            deed(stage)
        elif problem := _ends_otherwise(plan, stage, trace, deed):
            return problem
    return ""


def _ends_otherwise(plan: Plan, stage: Path, trace: Trace, child: Child) -> str:
    """Let ``child`` train; say what is wrong with its end, if anything."""
    code = toy.run_child(child.plan or plan, stage, trace, child.fault)
    errors = trace.read("error")
    said = errors[-1]["message"] if errors else ""
    if code not in child.exits:
        wanted = " or ".join(map(str, child.exits))
        return f"with '{child.fault}' it ended with {code}, expected {wanted} ({said})"
    if code and not re.search(child.says, said):
        return f"with '{child.fault}' it said '{said}', expected '{child.says}'"
    return ""


def _difference(found: Ending, expected: Ending, except_steps: Sequence[int]) -> str:
    """Name the first thing in which a run ended otherwise than it should have."""
    for step, numbers in expected.steps.items():
        other = found.steps.get(step)
        if other is None:
            return f"step {step} is not in metrics.jsonl, or twice"
        for name, value in numbers.items():
            if step not in except_steps and other.get(name) != value:
                return f"step {step}: {name} is {other.get(name)}, unbroken {value}"
    if set(found.steps) != set(expected.steps):
        return "metrics.jsonl has more steps"
    for step, digest in found.batches.items():
        if digest != expected.batches.get(step, digest):
            return f"step {step}: another batch"
    return "" if found.digest == expected.digest else "other weights, optimizer or random states"


def _checkpoints(stage: Path) -> list[int]:
    return Checkpoints(stage / "checkpoints", keep=1).steps()


def _left_behind(plan: Plan, stage: Path) -> str:
    """Say what should not be in a finished run's folder, if anything."""
    hidden, steps = damage.hidden_files(stage), _checkpoints(stage)
    if hidden:
        return f"left behind: {', '.join(hidden)}"
    return f"checkpoints {steps} are too many" if len(steps) > plan.keep + 1 else ""


def _recovery_s(trace: Trace, first_step: int) -> float | None:
    """Seconds from the last start until training had got past where it had been before."""
    lines = trace.read()
    start = max(index for index, line in enumerate(lines) if line["what"] == "fork")
    before = [line["step"] for line in lines[:start] if line["what"] == "step"]
    reached = max([first_step, *before])
    for line in lines[start:]:
        if line["what"] == "end" or (line["what"] == "step" and line["step"] > reached):
            return float(line["at_s"] - lines[start]["at_s"])
    return None
