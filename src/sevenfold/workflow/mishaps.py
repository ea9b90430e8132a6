"""The faults that the self-test tries, each with the rows of the fault matrix that it shows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from sevenfold.base import storage
from sevenfold.base.faults import PHASES
from sevenfold.workflow import damage
from sevenfold.workflow.attempts import FINISH, Child, Laboratory, Result, killed, stopped
from sevenfold.workflow.toy import Plan

# Short: begins with the checkpoints 2 and 3, saves and rotates twice. Long: five epochs of five
# steps, the context changes after step 7. Usual: long enough for a spike to be unusual.
SHORT = Plan(steps=5, checkpoint_every=2)
LONG = Plan(steps=24, checkpoint_every=5)
OFTEN = Plan(steps=24, checkpoint_every=1)
USUAL = Plan(steps=80, checkpoint_every=20, one_length=True)
FULL = r"could not be written \(No space left on device\).* bytes, .* free; make room"
BROKEN = r"could not be .*\(Input/output error\)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mishap:
    """One kind of fault, and the runs it is tried on."""

    name: str
    rows: tuple[str, ...]
    runs: Callable[[Laboratory], Iterator[Result]]


def _begun(laboratory: Laboratory) -> Path:
    return laboratory.base(SHORT, stopped("term@step=3"))


def _kills_at_every_operation(laboratory: Laboratory) -> Iterator[Result]:
    """Every file operation of resuming, saving and rotating; every third resume is killed too."""
    base = _begun(laboratory)
    for number in range(1, laboratory.num_operations(SHORT, base) + 1):
        again = [Child(f"kill@fs:{number // 3 % 12 + 1}", (-9, 0))] if number % 3 == 0 else []
        yield laboratory.attempt(SHORT, [killed(f"kill@fs:{number}"), *again, FINISH], base=base)


def _kills_before_the_first_checkpoint(laboratory: Laboratory) -> Iterator[Result]:
    for number in range(1, 32, 3):
        yield laboratory.attempt(SHORT, [killed(f"kill@fs:{number}"), FINISH])


def _kills_in_every_phase(laboratory: Laboratory) -> Iterator[Result]:
    """In step 10 the held-out loss is measured and a checkpoint written."""
    for phase in PHASES:
        yield laboratory.attempt(LONG, [killed(f"kill@step=10:phase={phase}"), FINISH])


def _stops_in_every_phase(laboratory: Laboratory) -> Iterator[Result]:
    for phase in PHASES:
        yield laboratory.attempt(LONG, [stopped(f"term@step=10:phase={phase}"), FINISH])
    yield laboratory.attempt(LONG, [stopped("term@step=1:phase=load"), FINISH])


def _stops_cut_short(laboratory: Laboratory) -> Iterator[Result]:
    """A grace shorter than a save, and a second signal while it saves."""
    short = "term@step=12;kill@step=12:phase=save"
    yield laboratory.attempt(LONG, [killed(short), FINISH])
    twice = "term@step=12;term@step=12:phase=log;term@step=12:phase=save"
    yield laboratory.attempt(LONG, [stopped(twice), FINISH])


def _many_in_an_epoch(laboratory: Laboratory) -> Iterator[Result]:
    """Steps 6 to 10 are the second epoch, 11 comes after the next shuffle."""
    kills = [killed(f"kill@step={step}") for step in (7, 8, 9, 10, 11)]
    yield laboratory.attempt(OFTEN, [*kills, FINISH])
    stops = [stopped(f"term@step={step}") for step in (6, 7, 8, 9, 11)]
    yield laboratory.attempt(LONG, [*stops, FINISH])


def _around_the_ends_of_epochs(laboratory: Laboratory) -> Iterator[Result]:
    """Just before, at and just after the ends of the first, second and fourth epoch."""
    for end in (5, 10, 20):
        for step in (end - 1, end, end + 1):
            yield laboratory.attempt(LONG, [stopped(f"term@step={step}"), FINISH])


def _around_the_change_of_context(laboratory: Laboratory) -> Iterator[Result]:
    """Step 8 is the last with the short context, and steps 6 to 9 are done twice over it."""
    for step in (7, 8, 9):
        yield laboratory.attempt(LONG, [stopped(f"term@step={step}"), FINISH])
    yield laboratory.attempt(LONG, [killed("kill@step=10:phase=load"), FINISH])


def _damaged(
    harms: Callable[[], Iterator[damage.Damage]], laboratory: Laboratory
) -> Iterator[Result]:
    """Harm the newest of two checkpoints."""
    base = _begun(laboratory)
    for harm in harms():
        yield laboratory.attempt(SHORT, [harm, FINISH], base=base)


def _truncations() -> Iterator[damage.Damage]:
    for name in damage.PARTS:
        for share in (0.0, 0.5, 0.99):
            yield damage.truncated(name, share)


def _flips() -> Iterator[damage.Damage]:
    for name in damage.PARTS:
        for place in (0.02, 0.31, 0.64, 0.97):
            yield damage.flipped(name, place)


def _odd_files() -> Iterator[damage.Damage]:
    for name in damage.PARTS:
        yield damage.missing(name)
        yield damage.renamed(name)
    yield damage.extra


def _damage_reached_again(laboratory: Laboratory) -> Iterator[Result]:
    """The step of a damaged checkpoint is saved again, and that one is damaged as well."""
    base = laboratory.base(LONG, stopped("term@step=10"))
    for name in damage.PARTS:
        harm = damage.truncated(name, 0.5)
        again = stopped("term@step=10")
        yield laboratory.attempt(LONG, [harm, again, harm, FINISH], base=base)


def _leftovers(laboratory: Laboratory) -> Iterator[Result]:
    base = _begun(laboratory)
    yield laboratory.attempt(SHORT, [damage.leftovers, FINISH], base=base)


def _refusing_disk(kind: str, says: str, laboratory: Laboratory) -> Iterator[Result]:
    """From a file operation on the disk refuses; what was saved before must be whole."""
    base = _begun(laboratory)
    total = laboratory.num_operations(SHORT, base)
    for number in range(1, total + 1, 5):
        times = 999 if kind == "full" else 1
        # The last operations remove old checkpoints, which a full disk does not hinder.
        exits = (0, 1) if kind == "full" and number > total - 10 else (1,)
        refused = Child(f"{kind}@fs:{number}:times={times}", exits, says)
        yield laboratory.attempt(SHORT, [refused, _whole, FINISH], base=base)


def _whole(stage: Path) -> None:
    """Check every checkpoint that is there."""
    for folder in sorted((stage / "checkpoints").glob("step-*")):
        storage.verify_folder(folder)


def _not_finite(laboratory: Laboratory) -> Iterator[Result]:
    """The step is skipped whole: as if its update had not been made; also across a kill."""
    for fault in ("nan@step=4", "nan@step=12"):
        step = int(fault.partition("=")[2])
        like = laboratory.unbroken(dataclasses.replace(LONG, held_steps=(step,)))
        yield laboratory.attempt(LONG, [Child(fault)], like=like, except_steps=[step])
        again = [killed(f"{fault};kill@step={step + 1}"), Child(fault)]
        yield laboratory.attempt(LONG, again, like=like, except_steps=[step])


def _not_finite_for_long(laboratory: Laboratory) -> Iterator[Result]:
    """Three in a row: back to step 10, and past the three batches; also across a kill."""
    bad = "nan@step=11;nan@step=12;nan@step=13"
    passing_over = functools.partial(_decide, '{"micro_batches": [], "detours": [[10, 3]]}')
    like = laboratory.ending(LONG, [passing_over, FINISH])
    yield laboratory.attempt(LONG, [Child(bad)], like=like)
    yield laboratory.attempt(LONG, [killed(f"{bad};kill@step=14"), FINISH], like=like)


def _decide(decisions: str, stage: Path) -> None:
    storage.write_text(stage / "recovery.json", decisions)


def _spikes(laboratory: Laboratory) -> Iterator[Result]:
    """Ten times the loss, once enough is known of what is usual."""
    like = laboratory.unbroken(dataclasses.replace(USUAL, held_steps=(75,)))
    yield laboratory.attempt(USUAL, [Child("spike@step=75")], like=like, except_steps=[75])
    again = [killed("spike@step=75;kill@step=78"), Child("spike@step=75")]
    yield laboratory.attempt(USUAL, again, like=like, except_steps=[75])


def _out_of_memory(laboratory: Laboratory) -> Iterator[Result]:
    """The step is redone whole: as a run whose micro-batch was halved from there on."""
    smaller = Child(plan=dataclasses.replace(LONG, micro_batch=1))
    like = laboratory.ending(LONG, [stopped("term@step=11"), smaller])
    for phase in ("forward", "backward"):
        fault = f"oom@step=12:phase={phase}"
        yield laboratory.attempt(LONG, [Child(fault)], like=like)
        yield laboratory.attempt(LONG, [killed(f"{fault};kill@step=14"), FINISH], like=like)


def _out_of_memory_in_validation(laboratory: Laboratory) -> Iterator[Result]:
    """Halved from the next step on; the held-out loss of step 10 is measured with the new size."""
    smaller = Child(plan=dataclasses.replace(LONG, micro_batch=1))
    like = laboratory.ending(LONG, [stopped("term@step=10"), smaller])
    fault = "oom@step=10:phase=evaluate"
    yield laboratory.attempt(LONG, [Child(fault)], like=like, except_steps=[10])
    again = [killed(f"{fault};kill@step=13"), FINISH]
    yield laboratory.attempt(LONG, again, like=like, except_steps=[10])


def _out_of_memory_in_the_update(laboratory: Laboratory) -> Iterator[Result]:
    """A half-applied update is never gone on with: back to the checkpoint."""
    ended = Child("oom@step=12:phase=optimizer", (7,), "run the same command again")
    yield laboratory.attempt(LONG, [ended, FINISH])


MISHAPS = (
    Mishap(
        name="kill -9 at every file operation of resume, save and rotation",
        rows=("A01", "B06"),
        runs=_kills_at_every_operation,
    ),
    Mishap(
        name="kill -9 before and while the first checkpoint is written",
        rows=("A01",),
        runs=_kills_before_the_first_checkpoint,
    ),
    Mishap(name="kill -9 in every phase of a step", rows=("C07",), runs=_kills_in_every_phase),
    Mishap(name="SIGTERM in every phase of a step", rows=("A05",), runs=_stops_in_every_phase),
    Mishap(
        name="SIGTERM, then kill -9 or SIGTERM during the save",
        rows=("A06", "A07"),
        runs=_stops_cut_short,
    ),
    Mishap(
        name="five stops in one epoch and after its end",
        rows=("A03", "C02", "C03", "C18"),
        runs=_many_in_an_epoch,
    ),
    Mishap(
        name="stops around the ends of epochs 1, 2 and 4",
        rows=("C01", "C02", "C04", "C05"),
        runs=_around_the_ends_of_epochs,
    ),
    Mishap(
        name="stops around the change of context length",
        rows=("C01", "C06"),
        runs=_around_the_change_of_context,
    ),
    Mishap(
        name="each file of the newest checkpoint cut to 0, 50 and 99 %",
        rows=("B01",),
        runs=functools.partial(_damaged, _truncations),
    ),
    Mishap(
        name="one bit flipped in the newest checkpoint, at 20 places",
        rows=("B02",),
        runs=functools.partial(_damaged, _flips),
    ),
    Mishap(
        name="files of the newest checkpoint missing, renamed or too many",
        rows=("B03",),
        runs=functools.partial(_damaged, _odd_files),
    ),
    Mishap(
        name="a damaged checkpoint's step reached and damaged again",
        rows=("B05",),
        runs=_damage_reached_again,
    ),
    Mishap(name="half-removed and half-written folders", rows=("B06",), runs=_leftovers),
    Mishap(
        name="disk full from a file operation on",
        rows=("B07",),
        runs=functools.partial(_refusing_disk, "full", FULL),
    ),
    Mishap(
        name="an input/output error at a file operation",
        rows=("B09", "B10"),
        runs=functools.partial(_refusing_disk, "eio", BROKEN),
    ),
    Mishap(name="loss NaN in one step", rows=("D01", "C15"), runs=_not_finite),
    Mishap(name="loss NaN in three steps running", rows=("D04",), runs=_not_finite_for_long),
    Mishap(name="loss ten times too large", rows=("D03", "C15"), runs=_spikes),
    Mishap(name="out of memory, forward and backward", rows=("E01",), runs=_out_of_memory),
    Mishap(
        name="out of memory while measuring the held-out loss",
        rows=("E08",),
        runs=_out_of_memory_in_validation,
    ),
    Mishap(name="out of memory in the optimizer", rows=("E06",), runs=_out_of_memory_in_the_update),
)
