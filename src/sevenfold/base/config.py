"""One door for configuration: strict YAML in, frozen dataclasses out.

YAML is read with the types of YAML 1.2 (``3e-4`` is a number, ``no`` is text), without tags,
aliases or duplicate keys, and validated into the dataclass that sits beside the code it
configures. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sevenfold.base.errors import UsageError, nearest, without_secrets

T = TypeVar("T")
# The largest preset has 12 kB. Reading this much takes half a second, whatever stands in it.
MAX_YAML_BYTES = 100_000
# PyYAML takes time with the square of the depth.
MAX_YAML_DEPTH = 50


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configuration(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that :func:`build` can validate into."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, and neither aliases nor duplicate keys nor great depth."""

    _depth = 0  # of the node that is being composed

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.events.AliasEvent):
            raise UsageError(
                f"{_mark(event.start_mark)}: aliases are not read; write the value out"
            )
        if getattr(event, "tag", None) is not None:
            raise UsageError(
                f"{_mark(event.start_mark)}: tag '{event.tag}' is not read; write a plain value"
            )
        if self._depth == MAX_YAML_DEPTH:
            raise UsageError(
                f"{_mark(event.start_mark)}: more than {MAX_YAML_DEPTH} levels deep; a "
                "configuration has a handful"
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(
                    f"{_mark(key_node.start_mark)}: a key must be one word; put quotes around it"
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UsageError(
                    f"{_mark(key_node.start_mark)}: key '{key}' stands twice; keep one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
    ("float", r"^(?:[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$", "-+."),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
    )


def _mark(mark: Any) -> str:
    return f"{mark.name}:{mark.line + 1}:{mark.column + 1}"


class Document(dict[str, Any]):
    """A YAML mapping that remembers on which line each of its values stands."""

    def __init__(self, values: Mapping[str, Any], path: str, lines: Mapping[tuple[Any, ...], int]):
        """Keep ``values`` with the file and the lines they came from."""
        super().__init__(values)
        self.path = path
        self.lines = dict(lines)


def read_yaml(path: Path) -> Document:
    """Read one YAML mapping from ``path``.

    Errors:
        UsageError: missing file, over 100 kB, malformed YAML, a tag, an alias, a duplicate key,
            more than 50 levels, a number that is not finite, no UTF-8, or no mapping at the top.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; name an existing YAML file")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise UsageError(
            f"{path}: {size} bytes; a configuration has at most {MAX_YAML_BYTES // 1000} kB"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    loader = _StrictLoader(text)
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # A ValueError is a number of too many digits.
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not readable as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected 'key: value' lines at the top level")
    lines: dict[tuple[Any, ...], int] = {}
    _collect_lines(node, (), lines)
    _refuse_infinite(values, str(path), lines)
    return Document(values, str(path), lines)


def _collect_lines(node: Any, where: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> None:
    lines[where] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            _collect_lines(value_node, (*where, key_node.value), lines)
            lines[(*where, key_node.value)] = key_node.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, (*where, index), lines)


def _refuse_infinite(
    values: Any, path: str, lines: Mapping[tuple[Any, ...], int] | None = None
) -> None:
    for where, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            place = _place(path, where, lines or {})
            raise UsageError(f"{place}: {value} is not a finite number")


def _refuse_secrets(values: Any, path: str, lines: Mapping[tuple[Any, ...], int]) -> None:
    for where, value in _leaves(values):
        if isinstance(value, str) and without_secrets(value) != value:
            raise UsageError(
                f"{_place(path, where, lines)}: found {without_secrets(value)}, an address with a "
                "user or password in it, which every record would keep; leave it out, and give "
                "secrets by the environment (HF_TOKEN)"
            )


def _leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield everything that is neither mapping nor list, with its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*where, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*where, index))
    else:
        yield where, value


def _place(path: str, where: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int]) -> str:
    """Return ``path:line:field``, without the line where it is not known."""
    parts = (path, lines.get(where), ".".join(map(str, where)))
    return ":".join(str(part) for part in parts if part)


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with ``section.key=value`` assignments applied, values read as YAML.

    Errors:
        UsageError: an assignment without ``=``, one through a value that is no section, or a value
            that is not readable as YAML.
    """
    result = Document(json.loads(json.dumps(values)), *_origin(values))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {assignment}: expected section.key=value")
        value = _read_value(assignment, text)
        *sections, key = name.split(".")
        target: dict[str, Any] = result
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--set {assignment}: '{section}' is a value, not a section")
            target = inner
        target[key] = value
        result.lines.pop((*sections, key), None)
    return result


def _read_value(assignment: str, text: str) -> Any:
    try:
        value = _StrictLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = getattr(error, "problem", None) or type(error).__name__
        raise UsageError(
            f"--set {assignment}: not readable as YAML ({reason}); expected one value, with quotes "
            "around it where the shell or YAML would take it apart"
        ) from None
    _refuse_infinite(value, f"--set {assignment}")
    return value


@functools.cache
def _validator(cls: Any) -> TypeAdapter[Any]:
    """Return what validates into ``cls``; a gate file asks for the same a hundred times."""
    return TypeAdapter(cls)


def _origin(values: Mapping[str, Any]) -> tuple[str, Mapping[tuple[Any, ...], int]]:
    if isinstance(values, Document):
        return values.path, values.lines
    return "configuration", {}


def build(cls: type[T], values: Mapping[str, Any], *, of_earlier_version: bool = False) -> T:
    """Validate ``values`` into the configuration dataclass ``cls``.

    ``of_earlier_version``: what is missing may be newer than ``values``, and can be set by a flag.

    Errors:
        UsageError: the first problem found, as ``file:line:field: what, and what was expected``;
            or an address with a password in it, which would go into every record.
    """
    path, lines = _origin(values)
    _refuse_secrets(values, path, lines)
    try:
        built: T = _validator(typing.cast("Hashable", cls)).validate_json(
            json.dumps(values), strict=True
        )
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key is also a missing one; the misspelling is what helps.
        problem = next((p for p in problems if p["type"] in _UNKNOWN_KEY), problems[0])
        location = _location(problem)
        line = next(
            (lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines),
            None,
        )
        field = ".".join(map(str, location))
        where = f"{path}:{line}:{field}" if line else f"{path}:{field}"
        if problem["type"] in _UNKNOWN_KEY:
            advice = _advice(cls, location)
            raise UsageError(f"{where}: unknown key{advice}") from None
        if problem["type"] in _MISSING:
            advice = ""
            if of_earlier_version:
                names = (
                    ".".join(map(str, _location(p))) for p in problems if p["type"] in _MISSING
                )
                flags = " ".join(f"--set {name}=VALUE" for name in names)
                advice = f"; if an earlier version wrote this, say {flags}"
            raise UsageError(f"{where}: missing; this key has no default{advice}") from None
        same = [p["msg"] for p in problems if _location(p) == location]
        message = " or ".join([same[0], *(m.removeprefix("Input should be ") for m in same[1:])])
        message = message.removeprefix("Value error, ")
        found = json.dumps(problem["input"])[:80]
        raise UsageError(f"{where}: found {found}; {message[0].lower()}{message[1:]}") from None
    return built


def _location(problem: Mapping[str, Any]) -> tuple[int | str, ...]:
    return tuple(part for part in problem["loc"] if not _is_union_member(part))


def _is_union_member(part: int | str) -> bool:
    """True for the type names that pydantic puts into the location of a union's error."""
    return isinstance(part, str) and (
        part[:1].isupper() or "[" in part or part.startswith("constrained-") or part in _SCALARS
    )


_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
_SCALARS = {"int", "float", "str", "bool", "none"}


def _known_keys(cls: Any, location: Sequence[Any]) -> list[str]:
    for part in location:
        if dataclasses.is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(str(part))
        elif typing.get_origin(cls) in (dict, Mapping):
            cls = typing.get_args(cls)[1]
        else:
            cls = next(iter(typing.get_args(cls)), None)
        if typing.get_origin(cls) in (typing.Union, types.UnionType):
            members = [member for member in typing.get_args(cls) if member is not types.NoneType]
            cls = next((m for m in members if dataclasses.is_dataclass(m)), members[0])
    if not dataclasses.is_dataclass(cls):
        return []
    return [field.name for field in dataclasses.fields(cls)]


def _advice(cls: Any, location: Sequence[Any]) -> str:
    """Say where a key of this name belongs, if only elsewhere; else the nearest names."""
    places = [path for path in _key_paths(cls) if path[-1] == location[-1]]
    if not places:
        return nearest(str(location[-1]), _known_keys(cls, location[:-1]))
    same_section = [path for path in places if path[:1] == tuple(location[:1])]
    return f"; did you mean '{'.'.join((same_section or places)[0])}'?"


def _key_paths(cls: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, kind in typing.get_type_hints(cls).items() if dataclasses.is_dataclass(cls) else ():
        yield (*above, name)
        for member in (kind, *typing.get_args(kind)):
            yield from _key_paths(member, (*above, name))


def to_plain(value: Any) -> Any:
    """Return ``value`` (dataclasses, tuples and paths included) as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def fingerprint(value: Any) -> str:
    """Return the SHA-256 (hex) of ``value`` as canonical JSON."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
