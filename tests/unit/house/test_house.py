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
    *sorted((REPOSITORY / "bench").glob("*.py")),
    *sorted((REPOSITORY / "tests").rglob("*.py")),
]
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_SCRIPT_LINES, MAX_FIT_LINES = 400, 60, 40, 120
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "util", "helper"}
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


# What writes whatever it is called on, and functions that write, by their full names.
WRITING_METHODS = {
    "chmod", "hardlink_to", "mkdir", "open_memmap", "rmdir", "save_pretrained", "save_to_disk",
    "savefig", "symlink_to", "to_csv", "to_json", "to_parquet", "tofile", "touch", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip
WRITING_FUNCTIONS = re.compile(
    r"os\.(chmod|chown|ftruncate|link|makedirs|mkdir|mkfifo|open|remove|removedirs|rename|"
    r"renames|replace|rmdir|symlink|truncate|unlink)"
    r"|shutil\.(copy\w*|make_archive|move|rmtree|unpack_archive|chown)"
    r"|(numpy|torch)\.(save\w*|memmap)|(json|yaml|pickle|marshal)\.dump"
    r"|safetensors\.\w+\.save_\w+|huggingface_hub\.save\w*|tempfile\.\w+"
    r"|pyarrow\.(OSFile|.*\bwrite_\w+|.*Writer)|logging\.(handlers\.)?\w*FileHandler"
)
# What may fill a folder that `with storage.new_folder(...)` has just made and will check.
FILLING = re.compile(
    r"(.*\.)?(copyfile|mkdir|open|save_file|save_pretrained|save_to_disk|save_torch_state_dict|"
    r"write_bytes|write_text)|numpy\.save"
)
# Who may write elsewhere, and why; a star is everything in the module.
MAY_WRITE = {
    ("base/disk.py", "*"): "what base/storage.py writes with",
    ("base/storage.py", "*"): "where everybody writes",
    ("base/unfinished.py", "*"): "keeps what a stopped step has finished, file by file",
    ("base/console.py", "os.open"): "opens the null device, for output that nobody reads",
    ("data/clean.py", "zstandard.open"): "fills a folder that its caller has from new_folder",
    ("data/saved_rows.py", "pyarrow.OSFile"): "fills a folder that its caller has from new_folder",
    ("data/saved_rows.py", "save_to_disk"): "fills a folder that its caller has from new_folder",
    ("data/saved_rows.py", "tempfile.TemporaryDirectory"): "inside a folder from new_folder",
    ("train/tensor_files.py", "safetensors.torch.save_file"): "fills a folder from new_folder",
    ("workflow/bench_dedup.py", "tempfile.TemporaryDirectory"): "what is measured, then gone",
    ("workflow/damage.py", "*"): "breaks files on purpose, for the self-test",
    ("workflow/selftest.py", "tempfile.TemporaryDirectory"): "where toy runs are broken",
    ("workflow/toy.py", "os.open"): "notes that the death of the process must not touch",
    ("workflow/toy.py", "tempfile.TemporaryDirectory"): "where a toy run is warmed up",
}


def full_names(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Yield every call with the name of what is called, as if nothing were imported as."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            origins |= {name: f"{node.module}.{origin}" for name, origin in names.items()}
    for call, name in calls(tree):
        first, dot, rest = name.partition(".")
        yield call, origins.get(first, first) + dot + rest


def writes_past_storage(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every call that writes elsewhere than through base/storage.py."""
    inside = {id(call) for block in new_folder_blocks(tree) for call, _ in calls(block)}
    for call, name in full_names(tree):
        if "base.storage." in name or (id(call) in inside and FILLING.fullmatch(name)):
            continue
        last = name.rpartition(".")[2]
        if last in ("rename", "replace") and "." in name and not is_text_replace(call, name):
            yield call.lineno, name
        elif last in WRITING_METHODS:
            yield call.lineno, last
        elif WRITING_FUNCTIONS.fullmatch(name) or (last == "open" and opens_for_writing(call)):
            yield call.lineno, name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_storage_writes(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    if (module, "*") in MAY_WRITE:
        return
    found = list(writes_past_storage(tree_of(path)))
    for line, name in found:
        where = f"{name_of(path)}:{line}: {name}"
        assert (module, name) in MAY_WRITE, f"{where} writes past base/storage.py"
    allowed = {name for place, name in MAY_WRITE if place == module}
    assert allowed <= {name for _, name in found}, f"{module}: MAY_WRITE lists what is not there"


@pytest.mark.parametrize(
    "source",
    [
        "open('a', 'w')", "open(path, mode='ab')", "path.open('wb')", "open(path, mode)",
        "import gzip\ngzip.open(path, 'wb')", "import os\nos.open(path, os.O_CREAT)",
        "path.write_text('x')", "folder.mkdir()", "path.unlink()", "path.rename(other)",
        "path.replace(other)", "import os\nos.replace(a, b)", "from os import rename\nrename(a, b)",
        "import shutil as s\ns.rmtree(folder)", "from shutil import rmtree as r\nr(folder)",
        "import torch\ntorch.save(x, path)", "import numpy as np\nnp.save(path, x)",
        "from safetensors.torch import save_file as s\ns(x, path)",
        "model.save_pretrained(folder)", "rows.save_to_disk(folder)",
        "import json\njson.dump(x, file)", "import tempfile\ntempfile.mkdtemp()",
        "import logging\nlogging.FileHandler(path)",
        "from pyarrow import parquet\nparquet.write_table(table, path)",
        "with storage.new_folder(a, kind='b') as new:\n    new.unlink()",
        "with storage.new_folder(a, kind='b') as new:\n    new.rename(c)",
        "import torch\nwith storage.new_folder(a, kind='b') as new:\n    torch.save(x, new / 'c')",
    ],
)  # fmt: skip
def test_a_write_past_storage_is_found(source: str) -> None:
    assert list(writes_past_storage(ast.parse(source))), source


def test_reading_and_filling_a_new_folder_are_no_writes_past_storage() -> None:
    source = """
from sevenfold.base import storage
open(path)
open(path, "rb")
path.open()
tarfile.open(path, "r:*")
text.replace("a", "b")
dataclasses.replace(config, a=1)
storage.write_text(path, "x")
storage.remove_folder(path)
with storage.new_folder(target, kind="model") as folder:
    model.save_pretrained(folder)
    (folder / "a").write_text("x")
"""
    assert list(writes_past_storage(ast.parse(source))) == []


def new_folder_blocks(tree: ast.AST) -> Iterator[ast.With]:
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            names = {name for item in node.items for _, name in calls(item.context_expr)}
            if names & {"storage.new_folder", "new_folder"}:
                yield node


def is_text_replace(call: ast.Call, name: str) -> bool:
    """True for str.replace(old, new) and dataclasses.replace(x, ...), which touch no file."""
    if not name.endswith(".replace") or name == "os.replace":
        return False
    return len(call.args) >= 2 or name == "dataclasses.replace"


def opens_for_writing(call: ast.Call) -> bool:
    """True unless the mode is left out or stands there and only reads."""
    is_method = isinstance(call.func, ast.Attribute)
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[0 if is_method else 1 : 2]
    texts = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
    writing = any(re.fullmatch(r"[rwxabt+]*[wxa+][rwxabt+]*", text) for text in texts)
    return writing or (not is_method and len(texts) < len(modes))


DANGEROUS_MODULES = {
    "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle",
    "pickle5", "shelve",
}  # fmt: skip
DANGEROUS_CALLS = re.compile(
    r"eval|exec|compile|__import__|builtins\.(eval|exec)"
    r"|os\.(system|popen|exec\w+|spawn\w+)|subprocess\.(getoutput|getstatusoutput)"
    r"|yaml\.(load|load_all|unsafe_load\w*|full_load\w*)|torch\.(hub|jit|package)\.\w*load\w*"
    r"|.*\.(extractall|unpack_archive|read_pickle|add_safe_globals)"
)
# What an argument of this name must literally be, wherever it is given.
ONLY_SAFE = {
    "weights_only": True,
    "allow_pickle": False,
    "shell": False,
    "trust_remote_code": False,
}
NEEDED_ARGUMENTS = {"torch.load": "weights_only", "numpy.load": "allow_pickle"}
# A template of ours is trusted; one that was read from somewhere goes through the sandbox.
PLAIN_TEMPLATES = {"verify/report.py"}


def dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of whatever could run or unpack what others wrote."""
    for line, module in imported_modules(tree):
        if module.partition(".")[0] in DANGEROUS_MODULES:
            yield line, f"import {module}"
    for call, name in full_names(tree):
        if DANGEROUS_CALLS.fullmatch(name):
            yield call.lineno, name
        asked = {getattr(argument, "value", None) for argument in call.args}
        if name.endswith("import_module") and asked & DANGEROUS_MODULES:
            yield call.lineno, f"{name} of one of {sorted(DANGEROUS_MODULES)}"
        needed = NEEDED_ARGUMENTS.get(name)
        if needed and needed not in {keyword.arg for keyword in call.keywords}:
            yield call.lineno, f"{name} without {needed}"
    for argument, value in named_values(tree):
        safe = isinstance(value, ast.Constant) and value.value is ONLY_SAFE.get(argument)
        if argument in ONLY_SAFE and not safe:
            yield value.lineno, f"{argument} that is not {ONLY_SAFE[argument]}"


def named_values(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield every value that stands under a name in a call or in a dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            yield str(node.arg), node.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), value


@pytest.mark.fault("L02")
@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_nothing_runs_or_unpacks_foreign_data(path: Path) -> None:
    in_tests = path.is_relative_to(REPOSITORY / "tests")
    for line, name in dangers(tree_of(path)):
        # A test may make or ask for something hostile, to show that we refuse it.
        allowed = in_tests and (" that is not " in name or " without " in name)
        assert allowed, f"{name_of(path)}:{line}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_prints_through_its_console_and_renders_in_the_sandbox(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    for call, name in full_names(tree_of(path)):
        assert name != "print", f"{name_of(path)}:{call.lineno}: print"
        if name in ("jinja2.Environment", "jinja2.Template"):
            assert module in PLAIN_TEMPLATES, f"{name_of(path)}:{call.lineno}: {name}"


@pytest.mark.fault("L02")
@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import dill as json",
        "import importlib\nimportlib.import_module('pickle')", "__import__('pickle')",
        "import torch\ntorch.load(path)", "from torch import load\nload(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)", "load(**{'weights_only': False})",
        "import numpy as np\nnp.load(path)", "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from yaml import load\nload(text, Loader)", "import yaml\nyaml.unsafe_load(text)",
        "eval(text)", "exec(text)", "import os\nos.system(text)",
        "from subprocess import run\nrun(text, shell=True)", "archive.extractall(folder)",
        "import shutil\nshutil.unpack_archive(path)", "f(folder, trust_remote_code=True)",
        "f(folder, trust_remote_code=config.trust)", "options = {'trust_remote_code': True}",
    ],
)  # fmt: skip
def test_a_danger_is_found(source: str) -> None:
    assert list(dangers(ast.parse(source))), source


def test_safe_reading_is_no_danger() -> None:
    source = """
import numpy as np
import torch
import re
torch.load(path, weights_only=True)
np.load(path, mmap_mode="r", allow_pickle=False)
re.compile("a")
layer.compile(mode=None)
f(folder, trust_remote_code=False)
"""
    assert list(dangers(ast.parse(source))) == []


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


@pytest.mark.parametrize(
    "path", [REPOSITORY / ".ci/run", *(REPOSITORY / "scripts").glob("*.s[hb]*")]
)
def test_shell_scripts_are_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\beval\b|\|\s*(ba)?sh\b", text), f"{path.name} runs what it is given"
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
