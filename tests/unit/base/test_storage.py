"""Writes are whole or not at all; folders carry checksums; one process at a time per run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from sevenfold.base import faults, storage
from sevenfold.base.errors import (
    BadDataError,
    CheckpointError,
    RunInUseError,
    SevenfoldError,
    UsageError,
)


def make(folder: Path, text: str = "hello", **facts: Any) -> Path:
    with storage.new_folder(folder, kind="thing", **facts) as new:
        (new / "sub").mkdir()
        (new / "sub" / "a.txt").write_text(text)
    return folder


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that asks for a fault at an operation counted from here."""

    def ask(text: str) -> None:
        monkeypatch.setattr(faults, "_operations_done", 0)
        monkeypatch.setenv(faults.VARIABLE, text)

    return ask


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# What writing one file consists of, in order.
OPERATIONS = ("open", "second half", "fsync", "rename", "fsync of the folder")


@pytest.mark.fault("B07", "B09")
@pytest.mark.parametrize("operation", range(1, 6), ids=OPERATIONS)
@pytest.mark.parametrize("kind", ["full", "eio"])
def test_a_refused_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, fault: Callable[[str], None], kind: str, operation: int
) -> None:
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")
    fault(f"{kind}@fs:{operation}")
    with pytest.raises(SevenfoldError) as caught:
        storage.write_text(path, "new and longer")
    fault("")
    message = str(caught.value)
    assert message.startswith(f"{path}: could not be written (")
    if kind == "full":
        assert re.search(r"No space left on device\): it needs 14 bytes, [\d,]+ are free", message)
        assert "make room or choose another --run folder" in message
    else:
        assert "(Input/output error); look at the disk and at the folder's permissions" in message
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == ("new and longer" if operation == 5 else "old")


@pytest.mark.fault("B07", "B09")
@pytest.mark.parametrize("kind", ["full", "eio"])
def test_a_refusal_at_any_operation_leaves_the_old_folder_or_the_new(
    tmp_path: Path, fault: Callable[[str], None], kind: str
) -> None:
    target = make(tmp_path / "out", "old")
    fault("")
    make(target, "new")
    for operation in range(1, faults.operations_done() + 1):
        fault(f"{kind}@fs:{operation}")
        with contextlib.suppress(SevenfoldError):
            make(target, "new")
            # Removing what was replaced comes last, and succeeds on a full disk.
            assert kind == "full"
            assert operation > 12
        fault("")
        storage.verify_folder(target)
        # What could not be removed at once is removed by whoever comes next.
        storage.sweep(tmp_path)
        assert names(tmp_path) == ["out"]


def refused_in_block(target: Path, fill: Callable[[Path], object], **facts: Any) -> str:
    """Return what is said where ``fill`` fails while it makes ``target``."""

    def act() -> None:
        with storage.new_folder(target, kind="thing", **facts) as folder:
            (folder / "half").write_bytes(b"x" * 5000)
            fill(folder)

    with pytest.raises(SevenfoldError) as caught:
        act()
    assert names(target.parent) == []
    return str(caught.value)


def raises(error: BaseException) -> Callable[[object], None]:
    def act(argument: object) -> None:
        raise error

    return act


@pytest.mark.fault("B07")
def test_a_full_disk_names_what_was_needed_and_what_is_free(tmp_path: Path) -> None:
    full = raises(OSError(28, "No space left on device"))
    message = refused_in_block(tmp_path / "b", full)
    found = re.search(
        r"b: could not be written \(No space left on device\): it needs more than 5,000 bytes, "
        r"([\d,]+) are free; make room or choose another --run folder",
        message,
    )
    assert found is not None, message
    assert abs(int(found[1].replace(",", "")) - shutil.disk_usage(tmp_path).free) < 2**30
    assert "it needs 12,345 bytes" in refused_in_block(tmp_path / "b", full, needed_bytes=12_345)


