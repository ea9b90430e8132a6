"""JSON as data sets need it: every mistake is refused with its line and byte or field.

Lines end at a line feed and nowhere else: U+2028 may stand inside a string, and a carriage return
before the line feed belongs to the line end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from sevenfold.base.errors import BadDataError

Values = dict[str, Any]

MAX_LINE_BYTES = 32 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _ForbiddenError(ValueError):
    """Something the JSON grammar or Python's reader lets through, and we do not."""


def _refuse_constant(name: str) -> float:
    raise _ForbiddenError(f"found {name}, which is not JSON; write a number, null or a string")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _ForbiddenError(f"key '{twice}' stands twice in one object; keep one of them")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)


def read_json_lines(file: BinaryIO, name: str) -> Iterator[tuple[Values, str]]:
    """Yield each line's object with ``name:line``.

    Errors:
        BadDataError: a line is not one JSON object; the message has line and byte or field.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise BadDataError(
                f"{where}: the line is longer than {MAX_LINE_BYTES} bytes; cut the row into several"
            )
        yield parse_line(line.removesuffix(b"\n").removesuffix(b"\r"), where), where


def parse_line(line: bytes, where: str) -> Values:
    """Return the one object that ``line`` holds.

    Errors:
        BadDataError: it holds anything else.
    """
    if not line.strip():
        raise BadDataError(
            f"{where}: found a blank line, expected one JSON object; remove the line"
        )
    text = decode(line, where)
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError) as error:
        raise _malformed(error, where) from None
    rest = _skip_space(text, end)
    if rest != len(text):
        raise BadDataError(
            f"{where}:{rest + 1}: found {text[rest : rest + 20]!r} after the object, expected the "
            "end of the line; write one JSON object a line"
        )
    return _checked(value, text, where)


def read_json_list(data: bytes, name: str) -> Iterator[tuple[Values, str]]:
    """Yield each object of one JSON list with the line it begins on.

    A file that begins with ``{`` is read as JSON Lines, which often carry this suffix too.

    Errors:
        BadDataError: it is not a list of objects; the message has line and byte or field.
    """
    text = decode_lines(data, name)
    position = _skip_space(text, 0)
    if text[position : position + 1] == "{":
        for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
            where = f"{name}:{number}"
            yield parse_line(line.removesuffix(b"\r"), where), where
        return
    if text[position : position + 1] != "[":
        raise BadDataError(f"{name}:1: expected a JSON list of objects, or one object a line")
    at_line, counted = 1, 0
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        at_line += text.count("\n", counted, position)
        counted = position
        where = f"{name}:{at_line}"
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _malformed(error, where) from None
        yield _checked(value, text[position:end], where), where
        position = _skip_space(text, end)
        separator = text[position : position + 1]
        if separator == ",":
            position = _skip_space(text, position + 1)
        if separator != "]" and (separator != "," or text[position : position + 1] == "]"):
            at_line += text.count("\n", counted, position)
            raise BadDataError(
                f"{name}:{at_line}: expected ',' and another object, or ']' at the end of the "
                "list; the file may be cut off"
            )
    if _skip_space(text, position + 1) != len(text):
        raise BadDataError(f"{name}: something follows the list; remove it, or use .jsonl")


def decode(line: bytes, where: str) -> str:
    """Return ``line`` as text; ``where`` names file and line.

    Errors:
        BadDataError: a byte order mark, bytes that are not UTF-8, a NUL; with the byte's position.
    """
    if line.startswith(_BYTE_ORDER_MARK):
        raise BadDataError(
            f"{where}:1: found a byte order mark; save the file as UTF-8 without one"
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDataError(
            f"{where}:{error.start + 1}: byte 0x{line[error.start]:02x} is not UTF-8; "
            "convert the file to UTF-8"
        ) from None
    if (position := line.find(b"\0")) >= 0:
        raise BadDataError(f"{where}:{position + 1}: found a NUL byte; remove it")
    return text


def decode_lines(data: bytes, name: str) -> str:
    """Return ``data`` as text; mistakes are named by line and byte within the line."""
    try:
        if b"\0" not in data and not data.startswith(_BYTE_ORDER_MARK):
            return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    for number, line in enumerate(data.split(b"\n"), start=1):
        decode(line, f"{name}:{number}")
    raise AssertionError("a line with the mistake was expected")


def _skip_space(text: str, position: int) -> int:
    match = re.compile(r"[ \t\r\n]*").match(text, position)
    return match.end() if match else position


def _malformed(error: ValueError | RecursionError, where: str) -> BadDataError:
    if isinstance(error, RecursionError):
        return BadDataError(f"{where}: nested too deeply to be a row; flatten it")
    if isinstance(error, json.JSONDecodeError):
        return BadDataError(
            f"{where}:{error.colno}: malformed JSON ({error.msg}); expected one complete JSON "
            "object; mend or remove this row"
        )
    return BadDataError(f"{where}: {error}")


def _checked(value: Any, text: str, where: str) -> Values:
    if not isinstance(value, dict):
        raise BadDataError(
            f'{where}: found {kind_of(value)}, expected a JSON object such as {{"text": ...}}'
        )
    if "\\u" in text:
        for field, string in _strings(value, ""):
            _refuse_characters(string, text, where, field)
    return value


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield field, key
            yield from _strings(item, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{field}[{index}]")


def _refuse_characters(string: str, text: str, where: str, field: str) -> None:
    found = re.search("[\0\ud800-\udfff]", string)
    if found is None:
        return
    code = ord(found[0])
    escape = re.search(rf"\\u{code:04x}", text, re.IGNORECASE)
    byte = len(text[: escape.start()].encode("utf-8", "replace")) + 1 if escape else 1
    what = "a NUL" if code == 0 else f"the lone surrogate \\u{code:04x}"
    raise BadDataError(f"{where}:{byte}: field '{field}' holds {what}, which is no text; remove it")


def kind_of(value: Any) -> str:
    """Return what JSON calls ``value``: for messages that say what was found."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
