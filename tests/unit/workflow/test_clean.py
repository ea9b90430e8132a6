"""Step 02 on several processes, on Ray and on Slurm, and what it says where it cannot."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.workflow.forked import was_killed
from tests.unit.workflow.test_prepare import make_recipe

from sevenfold.base import storage
from sevenfold.base.errors import RunInUseError, SevenfoldError, UsageError
from sevenfold.base.records import Run
from sevenfold.data import clean as documents
from sevenfold.data.clean import CleanConfig, read_shards
from sevenfold.data.sources import source_from_path
from sevenfold.workflow import executors, flags, prepare, workers
from sevenfold.workflow.workers import Workers

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]
SETTINGS: dict[str, Any] = {
    "min_characters": 10,
    "document_characters": 2000,
    "unicode_form": "NFC",
    "repair": True,
    "languages": None,
    "quality": (),
    "mask_pii": True,
    "deduplicate": "minhash",
}


def texts(count: int) -> list[str]:
    """Return texts of which every seventh repeats one before it, and some hold an address."""
    random = np.random.default_rng(5)
    made = [" ".join(random.choice(WORDS, 90)) for _ in range(count)]
    for number in range(7, count, 7):
        made[number] = f"{made[number - 3].upper()} and so on"
    for number in range(0, count, 10):
        made[number] += f" Write to tom{number}@mail.example.org."
    made[-1] = made[0]
    return made


def recipe(folder: Path, count: int, **changed: Any) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "texts.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in texts(count)]
    path.write_text("".join(lines), encoding="utf-8")
    found = make_recipe(sources=(source_from_path(path),), village=None, validation_fraction=0.1)
    found.clean = CleanConfig(**SETTINGS | changed)
    return found


def download(folder: Path, wanted: Any, shard_bytes: int) -> Run:
    """Return a run whose raw texts lie in shards of so many bytes."""
    run = Run(folder=folder, facts={})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(documents, "SHARD_BYTES", shard_bytes)
        prepare.download(run, wanted)
    return run


def fingerprint(run: Run) -> str:
    return str(storage.verify_folder(run.data("clean"))["fingerprint"])


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A run of five raw shards, cleaned in this process; tests must not change it."""
    folder = tmp_path_factory.mktemp("cleaned")
    wanted = recipe(folder, 140)
    run = download(folder / "run", wanted, 12_000)
    assert len(list(run.data("raw").glob("documents-*"))) == 6
    prepare.clean(run, wanted)
    return run, wanted


def small(folder: Path) -> tuple[Run, Any]:
    """Return a run of two small raw shards that are not clean yet."""
    wanted = recipe(folder, 20)
    run = download(folder / "run", wanted, 6_000)
    assert len(list(run.data("raw").glob("documents-*"))) == 2
    return run, wanted


def beside(cleaned: tuple[Run, Any], folder: Path) -> tuple[Run, Any]:
    shutil.copytree(cleaned[0].data("raw"), folder / "data/raw")
    return Run(folder=folder, facts={}), cleaned[1]


def test_what_is_kept_dropped_and_masked_is_counted_by_source(cleaned: tuple[Run, Any]) -> None:
    manifest = storage.verify_folder(cleaned[0].data("clean"))
    assert manifest["dropped"] == {"duplicate": 1, "near_duplicate": 19}
    assert sum(manifest["documents"].values()) == 120
    assert manifest["pii"]["email"] == 13  # 70 repeats an earlier text
    assert manifest["by_source"] == {
        "texts": {
            name: manifest[name]
            for name in ("documents_read", "documents", "characters", "bytes", "dropped", "pii")
        }
    }
    assert len(manifest["dropped_examples"]["near_duplicate"]) == 3
    kept = [d for split in documents.SPLITS for d in read_shards(cleaned[0].data("clean"), split)]
    assert all("masked" not in document for document in kept)
    assert sum("<EMAIL>" in document["text"] for document in kept) == 13


def test_nothing_is_left_beside_the_result(cleaned: tuple[Run, Any]) -> None:
    names = sorted(path.name for path in cleaned[0].data("clean").parent.iterdir())
    assert names == ["clean", "raw"]


def test_four_processes_give_the_same_shards(cleaned: tuple[Run, Any], tmp_path: Path) -> None:
    run, wanted = beside(cleaned, tmp_path / "run")
    prepare.clean(run, wanted, Workers(count=4))
    assert fingerprint(run) == fingerprint(cleaned[0])
    assert signal_at_our_end() == 0  # what training forks later is not the cleaning's