def test_a_source_that_cannot_be_read_is_not_called_a_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "out"
    message = refused_in_block(target, lambda folder: (tmp_path / "texts").read_text())
    assert re.search(r"/texts: could not be read \(No such file or directory\) while", message)
    assert "see that it is there and may be read, then run the same command again" in message
    message = refused_in_block(target, raises(OSError(5, "Input/output error")))
    assert re.search(r"/out: could not be read or written \(Input/output error\); look", message)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SafetensorError("header too large")])
def test_what_is_not_the_systems_refusal_comes_through(
    tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)), storage.new_folder(tmp_path / "out", kind="thing"):
        raise error
    assert names(tmp_path) == []


def test_an_error_inside_names_the_place_that_people_know(tmp_path: Path) -> None:
    message = refused_in_block(tmp_path / "out", lambda folder: storage.read_json(folder / "half"))
    assert message.startswith(f"{tmp_path}/out/half: not valid JSON")


def test_what_cannot_be_removed_moved_or_appended_is_said(
    tmp_path: Path, fault: Callable[[str], None]
) -> None:
    folder = make(tmp_path / "out")
    lines = storage.JsonLines(tmp_path / "metrics.jsonl")
    storage.write_text(tmp_path / "a", "x")
    for act, said in (
        (lambda: storage.remove_folder(folder), "out: could not be removed"),
        (lambda: storage.remove_file(tmp_path / "a"), "a: could not be removed"),
        (lambda: storage.move_folder(folder, tmp_path / "new"), "out: could not be moved"),
        (lambda: lines.append({"step": 1}), r"metrics\.jsonl: could not be written"),
    ):
        fault("eio@fs:1")
        with pytest.raises(SevenfoldError, match=rf"{said} \(Input/output error\); look at the"):
            act()
    fault("")
    assert names(tmp_path) == ["a", "out"]


