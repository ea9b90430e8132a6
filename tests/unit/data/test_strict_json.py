from __future__ import annotations

import io
from pathlib import Path

import pytest

from sevenfold.base.errors import BadDataError
from sevenfold.data import strict_json
from sevenfold.data.strict_json import decode_lines, parse_line, read_json_lines, read_json_list

GOOD = b'{"text": "one"}\n'

BAD_LINES = {
    "malformed": (b'{"text": "x",\n', "f:2:14: malformed JSON", "mend or remove this row"),
    "blank": (b"\n", "f:2: found a blank line", "remove the line"),
    "two_objects": (b'{"a": 1} {"b": 2}\n', "f:2:10: found '{\"b\": 2}'", "one JSON object a line"),
    "garbage": (b'{"a": 1} x\n', "f:2:10: found 'x'", "one JSON object a line"),
    "nan": (b'{"a": NaN}\n', "f:2: found NaN", "write a number, null or a string"),
    "infinity": (b'{"a": -Infinity}\n', "f:2: found -Infinity", "write a number"),
    "twice": (b'{"a": 1, "a": 2}\n', "f:2: key 'a' stands twice", "keep one of them"),
    "twice_inside": (b'{"m": [{"a": 1, "a": 2}]}\n', "f:2: key 'a' stands twice", "keep one"),
    "utf8": (b'{"text": "\xff"}\n', "f:2:11: byte 0xff is not UTF-8", "convert the file"),
    "raw_surrogate": (b'{"text": "\xed\xa0\x80"}\n', "f:2:11: byte 0xed", "convert the file"),
    "nul": (b'{"text": "a\0"}\n', "f:2:12: found a NUL byte", "remove it"),
    "escaped_nul": (b'{"text": "a\\u0000"}\n', "f:2:12: field 'text' holds a NUL", "remove it"),
    "surrogate": (
        b'{"m": [{"c": "\\ud83d!"}]}\n',
        "f:2:15: field 'm[0].c' holds the lone surrogate \\ud83d",
        "remove it",
    ),
    "list": (b"[1]\n", "f:2: found a list", 'expected a JSON object such as {"text": ...}'),
    "deep": (b'{"a": ' + b"[" * 200_000 + b"\n", "f:2: nested too deeply", "flatten it"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_place_and_advice(name: str) -> None:
    line, place, advice = BAD_LINES[name]
    rows = read_json_lines(io.BytesIO(GOOD + line + GOOD), "f")
    assert next(rows) == ({"text": "one"}, "f:1")
    with pytest.raises(BadDataError) as caught:
        next(rows)
    assert str(caught.value).startswith(place)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_refused() -> None:
    with pytest.raises(BadDataError, match=r"f:1:1: found a byte order mark; save the file as"):
        next(read_json_lines(io.BytesIO(b"\xef\xbb\xbf" + GOOD), "f"))


@pytest.mark.fault("H01")
def test_lines_end_at_line_feeds_only() -> None:
    data = '{"text": "a\u2028b\u0085c"}\r\n{"text": "d\\ud83d\\ude00"}'.encode()
    rows = list(read_json_lines(io.BytesIO(data), "f"))
    assert rows == [({"text": "a\u2028b\u0085c"}, "f:1"), ({"text": "d😀"}, "f:2")]


@pytest.mark.fault("H11")
def test_a_huge_line_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_LINE_BYTES", 50)
    with pytest.raises(BadDataError, match=r"f:2: the line is longer than 50 bytes; cut the row"):
        list(read_json_lines(io.BytesIO(GOOD + b'{"text": "' + b"x" * 60 + b'"}\n'), "f"))


def test_a_list_is_read_with_the_lines_of_its_objects() -> None:
    data = b'[\n {"a": 1},\n {"a":\n 2}, {"a": 3}\n]\n'
    assert [where for _, where in read_json_list(data, "f")] == ["f:2", "f:3", "f:4"]
    assert [row["a"] for row, _ in read_json_list(data, "f")] == [1, 2, 3]
    assert list(read_json_list(b"[]", "f")) == []
    assert [w for _, w in read_json_list(b'{"a": 1}\n{"a": 2}\n', "f")] == ["f:1", "f:2"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1}\n{"a": 2}]', r"f:2: expected ',' and another object"),
        (b'[{"a": 1},\n]', r"f:2: expected ',' and another object, or '\]'"),
        (b'[{"a": 1},\n {"a": ', r"f:2:\d+: malformed JSON .*mend or remove this row"),
        (b'[{"a": 1}', r"f:1: expected ',' .*the file may be cut off"),
        (b'[{"a": 1}] []', r"f: something follows the list; remove it"),
        (b'"text"', r"f:1: expected a JSON list of objects, or one object a line"),
        (b"[1]", r"f:1: found a number, expected a JSON object"),
        (b'[{"a": 1},\n{"b": 1, "b": 2}]', r"f:2: key 'b' stands twice"),
        (b'[\n{"a": "\xff"}]', r"f:2:8: byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_list_is_named_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        list(read_json_list(data, "f"))


def test_text_is_decoded_with_line_and_byte() -> None:
    assert decode_lines("a\u2028b\n".encode(), "f") == "a\u2028b\n"
    with pytest.raises(BadDataError, match=r"f:2:2: found a NUL byte; remove it"):
        decode_lines(b"ab\nc\0", "f")


def test_what_python_reads_loosely_is_still_an_object() -> None:
    assert parse_line(b' {"text": "\\\\u0000 is no NUL"} ', "f:1") == {"text": "\\u0000 is no NUL"}


def test_kinds_are_called_as_json_calls_them() -> None:
    kinds = [strict_json.kind_of(value) for value in (True, 1, "", [], {}, None, Path())]
    assert kinds == ["true or false", "a number", "a string", "a list", "an object", "null",
                     "PosixPath"]  # fmt: skip
