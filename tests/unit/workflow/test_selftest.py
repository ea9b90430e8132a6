"""The runs of ``sevenfold selftest faults``, and that they notice a protection that is gone."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import SevenfoldError, UsageError
from sevenfold.train import checkpoint, recovery
from sevenfold.workflow import damage, mishaps, selftest, toy
from sevenfold.workflow.attempts import FINISH, Child, Laboratory, Result, killed, stopped
from sevenfold.workflow.mishaps import LONG, MISHAPS, SHORT


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.mark.fault(
    "A01", "A03", "A05", "A06", "A07", "B01", "B02", "B03", "B05", "B06", "B07", "B09", "B10",
    "C01", "C02", "C03", "C04", "C05", "C06", "C07", "C15", "C18", "D01", "D03", "D04", "E01",
    "E06", "E08",
)  # fmt: skip
@pytest.mark.slow
@pytest.mark.parametrize("mishap", MISHAPS, ids=lambda mishap: mishap.name)
def test_it_comes_back_and_is_identical(laboratory: Laboratory, mishap: mishaps.Mishap) -> None:
    results = list(mishap.runs(laboratory))
    assert results
    assert [result.why for result in results if not (result.recovered and result.identical)] == []


def test_the_marker_names_the_rows_of_the_table() -> None:
    [mark] = [m for m in test_it_comes_back_and_is_identical.pytestmark if m.name == "fault"]
    assert {row for mishap in MISHAPS for row in mishap.rows} == set(mark.args)


# --- what the harness must notice


def broken(laboratory: Laboratory, *deeds: Any, like: Any = None) -> Result:
    base = laboratory.base(SHORT, stopped("term@step=3"))
    laboratory.unbroken(SHORT)
    return laboratory.attempt(SHORT, [*deeds, FINISH], base=base, like=like)


def test_it_notices_that_random_states_are_not_put_back(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert broken(laboratory).identical
    monkeypatch.setattr(checkpoint, "restore_random_state", lambda states: None)
    result = broken(laboratory)
    assert result.recovered
    assert not result.identical
    assert result.why.startswith("step 4: loss is 0x")


def test_it_notices_that_checksums_are_not_looked_at(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm = damage.flipped("model.safetensors", 0.9)
    assert broken(laboratory, harm).identical
    monkeypatch.setattr(
        storage, "verify_folder", lambda folder, *_, **__: storage.read_manifest(folder)
    )
    assert not broken(laboratory, harm).identical


def test_it_notices_what_is_left_behind(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "sweep", lambda parent: None)
    result = broken(laboratory, damage.leftovers)
    assert not result.recovered
    assert "left behind: .metrics.jsonl.partial-77" in result.why


def test_it_notices_a_fault_that_never_came_and_another_message(laboratory: Laboratory) -> None:
    late = broken(laboratory, killed("kill@step=99"))
    assert not late.recovered
    assert "ended with 0, expected -9" in late.why
    other = broken(laboratory, Child("term@step=4", (75,), "make room"))
    assert not other.recovered
    assert "it said 'stopped by a signal" in other.why


def test_it_notices_a_checkpoint_that_is_not_written_on_a_signal(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery.StopRequest, "_remember", lambda *arguments: None)
    assert "ended with 0, expected 75" in broken(laboratory, stopped("term@step=4")).why


def test_it_notices_other_batches_steps_and_weights(laboratory: Laboratory) -> None:
    ending = laboratory.unbroken(SHORT)
    for change, why in (
        ({"batches": {**ending.batches, 5: "0"}}, "step 5: another batch"),
        ({"steps": {k: v for k, v in ending.steps.items() if k < 5}}, "has more steps"),
        ({"steps": {**ending.steps, 6: {}}}, "step 6 is not in metrics.jsonl, or twice"),
        ({"digest": "0"}, "other weights, optimizer or random states"),
    ):
        result = broken(laboratory, like=dataclasses.replace(ending, **change))
        assert why in result.why
        assert not result.identical


def test_a_run_to_compare_with_must_be_sound(laboratory: Laboratory) -> None:
    with pytest.raises(SevenfoldError, match=r"compared with failed: .*ended with 0.*doctor"):
        laboratory.base(SHORT, killed("kill@step=99"))


def test_a_child_that_hangs_is_ended(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "PATIENCE_S", 1)
    monkeypatch.setattr(toy, "make_bench", lambda *_: time.sleep(60))
    assert "ended with -14, expected 0" in broken(laboratory).why


def test_costs_are_counted_from_the_checkpoint_on(laboratory: Laboratory) -> None:
    lost = laboratory.attempt(LONG, [killed("kill@step=14:phase=load"), FINISH])
    # Steps 11 to 13 are done again, or from 6 on where checkpoint 10 was still being written.
    assert lost.num_steps_lost in (3, 8)
    assert lost.recovery_s is not None
    assert laboratory.attempt(LONG, [FINISH]).recovery_s is None


# --- the verb


@pytest.fixture
def one_mishap(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Put one mishap with the results in the list in place of all."""
    results: list[Result] = []
    mishap = mishaps.Mishap(name="a fault", rows=("A01",), runs=lambda _: iter(results))
    monkeypatch.setattr(mishaps, "MISHAPS", (mishap,))
    monkeypatch.setattr(selftest, "Laboratory", lambda folder: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return results


def options(output: Path | None) -> argparse.Namespace:
    return argparse.Namespace(what="faults", soak=False, output=output)


GOOD = Result(recovered=True, identical=True, num_steps_lost=4, recovery_s=0.25)


def test_the_table_is_shown_and_replaces_the_one_in_the_file(
    tmp_path: Path, one_mishap: list[Result], capsys: pytest.CaptureFixture[str]
) -> None:
    one_mishap += [GOOD, dataclasses.replace(GOOD, num_steps_lost=2), GOOD]
    path = tmp_path / "reliability.md"
    selftest.selftest(options(path))
    assert "a fault: 3 of 3 recovered and identical" in capsys.readouterr().out
    assert "| a fault | A01 | 3 | 3 | 3 | 4 | 0.25 |" in path.read_text()
    path.write_text(f"before\n{path.read_text().replace('| 3 |', '| 7 |')}after\n")
    selftest.selftest(options(path))
    text = path.read_text()
    assert "| a fault | A01 | 3 | 3 | 3 | 4 | 0.25 |" in text
    assert text.startswith("before\n<!-- selftest faults: begin -->\n| fault | rows |")
    assert text.endswith("<!-- selftest faults: end -->\nafter\n")
    assert "| 7 |" not in text


def test_a_failure_is_named_shown_and_ends_with_an_error(
    tmp_path: Path, one_mishap: list[Result], capsys: pytest.CaptureFixture[str]
) -> None:
    one_mishap += [GOOD, Result(recovered=True, identical=False, why="step 4: another batch")]
    message = r"1 of 2 runs did not come back identical, first: a fault: step 4.*report this line"
    with pytest.raises(SevenfoldError, match=message):
        selftest.selftest(options(tmp_path / "new.md"))
    assert "a fault: 1 of 2 recovered and identical" in capsys.readouterr().out
    assert "| a fault | A01 | 2 | 2 | 1 | 4 | 0.25 |" in (tmp_path / "new.md").read_text()


def test_a_file_without_a_place_is_refused_before_the_work(
    tmp_path: Path, one_mishap: list[Result], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.md"
    path.write_text("my own text")
    with pytest.raises(UsageError, match=r"no place for the table; put the lines .* or name a new"):
        selftest.selftest(options(path))
    assert path.read_text() == "my own text"
    assert capsys.readouterr().out == ""
