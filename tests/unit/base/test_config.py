"""Strict YAML, overrides, and validation whose messages name file, line and field."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from sevenfold.base.config import (
    MAX_YAML_BYTES,
    build,
    configuration,
    fingerprint,
    override,
    read_yaml,
    to_plain,
)
from sevenfold.base.errors import UsageError


@configuration
class Inner:
    kind: Literal["cosine", "wsd"]
    peak_lr: Annotated[float, Field(gt=0)]

    def __post_init__(self) -> None:
        if self.peak_lr > 1:
            raise ValueError("peak_lr above 1 diverges; take 1e-2 or less")


@configuration
class Outer:
    steps: int
    inner: Inner
    parts: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] | None = None
    note: str | None = None


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.fault("K02")
def test_yaml_1_2_scalars(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "a: 3e-4\nb: no\nc: 017\nd: 1:30\ne: true\nf: null\ng: -2\nh: .5\ni: 'x'\nj: 0x10\n",
    )
    expected = {"a": 3e-4, "b": "no", "c": "017", "d": "1:30", "e": True, "f": None}
    expected |= {"g": -2, "h": 0.5, "i": "x", "j": "0x10"}
    assert read_yaml(path) == expected


@pytest.mark.fault("K02", "L03")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x\n", r"recipe.yaml:2:4: aliases are not read; write the value out"),
        ("a: 1\na: 2\n", r"recipe.yaml:2:1: key 'a' stands twice; keep one of them"),
        ("a: .nan\n", r"recipe.yaml:1:a: nan is not a finite number"),
        ("a:\n  b:\n    - .inf\n", r"recipe.yaml:3:a.b.0: inf is not a finite number"),
        ("- a\n", r"recipe.yaml: expected 'key: value' lines at the top level"),
        ("", r"recipe.yaml: expected 'key: value' lines at the top level"),
        ("a: [1\n", r"recipe.yaml: not readable as YAML: .*line 2"),
        ("a: !!python/object:os.system x\n", r"recipe.yaml:1:4: tag '.*os.system' is not read; wr"),
        ("a: !!timestamp x\n", r"recipe.yaml:1:4: tag '.*timestamp' is not read; write a plain"),
        ("b: 1\n? [a]\n: 1\n", r"recipe.yaml:2:3: a key must be one word; put quotes around"),
        ("a: " + "1" * 5000, r"recipe.yaml: not readable as YAML: .*4300 digits"),
        ("a: 1\n" + "#" * MAX_YAML_BYTES, r"100005 bytes; a configuration has at most 100 kB"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_yaml(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: no such file; name an existing YAML file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_recipe_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(UsageError, match=r"latin\.yaml: not UTF-8 at byte 6; save it as UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


READ = r"""
import re, sys, time
from pathlib import Path
from sevenfold.base.config import UsageError, read_yaml
started = time.process_time()
try:
    read_yaml(Path(sys.argv[1]))
except UsageError as error:
    seconds = time.process_time() - started
    peak_kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(seconds, int(peak_kib) / 1024, error)
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.fault("L03")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases are not read"),
        ("".join(f"k{n}: 1\n" for n in range(8000)) + BOMB, "aliases are not read"),
        ("a: " + "[" * 90_000, r":1:53: more than 50 levels deep; a configuration has a handful"),
        ("a: !!python/object/apply:os.system ['touch MARKER']\n", "tag .* is not read"),
    ],
    ids=["bomb", "late bomb", "deep", "tag"],
)
def test_hostile_yaml_costs_neither_time_nor_memory(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("MARKER", str(tmp_path / "marker")), encoding="utf-8")
    assert re.search(message, read_apart(path))
    assert not (tmp_path / "marker").exists()


@pytest.mark.fault("L03")
def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\n")
    os.truncate(path, 10**9)
    assert "1000000000 bytes; a configuration has at most 100 kB" in read_apart(path)


def read_apart(path: Path) -> str:
    """Read ``path`` in a process of its own, which may take little time and memory."""
    command = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory_mib, said = done.stdout.split(maxsplit=2)
    assert float(seconds) < 1.0
    assert float(memory_mib) < 200
    return said


VALID = """steps: 10
inner:
  kind: cosine
  peak_lr: 3e-4
"""


def test_build_makes_frozen_dataclasses(tmp_path: Path) -> None:
    built = build(Outer, read_yaml(written(tmp_path, VALID)))
    assert built == Outer(steps=10, inner=Inner(kind="cosine", peak_lr=3e-4))
    with pytest.raises(AttributeError):
        built.steps = 11  # type: ignore[misc]


