"""Fill the column "shown by" of the fault matrix in docs/reliability.md from the tests' markers.

    python bench/fault_matrix.py            # rewrite docs/reliability.md
    python bench/fault_matrix.py --check    # change nothing, say what is not right

A row is shown by the tests that carry ``pytest.mark.fault`` with its id. What no test shows needs
a reason in the last column, which is written by hand.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DOCUMENT = REPOSITORY / "docs" / "reliability.md"
TESTS = REPOSITORY / "tests"
ROW = re.compile(r"\| (?P<id>[A-L]\d\d)(?P<first> P0)? \| (?P<fault>[^|]+) \| (?P<promise>[^|]+) "
                 r"\| (?P<shown>[^|]*) \| (?P<reason>[^|]*) \|")  # fmt: skip


def markers(tests: Path = TESTS) -> dict[str, set[str]]:
    """Return, for every row's id, the test files that are marked with it, below ``tests``."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                for argument in node.args:
                    if not isinstance(argument, ast.Constant):
                        raise SystemExit(f"{path}:{node.lineno}: write the rows out")
                    found[str(argument.value)].add(path.relative_to(tests).as_posix())
    return dict(found)


def rows(text: str) -> list[re.Match[str]]:
    """Return the rows of the matrix in ``text``."""
    return [match for line in text.splitlines() if (match := ROW.fullmatch(line))]


def cell(files: set[str]) -> str:
    """Return the files as the table shows them."""
    names = sorted(name.removeprefix("unit/").removesuffix(".py") for name in files)
    return ", ".join(f"`{name}`" for name in names) or "-"


def problems(text: str, shown: dict[str, set[str]]) -> list[str]:
    """Return what is wrong with the matrix, and what to do about it."""
    found = rows(text)
    ids = [row["id"] for row in found]
    wrong = [f"{row}: stands twice" for row in sorted({i for i in ids if ids.count(i) > 1})]
    wrong += [
        f"{row}: marked in {cell(shown[row])}, but no row" for row in sorted(set(shown) - set(ids))
    ]
    for row in found:
        expected = cell(shown.get(row["id"], set()))
        if row["shown"] != expected:
            wrong.append(
                f"{row['id']}: shown by {expected}, the table says {row['shown']}; run "
                "python bench/fault_matrix.py"
            )
        if expected != "-" and "not shown yet" in row["reason"]:
            wrong.append(f"{row['id']}: shown by {expected}; take 'not shown yet' out")
        if expected == "-" and row["reason"] == "-":
            wrong.append(f"{row['id']}: no test and no reason; mark a test or write the reason")
    return wrong


def regenerated(text: str, shown: dict[str, set[str]]) -> str:
    """Return ``text`` with the column "shown by" as the markers say."""
    lines = []
    for line in text.splitlines():
        if row := ROW.fullmatch(line):
            files = cell(shown.get(row["id"], set()))
            line = (
                f"| {row['id']}{row['first'] or ''} | {row['fault']} | {row['promise']} "
                f"| {files} | {row['reason']} |"
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the document, or check it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if "--check" not in sys.argv:
        text = regenerated(text, markers())
        DOCUMENT.write_text(text, encoding="utf-8")
    wrong = problems(text, markers())
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
