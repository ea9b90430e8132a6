"""What is compiled once serves the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.console import keep_compiled_code
from sevenfold.workflow import cli

REPOSITORY = Path(__file__).parents[3]
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"


def test_a_resumed_process_compiles_nothing(tmp_path: Path) -> None:
    """Two kernels, forward and backward, and the layer they belong to lie in the user's cache."""
    environment = {k: v for k, v in os.environ.items() if k not in (VARIABLE, TRITON)}
    paths = f"{REPOSITORY / 'src'}:{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.model.compile_once"],
        env={**environment, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": paths},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {"kernels": [2, 0], "layers": [1, 0]}
    assert second == {"kernels": [0, 2], "layers": [0, 1]}
    assert (tmp_path / "sevenfold/inductor").is_dir()


def test_every_command_keeps_what_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(TRITON, raising=False)
    assert cli.execute(["--help"]) == 0
    assert os.environ[VARIABLE] == str(tmp_path / "sevenfold/inductor")
    assert os.environ[TRITON] == str(tmp_path / "sevenfold/triton")
    monkeypatch.setenv(VARIABLE, "elsewhere")
    monkeypatch.setenv(TRITON, "also elsewhere")
    keep_compiled_code()
    assert os.environ[VARIABLE] == "elsewhere"
    assert os.environ[TRITON] == "also elsewhere"


def test_where_nothing_can_be_written_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/none")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(TRITON, raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    keep_compiled_code()
    assert not {VARIABLE, TRITON} & os.environ.keys()


def test_where_the_home_is_closed_torch_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs as another user than the one whose home it names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(TRITON, raising=False)
    reach = Path.stat

    def refuse(path: Path, **how: Any) -> os.stat_result:
        if path.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return reach(path, **how)

    monkeypatch.setattr(Path, "stat", refuse)
    keep_compiled_code()
    assert not {VARIABLE, TRITON} & os.environ.keys()