@pytest.mark.fault("K01", "K02")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "peak_lr: 3e-4",
            "peek_lr: 3e-4",
            r":4:inner.peek_lr: unknown key; did you mean 'peak_lr'\?",
        ),
        (
            "peak_lr: 3e-4",
            "peak-lr: 3e-4",
            r":4:inner.peak-lr: unknown key; did you mean 'peak_lr'\?",
        ),
        (
            "steps: 10",
            "peak_lr: 3e-4\nsteps: 10",
            r":1:peak_lr: unknown key; did you mean 'inner.peak_lr'\?",
        ),
        ("3e-4", "'2e-5'", r':4:inner.peak_lr: found "2e-5"; input should be a valid number'),
        ("steps: 10", "steps: 1_000", r':1:steps: found "1_000"; input should be a valid integer'),
        ("steps: 10", "steps: 012", r':1:steps: found "012"; input should be a valid integer'),
        ("steps: 10", "steps: yes", r':1:steps: found "yes"; input should be a valid integer'),
        ("steps: 10", "steps: true", r":1:steps: found true; input should be a valid integer"),
        ("steps: 10\n", "", r":inner.*|steps: missing; this key has no default"),
        ("steps: 10", "steps: ten", r":1:steps: found \"ten\"; input should be a valid integer"),
        ("steps: 10", "steps: 1.5", r":1:steps: found 1.5; input should be a valid int"),
        (
            "kind: cosine",
            "kind: linear",
            r":3:inner.kind: found \"linear\"; input should be 'cosine'",
        ),
        ("3e-4", "0", r":4:inner.peak_lr: found 0; input should be greater than 0"),
        ("3e-4", "3", r":2:inner: found .*; peak_lr above 1 diverges; take 1e-2 or less"),
        ("steps: 10", "steps: 10\nparts: [{kind: wsd}]", r":2:parts.0.peak_lr: missing"),
        (
            "steps: 10",
            "steps: 10\nby_name: {a: {kind: wsd, peak_lr: 1, x: 2}}",
            r":2:by_name.a.x: unknown key; known: kind, peak_lr",
        ),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, VALID.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        build(Outer, read_yaml(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.fault("L06")
@pytest.mark.parametrize(
    "address",
    [
        "https://me:hunter2@host/x",
        "https://hunter2@host",
        "s3+x://a:hunter2@b",
        "git+ssh://u:hunter2@h/y",
    ],
)
def test_an_address_with_a_password_is_refused_without_repeating_it(
    tmp_path: Path, address: str
) -> None:
    path = written(tmp_path, f"{VALID}note: from {address}\n")
    message = r":5:note: found from .*://\*\*\*@.*, which every record would keep; leave it out"
    with pytest.raises(UsageError, match=message) as caught:
        build(Outer, read_yaml(path))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match="parts.0.kind: found"):
        build(Outer, {"parts": [{"kind": address}]})
    assert build(Outer, {**read_yaml(written(tmp_path, VALID)), "note": "https://host/a@b"}).note


def test_overrides_are_typed_and_nested(tmp_path: Path) -> None:
    values = read_yaml(written(tmp_path, VALID))
    changed = override(values, ["steps=20", "inner.peak_lr=1e-3", "note=two = words"])
    built = build(Outer, changed)
    assert (built.steps, built.inner.peak_lr, built.note) == (20, 1e-3, "two = words")
    assert values["steps"] == 10


@pytest.mark.fault("K02", "L03")
@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", r"--set steps: expected section.key=value"),
        ("=3", r"--set =3: expected section.key=value"),
        ("steps.more=3", r"'steps' is a value, not a section"),
        ("steps=.inf", r"--set steps=.inf: inf is not a finite number"),
        ("parts=[{a: .nan}]", r"--set parts=.*:0.a: nan is not a finite number"),
        (
            "steps=[1",
            r"--set steps=\[1: not readable as YAML \(.*\); expected one value, with quotes",
        ),
        ("note=!!python/name:os.system", r"tag '.*os.system' is not read; write a plain value"),
        ("steps=" + "1" * 5000, r"not readable as YAML \(ValueError\); expected one value"),
        ("note=" + "[" * 3000, r"more than 50 levels deep; a configuration has a handful"),
    ],
)
def test_wrong_overrides(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(read_yaml(written(tmp_path, VALID)), [assignment])


def test_an_overridden_key_is_not_blamed_on_a_line_of_the_file(tmp_path: Path) -> None:
    values = override(read_yaml(written(tmp_path, VALID)), ["inner.peak_lr=0"])
    with pytest.raises(UsageError, match=r"inner\.peak_lr: found 0") as caught:
        build(Outer, values)
    assert ":4:" not in str(caught.value)


def test_plain_values_and_fingerprint() -> None:
    first = Outer(steps=1, inner=Inner(kind="wsd", peak_lr=0.1), parts=())
    assert to_plain(first)["inner"] == {"kind": "wsd", "peak_lr": 0.1}
    assert to_plain((Path("a") / "b",)) == ["a/b"]
    assert fingerprint(first) == fingerprint(to_plain(first))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
