"""Files that carry a checksum of themselves: what is read back, and what is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base import seals, storage
from sevenfold.base.errors import BadDataError, CheckpointError

VALUES: list[Any] = [{"a": 1, "b": ["é", None]}, {}, {"seal": "x"}, {"html": '\n  "seal": "'}]


@pytest.mark.parametrize("value", VALUES)
def test_every_single_byte_of_sealed_json_counts(value: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    storage.write_json(path, value)
    data = path.read_bytes()
    assert storage.read_json(path) == {k: v for k, v in value.items() if k != "seal"}
    assert seals.look(data) == "right"
    for place in range(len(data)):
        for bit in (0, 5):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            assert seals.look(bytes(changed)) != "right", place
    for place in range(len(data)):
        assert seals.look(data[:place] + data[place + 1 :]) != "right", place
    assert seals.look(data + b"\n") == "wrong"


def test_a_changed_field_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    storage.write_json(path, {"promoted": False, "n": 10})
    path.write_bytes(path.read_bytes().replace(b"10", b"19"))
    told = r"record\.json: changed since it was written.*run the step that makes it again"
    with pytest.raises(BadDataError, match=told):
        storage.read_json(path)
    with pytest.raises(CheckpointError, match=told):
        storage.read_json(path, CheckpointError)


def test_json_without_a_seal_is_read_and_so_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"a": 1}))
    assert storage.read_json(path) == {"a": 1}
    assert seals.look(path.read_bytes()) == "none"
    storage.write_json(path, [1, 2])
    assert storage.read_json(path) == [1, 2]


def test_anybody_can_check_a_seal(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    storage.write_json(path, {"a": 1})
    above, _, line = path.read_text().rpartition('\n  "seal": ')
    assert line == f'"{hashlib.sha256(above.encode()).hexdigest()}"\n}}\n'


def test_every_single_byte_of_a_sealed_page_counts(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    storage.write_sealed_text(path, '<p>"seal": "</p>\n')
    data = path.read_bytes()
    assert data.startswith(b'<p>"seal": "</p>\n<!-- SHA-256 of all above: ')
    assert seals.look(data) == "right"
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        assert seals.look(bytes(changed)) != "right", place


def test_every_single_byte_of_metrics_counts(tmp_path: Path) -> None:
    lines = storage.JsonLines(tmp_path / "metrics.jsonl")
    for step in range(3):
        lines.append({"step": step, "loss": 1.5 if step else float("nan")})
    assert lines.read()[0] == {"step": 0, "loss": None}
    data = lines.path.read_bytes()
    assert seals.damaged_lines(data) == []
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        assert seals.damaged_lines(bytes(changed)), place
    first = data.index(b"\n") + 1
    assert seals.damaged_lines(data[:first] + b'{"step": 9}\n' + data[first:]) == [2]
    # Half a line at the end is what a process leaves that was stopped; a line and a half is not.
    assert seals.damaged_lines(data[:-9]) == []
    assert seals.damaged_lines(data[:-1] + b"#") == [3]


def test_going_back_leaves_the_lines_before_as_they_were(tmp_path: Path) -> None:
    lines = storage.JsonLines(tmp_path / "metrics.jsonl")
    for step in range(4):
        lines.append({"step": step, "loss": 0.1 * step})
    data = lines.path.read_bytes()
    # A damaged line that can still be read is no less damaged afterwards.
    spoilt = data.replace(b'"loss": 0.1,', b'"loss": 0.2,')
    lines.path.write_bytes(spoilt)
    lines.rewind(2)
    assert lines.path.read_bytes() == b"".join(spoilt.splitlines(keepends=True)[:3])
    assert seals.damaged_lines(lines.path.read_bytes()) == [2]
