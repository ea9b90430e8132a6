"""Files that carry a checksum of themselves, so that a changed byte shows without a second file.

A folder has a manifest; a file that stands alone has a seal. JSON ends in a field ``seal``, the
SHA-256 of every byte before that line; text (a page, a card) ends in a comment with the same; a
line of ``metrics.jsonl``, which grows and is cut back, ends in the CRC-32 of what stands before it.
One atomic write puts file and seal in place together.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sevenfold.base.errors import BadDataError, SevenfoldError

Seal = Literal["right", "wrong", "none"]

FIELD = "seal"
_JSON = (f'\n  "{FIELD}": "'.encode(), b'"\n}\n')
_TEXT = (b"\n<!-- SHA-256 of all above: ", b" -->\n")
_LINE = re.compile(rb'(\{.+), "crc": "([0-9a-f]{8})"\}')


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as JSON without NaN or infinity; an object is sealed."""
    is_object = isinstance(value, Mapping)
    value = {k: v for k, v in value.items() if k != FIELD} if is_object else value
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if not is_object:
        return f"{text}\n".encode()
    body = f"{text[:-2]}," if value else "{"
    return _sealed(body.encode(), _JSON)


def text_bytes(text: str) -> bytes:
    """Return ``text`` with a comment that seals it, as HTML and Markdown have them."""
    return _sealed(text.removesuffix("\n").encode(), _TEXT)


def _sealed(body: bytes, marks: tuple[bytes, bytes]) -> bytes:
    before, after = marks
    return body + before + hashlib.sha256(body).hexdigest().encode() + after


def look(data: bytes) -> Seal:
    """Say whether the bytes of a file are those that its seal was made of."""
    found: list[Seal] = []
    for before, after in (_JSON, _TEXT):
        body, mark, rest = data.rpartition(before)
        if mark:
            right = rest == hashlib.sha256(body).hexdigest().encode() + after
            found.append("right" if right else "wrong")
    return "none" if not found else "right" if "right" in found else "wrong"


def read_json(path: Path, error: type[SevenfoldError] = BadDataError) -> Any:
    """Read JSON written by us or by people: no NaN, no key twice, no byte changed under a seal.

    Errors:
        error: the file is missing, not such JSON, or not what was sealed; the message names it.
    """
    try:
        data = path.read_bytes()
        value = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice
        )
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: could not be read ({problem.strerror}); look at the disk") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}") from None
    if isinstance(value, dict) and look(data) == "wrong":
        raise error(
            f"{path}: changed since it was written, its seal is of other bytes; put it back as it "
            "was, or run the step that makes it again"
        )
    return {k: v for k, v in value.items() if k != FIELD} if isinstance(value, dict) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key '{next(k for k in keys if keys.count(k) > 1)}' stands twice")
    return values


def line_bytes(row: Mapping[str, Any]) -> bytes:
    """Return one object as a line that ends in its own checksum."""
    body = json.dumps(row, allow_nan=False).encode()[:-1]
    return body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


def damaged_lines(data: bytes) -> list[int]:
    """Return which lines, counted from 1, are not as :func:`line_bytes` wrote them.

    What follows the last line end is no damage unless a whole line stands in it: a process that
    was stopped leaves half a line.
    """
    *lines, tail = data.split(b"\n")
    damaged = [number for number, line in enumerate(lines, 1) if not _is_whole(line)]
    return [*damaged, len(lines) + 1] if _LINE.match(tail) else damaged


def _is_whole(line: bytes) -> bool:
    found = _LINE.fullmatch(line)
    return found is not None and f"{zlib.crc32(found[1]):08x}".encode() == found[2]