def signal_at_our_end() -> int:
    """Return the signal that a process forked here gets from the kernel when we end, or 0."""
    child = os.fork()
    if not child:
        found = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
        os._exit(found.value)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_ray_gives_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    run, wanted = small(tmp_path)
    prepare.clean(run, wanted)
    expected = fingerprint(run)
    shutil.rmtree(run.data("clean"))
    monkeypatch.chdir(tmp_path)
    run = Run(folder=Path("run"), facts={})
    monkeypatch.setattr(ray, "init", functools.partial(begin_elsewhere, ray.init))
    with warnings.catch_warnings():  # what Ray warns of would end a thread that Ray waits for
        warnings.simplefilter("ignore")
        prepare.clean(run, wanted, Workers(count=2, executor="ray"))
    assert fingerprint(run) == expected


def begin_elsewhere(begin: Any, **settings: Any) -> Any:
    """Start Ray in another folder than ours, as a cluster's workers are."""
    with contextlib.chdir("/"):
        return begin(**settings)


def test_a_cluster_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def begin(**settings: Any) -> None:
        raise ConnectionError("Failed to connect\nto it")

    monkeypatch.setattr(ray, "init", begin)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    expected = r"RAY_ADDRESS=10.0.0.1:6379: no Ray .* \(Failed to connect to it\); start or correct"
    with pytest.raises(UsageError, match=expected):
        do(Workers(count=2, executor="ray"), tmp_path)


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
open({calls!r}, "a").write(script)
last = int(re.search(r"--array=0-(\\d+)", script)[1])
if "launch_pickled_pipeline" in script:
    for number in range(last + 1):
        told = dict(os.environ, SLURM_ARRAY_TASK_ID=str(number), RUN_OFFSET="0", SLURM_NODELIST="a")
        subprocess.run(["bash", "-c", script], env=told, check=True, capture_output=True)
print("Submitted batch job 7")
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" != launch* ]]; do shift; done\nexec "$@"\n'