def test_json_is_strict_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(path, float("nan"))
    for text, message in [
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(BadDataError, match=message):
            storage.read_json(path)
    with pytest.raises(CheckpointError, match=r"none\.json: no such file"):
        storage.read_json(tmp_path / "none.json", CheckpointError)
    with pytest.raises(BadDataError, match=r"could not be read \(Is a directory\); look at"):
        storage.read_json(tmp_path)


def test_a_new_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", rows=3)
    manifest = storage.verify_folder(folder)
    assert (manifest["kind"], manifest["rows"]) == ("thing", 3)
    assert [file["path"] for file in manifest["files"]] == ["sub/a.txt"]
    assert manifest["files"][0]["bytes"] == 5
    assert manifest["files"][0]["sha256"] == storage.sha256_file(folder / "sub" / "a.txt")


def test_facts_may_be_added_while_the_folder_is_made(tmp_path: Path) -> None:
    with storage.new_folder(tmp_path / "out", kind="thing", a=1) as folder:
        storage.manifest_facts(folder, b=2)
    manifest = storage.read_manifest(tmp_path / "out")
    assert (manifest["a"], manifest["b"], manifest["files"]) == (1, 2, [])


def test_a_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", "old")
    before = storage.read_manifest(folder)["fingerprint"]

    def fail() -> None:
        with storage.new_folder(folder, kind="thing") as new:
            (new / "half").write_text("x")
            raise BadDataError("row 7 is bad")

    with pytest.raises(BadDataError, match="row 7"):
        fail()
    assert storage.verify_folder(folder)["fingerprint"] == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_replacing_a_folder_changes_its_fingerprint(tmp_path: Path) -> None:
    first = storage.read_manifest(make(tmp_path / "out", "one"))["fingerprint"]
    assert storage.read_manifest(make(tmp_path / "out", "two"))["fingerprint"] != first


def test_every_kind_of_damage_is_noticed(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    file = folder / "sub" / "a.txt"
    file.write_text("hallo")
    with pytest.raises(BadDataError, match=r"a\.txt: its SHA-256 is not the manifest's"):
        storage.verify_folder(folder)
    file.write_text("longer")
    with pytest.raises(BadDataError, match="6 bytes, the manifest says 5"):
        storage.verify_folder(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing; the manifest lists it with 5 bytes"):
        storage.verify_folder(folder, CheckpointError)


def test_a_file_that_the_disk_gives_no_more_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "out")

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "sha256_file", broken)
    with pytest.raises(CheckpointError, match=r"a\.txt: could not be read \(Input.*look at the"):
        storage.verify_folder(folder, CheckpointError)


def test_a_manifest_cannot_be_edited_or_point_outside(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    manifest = json.loads((folder / storage.MANIFEST).read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    (folder / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadDataError, match="fingerprint does not belong.*make it again"):
        storage.read_manifest(folder)
    manifest["files"][0]["path"] = "../secret"
    manifest["fingerprint"] = storage._files_fingerprint(manifest["files"])
    (folder / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadDataError, match=r"\.\./secret lies outside the folder"):
        storage.verify_folder(folder)


@pytest.mark.parametrize("files", [None, 1, [1], [{"path": "a"}], [{"path": 1, "bytes": 1}]])
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, files: object) -> None:
    folder = make(tmp_path / "out")
    for manifest in ([], {"files": files, "fingerprint": storage._files_fingerprint([])}):
        (folder / storage.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(BadDataError, match="fingerprint does not belong.*make it again"):
            storage.read_manifest(folder)


def test_a_file_that_nobody_listed_is_refused_where_it_would_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path / "out")
    (folder / ".hidden").write_text("")
    storage.verify_folder(folder, exact=True)
    (folder / "chat_template.jinja").write_text("another one")
    assert caplog.text == ""
    storage.verify_folder(folder)
    assert "chat_template.jinja: not one of the files that manifest.json lists" in caplog.text
    with pytest.raises(
        BadDataError, match=r"chat_template\.jinja: not one of the files.*remove it"
    ):
        storage.verify_folder(folder, exact=True)


def test_only_a_model_may_have_a_card_beside_its_files(tmp_path: Path) -> None:
    for kind in ("model", "adapter"):
        with storage.new_folder(tmp_path / kind, kind=kind) as new:
            (new / "config.json").write_text("{}")
        (tmp_path / kind / storage.CARD).write_text("what it is")
    storage.verify_folder(tmp_path / "model", exact=True)
    with pytest.raises(BadDataError, match=r"README\.md: not one of the files"):
        storage.verify_folder(tmp_path / "adapter", exact=True)


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from sevenfold.base import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with storage.new_folder(Path(sys.argv[1]), kind="thing") as folder:
        save_file({"a": np.zeros(10_000)}, folder / "model.safetensors")
except storage.SevenfoldError as error:
    print(error)
"""


@pytest.mark.fault("B07")
def test_a_disk_that_is_full_while_weights_are_written(tmp_path: Path) -> None:
    """Safetensors has an error of its own for this, which is no OSError."""
    target = make(tmp_path / "out", "old")
    command = [sys.executable, "-c", FULL, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not be written (File too large): it needs more than" in done.stdout
    assert "make room or choose another --run folder" in done.stdout
    storage.verify_folder(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_missing_folder_names_the_script_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not complete; run scripts/02_clean_data\.py first"):
        storage.read_manifest(tmp_path / "clean", made_by="scripts/02_clean_data.py")


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    make(tmp_path / "new")
    (tmp_path / ".new.replaced").mkdir()
    make(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / ".old.replaced")
    (tmp_path / ".x.partial-1").mkdir()
    (tmp_path / ".y.partial-2").write_text("half")
    storage.sweep(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "old"]
    storage.verify_folder(tmp_path / "old")
    storage.sweep(tmp_path / "nowhere")


def test_what_another_thread_is_making_is_not_swept(tmp_path: Path) -> None:
    with storage.new_folder(tmp_path / "one", kind="thing") as folder:
        (folder / "a").write_text("x")
        make(tmp_path / "two")
        storage.sweep(tmp_path)
    storage.verify_folder(tmp_path / "one")
    assert (tmp_path / "one" / "a").read_text() == "x"


def test_files_and_folders_are_removed_and_moved(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    storage.move_folder(folder, tmp_path / "kept")
    storage.remove_folder(folder)
    storage.remove_folder(tmp_path / "kept")
    storage.write_text(tmp_path / "a", "x")
    storage.remove_file(tmp_path / "a")
    storage.remove_file(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("x")
    folder = make(tmp_path / "out")
    (folder / "link").symlink_to(tmp_path / "kept")
    storage.remove_folder(folder)
    assert (tmp_path / "kept" / "a").read_text() == "x"
    assert names(tmp_path) == ["kept"]


def test_arrays_come_back(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    storage.write_array(tmp_path / "a.npy", array)
    assert np.array_equal(storage.read_array(tmp_path / "a.npy"), array)


def test_json_lines_survive_a_half_written_line_and_rewind(tmp_path: Path) -> None:
    lines = storage.JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    for step in range(4):
        lines.append({"step": step, "loss": float("inf") if step == 1 else 1.5})
    with lines.path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    assert [row["step"] for row in lines.read()] == [0, 1, 2, 3]
    assert lines.read()[1]["loss"] is None
    lines.rewind(2)
    assert [row["step"] for row in lines.read()] == [0, 1, 2]


HOLD = """
import sys
from pathlib import Path
from sevenfold.base import faults, storage
with storage.lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.fault("K08")
def test_a_run_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = rf"in use by process {holder.pid} on .* since .*wait for it, stop it, or choose"
        with pytest.raises(RunInUseError, match=message), storage.lock_run(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with storage.lock_run(tmp_path):
        pass


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot be written \(.*\); choose --run"),
        storage.lock_run(tmp_path / "run"),
    ):
        pass


KILLED = """
import sys
from pathlib import Path
from sevenfold.base import faults, storage
folder = Path(sys.argv[1])
with storage.new_folder(folder / "out", kind="thing") as new:
    (new / "a").write_text("new")
    (new / "sub").mkdir()
    (new / "sub" / "b").write_text("new")
storage.JsonLines(folder / "metrics.jsonl").append({"step": 2})
print(faults.operations_done())
"""
NUM_OPERATIONS = 19


def killed_at(folder: Path, operation: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, faults.VARIABLE: f"kill@fs:{operation}"}
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.fault("A01")
@pytest.mark.parametrize("operation", range(1, NUM_OPERATIONS + 1))
def test_a_kill_between_any_two_operations_leaves_old_or_new(
    tmp_path: Path, operation: int
) -> None:
    target = tmp_path / "out"
    with storage.new_folder(target, kind="thing") as folder:
        (folder / "a").write_text("old")
    lines = storage.JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    assert killed_at(tmp_path, operation).returncode == -9
    storage.sweep(tmp_path)
    storage.verify_folder(target)
    assert (target / "a").read_text() in ("old", "new")
    assert lines.read() == [{"step": 1}]
    assert names(tmp_path) == ["metrics.jsonl", "out"]


def test_a_kill_in_the_middle_leaves_half_a_file_or_line(tmp_path: Path) -> None:
    """The first operation is the middle of a file that the block wrote, the last one of a line."""
    killed_at(tmp_path, 1)
    [half] = tmp_path.glob(".out.partial-*/a")
    assert half.read_text() == "n"
    storage.sweep(tmp_path)
    with storage.new_folder(tmp_path / "out", kind="thing") as folder:
        (folder / "a").write_text("old")
    assert killed_at(tmp_path, NUM_OPERATIONS).returncode == -9
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2, "cr'
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "out")
    with storage.new_folder(tmp_path / "out", kind="thing") as folder:
        (folder / "a").write_text("old")
    assert killed_at(tmp_path, NUM_OPERATIONS + 1).stdout == f"{NUM_OPERATIONS}\n"


@pytest.mark.fault("B09")
def test_everything_is_staged_beside_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small or foreign TMPDIR does not matter."""
    monkeypatch.setenv("TMPDIR", "/dev/full")
    seen = []
    with storage.new_folder(tmp_path / "out", kind="thing") as folder:
        seen.append(folder.parent)
        storage.write_text(folder / "a", "x")
    assert seen == [tmp_path]
    storage.verify_folder(tmp_path / "out")
