"""Exit 0 if this Python has what pyproject.toml asks for; names what is missing otherwise.

Usage: check_environment.py [EXTRA ...]. Reads package metadata only and imports none of them, so it
answers in a fraction of a second.
"""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

NAME = "sevenfold"


def wanted(extras: list[str]) -> list[str]:
    """Return the requirements of the package, and of ``extras`` with the extras they name."""
    path = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            inner = line.removeprefix(f"{NAME}[").rstrip("]").split(",")
            lines += wanted(inner) if line.startswith(f"{NAME}[") else [line]
    return lines


def missing(lines: list[str]) -> list[str]:
    """Return the requirements that this environment does not meet."""
    from packaging.requirements import Requirement

    absent = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(f"{requirement} (absent)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            absent.append(f"{requirement} ({version} is installed)")
    return absent


def main() -> int:
    """Print what is missing, one requirement a line."""
    if sys.version_info < (3, 11):  # noqa: UP036 - it also runs where Python is too old
        sys.stdout.write(f"Python 3.11 or newer (this is {sys.version.split()[0]})\n")
        return 1
    try:
        absent = missing(wanted(sys.argv[1:]))
    except ImportError:
        absent = ["packaging (absent)"]
    sys.stdout.write("".join(f"{line}\n" for line in absent))
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
