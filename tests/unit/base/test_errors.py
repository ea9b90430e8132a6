"""The tree of errors, and the hint at the nearest name."""

from __future__ import annotations

import pytest

from sevenfold.base import errors
from sevenfold.base.errors import SevenfoldError, nearest


def test_every_exit_code_of_the_design_has_its_error() -> None:
    codes = {kind.exit_code: kind.__name__ for kind in SevenfoldError.__subclasses__()}
    assert codes == {
        2: "UsageError",
        3: "GateRefusedError",
        4: "BadDataError",
        5: "CheckpointError",
        6: "DivergedError",
        7: "MemoryExhaustedError",
        8: "RunInUseError",
        75: "StoppedError",
    }
    assert SevenfoldError.exit_code == 1


def test_the_drawing_at_the_top_of_the_file_is_right() -> None:
    for kind in SevenfoldError.__subclasses__():
        drawn = next(line for line in str(errors.__doc__).splitlines() if kind.__name__ in line)
        assert f" {kind.exit_code} " in drawn


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pretrian", "; did you mean 'pretrain'?"),
        ("xyz", "; known: dpo, pretrain, sft"),
    ],
)
def test_nearest_names(name: str, hint: str) -> None:
    assert nearest(name, ["sft", "pretrain", "dpo"]) == hint
