"""The script that compares loss curves says what they are."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevenfold.base import storage

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "bench" / "loss_parity.py"))


def curve(factor: float, *, at_the_end: float) -> list[dict[str, Any]]:
    rows = [{"step": n, "loss": (6 - 0.01 * n) * factor} for n in range(1, 101)]
    return [*rows[:-1], {**rows[-1], "validation_loss": at_the_end}, {"event": "done"}]


@pytest.mark.parametrize(
    ("factor", "at_the_end", "answer"),
    [
        (1.005, 5.01, "within 1.0 %: yes"),
        (1.005, 5.06, "within 1.0 %: no"),  # the loss held out
        (1.012, 5.01, "within 1.0 %: no"),  # the training curve
        (0.988, 5.01, "within 1.0 %: no"),
    ],
)
def test_a_curve_that_is_too_far_off_is_told(factor: float, at_the_end: float, answer: str) -> None:
    """Off the mean of several runs, that is."""
    lower, upper = (curve(f, at_the_end=5.0 * f) for f in (0.97, 1.03))
    curves = {"bf16": [lower, upper], "fp8": [curve(factor, at_the_end=at_the_end)]}
    name, held_out, largest, mean, _, asked = SCRIPT["_compared"](curves, "fp8", "bf16", 1.0, 1.0)
    assert (name, asked) == ("fp8 against bf16", answer)
    assert float(held_out) == pytest.approx(100 * (at_the_end / 5 - 1), abs=1e-3)
    assert float(largest) == float(mean) == pytest.approx(100 * abs(factor - 1), abs=1e-3)


def test_what_did_not_come_far_enough_is_not_judged() -> None:
    curves: dict[str, Any] = {"bf16": [curve(1.0, at_the_end=5.0)], "fp8": [[]]}
    assert SCRIPT["_compared"](curves, "fp8", "bf16", 1.0, 1.0)[-1] == "not trained far enough"
    # One that was stopped on its way is compared, and not judged by the last step both have.
    validated = {"step": 40, "validation_loss": 5.0}
    for name in ("fp8", "bf16"):
        curves = {each: [[validated, *curve(1.0, at_the_end=5.0)]] for each in ("bf16", "fp8")}
        (whole,) = curves[name]
        curves[name] = [whole[:61], whole[:81]]  # of several runs, the one that came least far
        row = SCRIPT["_compared"](curves, "fp8", "bf16", 1.0, 1.0)
        assert row[1] == "+0.000"
        assert row[-1] == f"not judged: {name} stopped after step 60"


def test_the_yardstick_knows_only_how_frequent_tokens_are(tmp_path: Path) -> None:
    with storage.new_folder(tmp_path / "packed", kind="packed", vocab_size=4) as folder:
        np.save(folder / "train-00000.npy", np.array([[0, 0, 0, 1, 1, 2]]))
        np.save(folder / "validation-00000.npy", np.array([[0, 3]]))
    # One is added to each count: 4, 3, 2 and 1 of 10.
    expected = -(math.log(0.4) + math.log(0.1)) / 2
    assert SCRIPT["unigram_nats"](tmp_path / "packed") == pytest.approx(expected)
