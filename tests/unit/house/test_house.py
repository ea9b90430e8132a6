"""The rules of the house that can be counted or read from the source."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGE = REPOSITORY / "src" / "sevenfold"
ROOMS = ["base", "data", "model", "objective", "train", "verify", "workflow"]
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((REPOSITORY / "scripts").glob("[01][0-9]_*.py"))
SHIMS = [
    REPOSITORY / f"scripts/{name}.py" for name in ("production_pretrain", "full_model_pretrain")
]
PYTHON_FILES = [
    *MODULES,
    *sorted((REPOSITORY / "scripts").glob("*.py")),
    *sorted((REPOSITORY / "configs").glob("*.py")),
    *sorted((REPOSITORY / "tests").rglob("*.py")),
]
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_SCRIPT_LINES, MAX_FIT_LINES = 400, 60, 40, 120
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "util", "helper"}
# Whoever may break a rule, and why.
# Clean fills a folder of new_folder's.
MAY_WRITE = {"base/disk.py", "base/storage.py", "data/clean.py"}
NEEDS_NO_TORCH = ["base/config.py", "base/console.py", "base/errors.py", "base/records.py"]
NEEDS_NO_TORCH += ["base/storage.py", "verify/gates.py", "verify/statistics.py"]
NEEDS_NO_TORCH += ["workflow/cli.py", "workflow/flags.py"]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            prefix = node.module or ""
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Yield every call with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_there_is_something_to_check() -> None:
    assert len(SCRIPTS) == 12
    assert [room for room in ROOMS if (PACKAGE / room / "__init__.py").is_file()] == ROOMS
    folders = [path.name for path in PACKAGE.iterdir() if path.is_dir()]
    assert sorted(name for name in folders if name[0] != "_") == ROOMS


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_itself_and_rooms_before_it(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    allowed = ROOMS[: ROOMS.index(parts[0]) + 1] if len(parts) > 1 else []
    for line, module in imported_modules(tree_of(path)):
        assert not module.startswith("."), f"{name_of(path)}:{line}: imports are absolute"
        first, _, rest = module.partition(".")
        room = rest.partition(".")[0]
        if first == "sevenfold" and room in ROOMS:
            assert room in allowed, f"{name_of(path)}:{line}: {parts[0]} must not import {room}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    in_tests = path.is_relative_to(REPOSITORY / "tests")
    limit = MAX_SCRIPT_LINES if path in [*SCRIPTS, *SHIMS] else MAX_MODULE_LINES
    if not in_tests:
        assert num_lines <= limit, f"{name_of(path)} has {num_lines} lines, the limit is {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{name_of(path)}:{node.lineno}: {node.name}"
            limit = MAX_FIT_LINES if node.name == "fit" else MAX_FUNCTION_LINES
            assert length <= limit, f"{where} has {length} lines, the limit is {limit}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_names_say_what_is_inside(path: Path) -> None:
    # gpu_utils is the name people were promised.
    if path.name != "gpu_utils.py":
        words = set(path.stem.split("_"))
        assert not words & FORBIDDEN_NAMES, f"{name_of(path)}: a home without a concept"


WRITING_METHODS = re.compile(
    r"\.(write_text|write_bytes|unlink|rmdir|rename|replace|mkdir|touch|symlink_to|hardlink_to)$"
)
WRITING_CALLS = {
    "os.remove", "os.unlink", "os.rename", "os.replace", "os.mkdir", "os.makedirs", "os.rmdir",
    "os.truncate", "os.link", "os.symlink", "shutil.rmtree", "shutil.move", "shutil.copytree",
    "shutil.copy", "shutil.copy2", "shutil.copyfile", "torch.save", "numpy.save", "np.save",
    "np.savez", "json.dump", "yaml.dump", "pickle.dump",
}  # fmt: skip
# Calls that fill a folder which `with storage.new_folder(...)` has just made and will check.
INSIDE_NEW_FOLDER = {"shutil.copyfile", "np.save", "numpy.save"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_storage_writes(path: Path) -> None:
    if path.relative_to(PACKAGE).as_posix() in MAY_WRITE:
        return
    tree = tree_of(path)
    inside = {id(call) for block in new_folder_blocks(tree) for call, _ in calls(block)}
    for call, name in calls(tree):
        where = f"{name_of(path)}:{call.lineno}: {name}"
        filling = id(call) in inside
        if name in WRITING_CALLS:
            allowed = filling and name in INSIDE_NEW_FOLDER
            assert allowed, f"{where} writes past base/storage.py"
        if name.startswith("storage."):
            continue
        if WRITING_METHODS.search(name) and not is_text_replace(call, name):
            assert filling, f"{where} writes past base/storage.py"
        if name == "open" or name.endswith(".open"):
            assert not opens_for_writing(call) or filling, f"{where} writes past base/storage.py"


def new_folder_blocks(tree: ast.AST) -> Iterator[ast.With]:
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            names = {name for item in node.items for _, name in calls(item.context_expr)}
            if names & {"storage.new_folder", "new_folder"}:
                yield node


def is_text_replace(call: ast.Call, name: str) -> bool:
    """True for str.replace(old, new) and dataclasses.replace(x, ...), which touch no file."""
    if not name.endswith(".replace"):
        return False
    return len(call.args) >= 2 or name in ("dataclasses.replace", "os.path.replace")


def opens_for_writing(call: ast.Call) -> bool:
    position = 1 if dotted(call.func) in ("open", "gzip.open", "io.open", "zstandard.open") else 0
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[position : position + 1]
    texts = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
    return any(set(text) & set("wax+") for text in texts if len(text) <= 3)


DANGEROUS_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open", "print",
    "tarfile.extractall", "dill.load", "dill.loads", "joblib.load",
}  # fmt: skip
DANGEROUS_ARGUMENTS = {
    ("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True),
}  # fmt: skip


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_nothing_runs_or_unpacks_foreign_data(path: Path) -> None:
    tree = tree_of(path)
    in_package = path.is_relative_to(PACKAGE)
    for line, module in imported_modules(tree):
        first = module.partition(".")[0]
        assert first not in ("pickle", "marshal", "shelve", "dill"), f"{name_of(path)}:{line}"
    for call, name in calls(tree):
        where = f"{name_of(path)}:{call.lineno}: {name}"
        forbidden = name in DANGEROUS_CALLS or name.endswith((".extractall", ".unsafe_load"))
        assert not forbidden or (name == "print" and not in_package), where
        if name == "torch.load":
            given = {keyword.arg for keyword in call.keywords}
            assert "weights_only" in given, f"{where} without weights_only=True"
        for keyword in call.keywords:
            value = getattr(keyword.value, "value", None)
            # A test may do it to show that we refuse what comes out.
            if in_package:
                assert (keyword.arg, value) not in DANGEROUS_ARGUMENTS, f"{where}({keyword.arg})"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_catches_everything(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            kind = dotted(node.type) if node.type is not None else ""
            if kind in ("", "Exception") and not isinstance(node.type, ast.Tuple):
                assert path.name == "cli.py", f"{name_of(path)}:{node.lineno}: name what you expect"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=name_of)
def test_a_package_is_only_introduced(path: Path) -> None:
    body = tree_of(path).body
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)}: a docstring names the modules"
    rest = [n for n in body[1:] if not (isinstance(n, ast.Assign) and path.parent == PACKAGE)]
    assert rest == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_todo_names_an_issue(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            assert re.search(r"#\d+", line), f"{name_of(path)}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", [*SCRIPTS, *SHIMS], ids=name_of)
def test_a_script_is_one_docstring_and_one_call(path: Path) -> None:
    docstring, *rest = tree_of(path).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    assert "\n" not in docstring.value.value
    *imports, guard = rest
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    assert isinstance(guard, ast.If)
    assert ast.unparse(guard.test) == "__name__ == '__main__'"
    assert len(guard.body) == 1
    assert isinstance(guard.body[0], ast.Expr)
    call = guard.body[0].value
    assert isinstance(call, ast.Call)
    assert dotted(call.func) == "main"


@pytest.mark.parametrize("name", NEEDS_NO_TORCH)
def test_what_must_be_quick_imports_nothing_slow(name: str) -> None:
    slow = {"torch", "transformers", "datasets", "peft"}
    for node in tree_of(PACKAGE / name).body:
        for line, module in imported_modules(node):
            assert module.partition(".")[0] not in slow, f"{name}:{line}: {module}"
            assert module != "sevenfold.base.hardware", f"{name}:{line}: imports torch"


@pytest.mark.parametrize("path", [REPOSITORY / ".ci/run", *(REPOSITORY / "scripts").glob("*.sh")])
def test_shell_scripts_are_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name != "setup_environment.sh":
        assert "set -euo pipefail" in text
        assert os.access(path, os.X_OK), f"{path.name} is not executable"


def test_the_project_names_no_place_of_its_makers() -> None:
    """No registry host, no path of one machine: it must read the same anywhere."""
    hosts = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|(?<![\w.])/(work|root|home)/\w")
    suffixes = {".py", ".sh", ".toml", ".yaml", ".md", ".jinja", ".css"}
    roots = [REPOSITORY / name for name in ("src", "scripts", "configs", "docs", ".ci")]
    files = [p for root in roots for p in root.rglob("*") if p.suffix in suffixes]
    for path in [*files, REPOSITORY / "README.md", REPOSITORY / "pyproject.toml"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not hosts.search(line), f"{name_of(path)}:{number}: {line.strip()}"


def test_this_python_is_new_enough() -> None:
    assert sys.version_info >= (3, 11)