def test_slurm_is_asked_for_an_array_of_tasks_and_waited_for(
    cleaned: tuple[Run, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sbatch` and `srun` are stand-ins that do the job's script here, one task after another."""
    calls = tmp_path / "calls"
    for name, text in (
        ("sbatch", SBATCH.format(python=sys.executable, calls=str(calls))),
        ("srun", SRUN),
        ("scontrol", "#!/bin/bash\necho here\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    wanted = recipe(tmp_path / "small", 20)
    run = download(tmp_path / "run", wanted, 100_000)
    prepare.clean(run, wanted, Workers(count=3, executor="slurm", partition="cpu"))
    scripts = calls.read_text(encoding="utf-8")
    for line in ("partition=cpu", "array=0-0%3", "wait", "job-name=sevenfold-written"):
        assert f"#SBATCH --{line}\n" in scripts
    again = download(tmp_path / "again", wanted, 100_000)
    prepare.clean(again, wanted)
    assert fingerprint(run) == fingerprint(again)


def test_killed_anywhere_it_ends_with_the_same_shards(tmp_path: Path) -> None:
    run, wanted = small(tmp_path)
    prepare.clean(run, wanted)
    expected = fingerprint(run)

    operation = 1
    while True:
        shutil.rmtree(run.data("clean"))
        if not was_killed(lambda: prepare.clean(run, wanted), at=operation):
            break
        prepare.clean(run, wanted)
        assert fingerprint(run) == expected
        assert sorted(p.name for p in run.data("raw").parent.iterdir()) == ["clean", "raw"]
        operation += 9  # each of them takes a minute; test_prepare kills one shard's everywhere
    assert operation > 100


def test_what_was_done_before_a_stop_is_not_done_again(
    cleaned: tuple[Run, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wanted = beside(cleaned, tmp_path / "run")
    examined = []

    def examine(job: Any, task: int) -> None:
        examined.append(job.is_done(task, "examined"))
        if task == 3 and not any(examined):
            raise KeyboardInterrupt
        manifest = job.part(task, "examined") / storage.MANIFEST
        before = manifest.stat().st_ino if examined[-1] else None
        real(job, task)
        assert before in (None, manifest.stat().st_ino)

    real = prepare.clean.__globals__["cleaning"].examine
    monkeypatch.setattr(prepare.clean.__globals__["cleaning"], "examine", examine)
    with pytest.raises(KeyboardInterrupt):
        prepare.clean(run, wanted)
    prepare.clean(run, wanted)
    assert examined == [False] * 4 + [True] * 3 + [False] * 3
    assert fingerprint(run) == fingerprint(cleaned[0])


def test_what_a_stop_left_is_cleared_away(
    cleaned: tuple[Run, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wanted = beside(cleaned, tmp_path / "run")

    def left() -> list[str]:
        return sorted(path.name[:9] for path in run.data("raw").parent.iterdir())

    with monkeypatch.context() as patched:  # as if killed before the work folder is removed
        patched.setattr(storage, "remove_folder", lambda _: None)
        prepare.clean(run, wanted)
    assert left() == [".cleaning", "clean", "raw"]
    prepare.clean(run, wanted)
    assert left() == ["clean", "raw"]
    storage.write_text(run.data("raw").parent / ".cleaning-of-other-settings/a", "")
    shutil.rmtree(run.data("clean"))
    prepare.clean(run, wanted)
    assert left() == ["clean", "raw"]


@pytest.mark.parametrize(
    ("changed", "package"),
    [
        ({"repair": True}, "ftfy"),
        ({"languages": ("en",)}, "py3langid"),
        ({"quality": ("c4",)}, "datatrove"),
        ({"mask_pii": True}, "datatrove"),
        ({"deduplicate": "minhash"}, "rensa"),
    ],
)
def test_a_missing_package_is_named_with_the_setting_that_wants_it(
    cleaned: tuple[Run, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    package: str,
) -> None:
    run, wanted = beside(cleaned, tmp_path / "run")
    nothing = {"repair": False, "mask_pii": False, "deduplicate": "exact"}
    wanted.clean = CleanConfig(**SETTINGS | nothing | changed)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else found(n))
    (setting,) = changed
    advice = rf"clean\.{setting} needs the package '{package}'.*pip install -e '\.\[data\]'"
    try:
        with pytest.raises(UsageError, match=advice):
            prepare.clean(run, wanted)
    finally:
        wanted.clean = CleanConfig(**SETTINGS)
    assert [path.name for path in run.data("raw").parent.iterdir()] == ["raw"]


def do(asked: Workers, tmp_path: Path, perform: Any = str) -> None:
    workers.do_tasks(
        perform, name="test", folders=[tmp_path / "0"], workers=asked, logs=tmp_path / "logs"
    )


@pytest.mark.parametrize("package", ["datatrove", "ray"])
def test_a_missing_executor_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else found(n))
    with pytest.raises(UsageError, match=rf"--executor ray needs the package '{package}'"):
        do(Workers(count=2, executor="ray"), tmp_path)


def test_tasks_that_were_not_done_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "run_tasks", lambda *_: None)
    with pytest.raises(SevenfoldError, match=r"1 of 1 tasks of 'test' were not done") as error:
        do(Workers(count=2), tmp_path)
    assert "run the same command again to go on" in str(error.value)


def refuse(task: int) -> None:
    raise SevenfoldError(f"task {task}: the disk is full; make room")


def test_what_a_task_says_in_another_process_comes_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SevenfoldError, match="task 0: the disk is full; make room"):
        do(Workers(count=2), tmp_path, refuse)
    assert "Traceback" not in capfd.readouterr().err


SLEEPERS = """
import sys, time
from pathlib import Path
from sevenfold.base import storage
from sevenfold.workflow import workers
if __name__ == "__main__":
    run = Path(sys.argv[1])
    with storage.lock_run(run):
        asked = workers.Workers(count=2)
        folders = [run / str(n) for n in range(60)]
        workers.do_tasks(time.sleep, name="s", folders=folders, workers=asked, logs=run / "logs")
"""


def test_killed_with_its_workers_it_leaves_the_run_unlocked(tmp_path: Path) -> None:
    script, run = tmp_path / "sleepers.py", tmp_path / "run"
    script.write_text(SLEEPERS, encoding="utf-8")
    source = str(Path(__file__).parents[3] / "src")
    with subprocess.Popen(
        [sys.executable, str(script), str(run)],
        env=os.environ | {"PYTHONPATH": source},
        stderr=subprocess.DEVNULL,
    ) as running:
        deadline = time.monotonic() + 60
        while not (run / "logs/completions/00000").exists():  # one has ended, others sleep
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(RunInUseError), storage.lock_run(run):
            pass
        running.kill()
    time.sleep(0.5)
    with storage.lock_run(run):
        pass


def test_slurm_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"in which partition\? give --partition NAME"):
        do(Workers(executor="slurm"), tmp_path)
    asked = Workers(executor="slurm", partition="cpu")
    with pytest.raises(UsageError, match=r"there is no 'sbatch' here; run it where jobs are"):
        do(asked, tmp_path)
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexit 3\n", encoding="utf-8")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SevenfoldError, match=r"sbatch ended with 3: .* run the same command again"):
        do(asked, tmp_path)


def test_flags_say_who_works() -> None:
    given = ["--workers", "3", "--executor", "slurm", "--partition", "cpu"]
    _, options = flags.parse(given, verb="clean", program="02")
    assert workers.from_flags(options) == Workers(count=3, executor="slurm", partition="cpu")
    _, options = flags.parse(["--partition", "cpu"], verb="clean", program="02")
    with pytest.raises(UsageError, match=r"--partition is Slurm's; add --executor slurm"):
        workers.from_flags(options)
