"""A run's folder that is somebody else's, open to others, or closed to ourselves."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sevenfold.base import permissions, storage
from sevenfold.base.errors import SevenfoldError, UsageError

NOBODY = 65_534


@pytest.fixture
def own() -> Iterator[Path]:
    """A folder of an ordinary user, whom we are within the test even if we are the superuser."""
    folder = Path(tempfile.mkdtemp(prefix="sevenfold-"))
    folder.chmod(0o755)
    before = os.geteuid()
    if before == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(before)
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "sevenfold")
    return caplog


def test_a_folder_of_ones_own_is_quiet(own: Path, warnings: pytest.LogCaptureFixture) -> None:
    previous = os.umask(0o002)
    try:
        with storage.lock_run(own / "run"):
            pass
    finally:
        os.umask(previous)
    assert warnings.text == ""


@pytest.mark.fault("L07")
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_folder_that_others_may_write_in_is_warned_of(
    own: Path, warnings: pytest.LogCaptureFixture, mode: int
) -> None:
    own.chmod(mode)
    with storage.lock_run(own):
        pass
    assert f"{own}: others may write in it (mode {mode:o})" in warnings.text
    assert "chmod go-w keeps them out" in warnings.text


@pytest.mark.fault("L07", "B13")
def test_a_folder_of_somebody_else_is_refused(
    own: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    owner = own.stat().st_uid
    monkeypatch.setattr(permissions.os, "geteuid", lambda: owner + 1)
    message = rf"belongs to user {owner}, not to you \({owner + 1}\); choose another folder with"
    with pytest.raises(UsageError, match=message), storage.lock_run(own):
        pass
    monkeypatch.setattr(permissions.os, "geteuid", lambda: 0)
    own.chmod(0o757)
    with storage.lock_run(own):
        pass
    assert warnings.text.count(f"belongs to user {owner}") == (owner != 0)


@pytest.mark.fault("B13")
@pytest.mark.parametrize("closed", ["", "data", "data/packed", "sft/model"])
def test_a_read_only_folder_is_refused_at_the_start(own: Path, closed: str) -> None:
    for name in ("data/packed", "sft/model"):
        (own / name).mkdir(parents=True)
    with storage.lock_run(own):
        pass
    (own / closed).chmod(0o555)
    before = sorted(own.rglob("*"))
    message = f"{own / closed}: cannot be written; give yourself the right to, or choose another"
    with pytest.raises(UsageError, match=message), storage.lock_run(own):
        pass
    assert sorted(own.rglob("*")) == before


@pytest.mark.fault("B13")
def test_a_folder_that_cannot_be_made_is_refused(own: Path) -> None:
    own.chmod(0o555)
    with (
        pytest.raises(UsageError, match=r"run: cannot be written \(Permission denied\); choose"),
        storage.lock_run(own / "run"),
    ):
        pass


@pytest.mark.fault("B13")
def test_a_folder_that_closes_midway_is_explained(own: Path) -> None:
    storage.write_text(own / "a", "old")
    own.chmod(0o555)
    with pytest.raises(SevenfoldError, match=r"could not be written \(Permission denied\).*run"):
        storage.write_text(own / "a", "new")
    assert (own / "a").read_text() == "old"
