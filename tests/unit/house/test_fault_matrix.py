"""The fault matrix in docs/reliability.md says what the tests' markers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench import fault_matrix
from bench.fault_matrix import DOCUMENT, cell, markers, problems, regenerated, rows

TEXT = DOCUMENT.read_text(encoding="utf-8")
SIZES = {"A": 13, "B": 16, "C": 19, "D": 9, "E": 9, "F": 6, "G": 10, "H": 12, "I": 7, "J": 7,
         "K": 13, "L": 11}  # fmt: skip


def test_every_row_is_there_once() -> None:
    found = [row["id"] for row in rows(TEXT)]
    assert found == [
        f"{letter}{n:02}" for letter, size in SIZES.items() for n in range(1, size + 1)
    ]
    assert len([row for row in rows(TEXT) if row["first"]]) == 98


def test_every_row_is_shown_by_a_test_or_has_a_reason() -> None:
    assert problems(TEXT, markers()) == []


def test_everything_shown_is_a_test_file_that_exists() -> None:
    for row in rows(TEXT):
        for name in re.findall(r"`([^`]+)`", row["shown"]):
            places = [fault_matrix.TESTS / f"{name}.py", fault_matrix.TESTS / f"unit/{name}.py"]
            assert any(place.is_file() for place in places), f"{row['id']}: {name}"


# --- the check itself


def line(row: str, shown: str, reason: str = "-") -> str:
    return f"| {row} | what | promise | {shown} | {reason} |\n"


@pytest.mark.parametrize(
    ("text", "shown", "problem"),
    [
        (line("A01 P0", "-"), {}, "A01: no test and no reason"),
        (line("A01", "-"), {}, "A01: no test and no reason"),
        (line("A01", "`base/x`"), {}, "A01: shown by -, the table says `base/x`"),
        (
            line("A01", "-", "a GPU"),
            {"A01": {"unit/base/test_x.py"}},
            "A01: shown by `base/test_x`",
        ),
        (line("A01", "-", "a GPU"), {"A77": {"gpu/test_x.py"}}, "A77: marked in `gpu/test_x`, but"),
        (line("A01", "-", "a GPU") * 2, {}, "A01: stands twice"),
        (line("A01", "`x`", "not shown yet"), {"A01": {"unit/x.py"}}, "A01: shown by `x`; take"),
    ],
)
def test_what_is_wrong_is_named(text: str, shown: dict[str, set[str]], problem: str) -> None:
    assert any(found.startswith(problem) for found in problems(text, shown)), problems(text, shown)


def test_the_column_is_written_from_the_markers(tmp_path: Path) -> None:
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit" / "test_x.py").write_text(
        'import pytest\n\n\n@pytest.mark.fault("A01", "B02")\ndef test_it() -> None:\n    pass\n'
    )
    found = markers(tmp_path)
    assert found == {"A01": {"unit/test_x.py"}, "B02": {"unit/test_x.py"}}
    text = regenerated("before\n" + line("A01 P0", "-") + "after\n", found)
    assert text == "before\n" + line("A01 P0", "`test_x`") + "after\n"
    assert cell({"unit/base/test_b.py", "gpu/test_a.py"}) == "`base/test_b`, `gpu/test_a`"


def test_rows_must_be_written_out(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("import pytest\nmark = pytest.mark.fault(*ROWS)\n")
    with pytest.raises(SystemExit, match=r"test_x\.py:2: write the rows out"):
        markers(tmp_path)
