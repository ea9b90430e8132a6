"""The command line: verbs, flags, exit codes, one-line errors, and answers that come at once."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sevenfold.base import records, storage
from sevenfold.base.errors import (
    BadDataError,
    CheckpointError,
    DivergedError,
    GateRefusedError,
    MemoryExhaustedError,
    RunInUseError,
    SevenfoldError,
    StoppedError,
    UsageError,
)
from sevenfold.workflow import cli, flags, steps
from sevenfold.workflow import recipe as recipes

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("[01][0-9]_*.py"))
# Two seconds are promised; the limit is wide because test machines are busy.
QUICK_S = 10.0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


Performing = Callable[[Callable[[argparse.Namespace], None]], None]


@pytest.fixture
def performing(monkeypatch: pytest.MonkeyPatch) -> Performing:
    """Put a function in place of what ``sevenfold clean`` does."""

    def put(function: Callable[[argparse.Namespace], None]) -> None:
        monkeypatch.setattr(steps, "clean", function)

    return put


def raising(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def perform(options: argparse.Namespace) -> None:
        raise error

    return perform


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (SevenfoldError, 1),
        (UsageError, 2),
        (GateRefusedError, 3),
        (BadDataError, 4),
        (CheckpointError, 5),
        (DivergedError, 6),
        (MemoryExhaustedError, 7),
        (RunInUseError, 8),
        (StoppedError, 75),
    ],
)
def test_every_error_is_one_line_and_its_exit_code(
    performing: Performing,
    capsys: pytest.CaptureFixture[str],
    kind: type[SevenfoldError],
    code: int,
) -> None:
    performing(raising(kind("what was found;\nwhat to do")))
    assert cli.execute(["clean"]) == code
    assert capsys.readouterr() == ("", "error: what was found; what to do\n")


def test_a_mistake_of_ours_is_called_one(
    performing: Performing, capsys: pytest.CaptureFixture[str]
) -> None:
    performing(raising(KeyError("lost")))
    assert cli.execute(["clean"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: KeyError: 'lost' (this is a mistake of Sevenfold's")
    assert printed.count("\n") == 1


def test_debug_shows_the_traceback_and_keeps_the_code(
    performing: Performing, capsys: pytest.CaptureFixture[str]
) -> None:
    performing(raising(BadDataError("row 7")))
    assert cli.execute(["clean", "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err
    cli.execute(["clean"])


def test_ctrl_c_says_how_to_go_on(
    performing: Performing, capsys: pytest.CaptureFixture[str]
) -> None:
    performing(raising(KeyboardInterrupt()))
    assert cli.execute(["clean"]) == 75
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no verb given; sevenfold --help lists"),
        ("pretrian", "verb 'pretrian' does not exist; did you mean 'pretrain'?"),
        ("pretrain --fp9", "flag '--fp9' does not exist; did you mean '--fp8'"),
        ("pretrain --pre demo", "flag '--pre' does not exist; did you mean '--preset'"),
        ("evaluate", "the following arguments are required: STAGE; sevenfold evaluate --help"),
        ("evaluate sfft", "'sfft' does not exist; did you mean 'sft'?"),
        ("check init", "'init' does not exist"),
        ("export runs/x pretrian out", "'pretrian' does not exist; did you mean 'pretrain'"),
        ("clean --preset", "--preset: expected one argument"),
        ("clean --preset smal", "no such preset; did you mean 'small'?"),
        ("clean --set seed", "--set seed: expected section.key=value"),
        ("download --source nowhere.txt", "nowhere.txt: no such file or folder"),
        ("report nowhere", "nowhere: no run here; name an existing one with --run"),
        ("run --from nowhere", "--from nowhere: no such step"),
        ("run --from dpo --until sft", "--until sft comes before --from dpo; exchange them"),
        ("clean", "not there yet, or not complete; run scripts/01_download_data.py first"),
        ("init", "run scripts/03_tokenize_and_pack.py first"),
        ("sft", "pretrain has not finished yet; run scripts/05_pretrain.py first"),
        ("evaluate dpo", "dpo has not finished yet; run scripts/09_dpo.py first"),
        ("check lora", "lora has not finished yet; run scripts/10_lora.py first"),
    ],
)
def test_what_is_asked_wrongly_ends_with_2(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert cli.execute(arguments.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert [path for path in place.rglob("*") if path.name not in ("runs", "demo", ".lock")] == []


@pytest.mark.parametrize("verb", flags.VERBS)
def test_every_verb_has_help_and_its_function(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.execute([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: sevenfold {verb} ")
    assert "exit codes:" in printed
    module, _, function = flags.VERBS[verb].perform.partition(":")
    source = (REPOSITORY / "src" / Path(*module.split("."))).with_suffix(".py").read_text()
    assert f"\ndef {function}(options: argparse.Namespace) -> None:" in source


COMMON = ("--preset", "--config", "--run", "--set", "--dry-run", "--debug")
TRAINING = ("--fp8", "--no-fp8", "--enable-oom-recovery", "--resume", "--no-resume")
TRAINING += ("--start-from", "--force")


@pytest.mark.parametrize(
    ("verb", "promised"),
    [
        *((verb, (*COMMON, "--source")) for verb in ("download", "prepare-sft", "prepare-dpo")),
        *((verb, COMMON) for verb in ("clean", "tokenize", "init", "evaluate", "check", "plan")),
        *((verb, (*COMMON, *TRAINING)) for verb in ("sft", "dpo", "lora")),
        ("pretrain", (*COMMON, *TRAINING, "--data")),
        ("run", (*COMMON, "--from", "--until", "--force")),
    ],
)
def test_the_promised_flags(
    verb: str, promised: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.execute([verb, "--help"])
    printed = capsys.readouterr().out
    for flag in promised:
        assert flag in printed, flag


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in flags.VERBS)
    assert cli.execute(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sevenfold ")


def test_a_dry_run_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a.txt").write_text("text")
    for line in ("download --source a.txt", "clean", "tokenize", "init", "prepare-sft", "sft"):
        assert cli.execute([*line.split(), "--dry-run"]) == 0, line
        assert "nothing was written" in capsys.readouterr().out
    assert [path.name for path in place.iterdir()] == ["a.txt"]


def test_a_dry_run_checks_the_inputs_that_are_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = Path("runs/demo/data/raw")
    assert cli.execute(["clean", "--dry-run"]) == 0
    assert f"{raw} is not there yet; nothing was written" in capsys.readouterr().out
    recipes.save(recipes.resolve()[0])
    with storage.new_folder(place / raw, kind="raw") as folder:
        (folder / "documents.jsonl").write_text("{}\n")
    assert cli.execute(["clean", "--dry-run"]) == 0
    assert "not there yet" not in capsys.readouterr().out
    (raw / "documents.jsonl").write_text("{]\n")
    assert cli.execute(["clean", "--dry-run"]) == 4
    assert "documents.jsonl: its SHA-256 is not the manifest's" in capsys.readouterr().err


def test_a_dry_run_names_the_items_that_a_run_would_miss(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = "[{name: validation, kind: text}, {name: x, kind: text, path: away.jsonl}]"
    asked = ["pretrain", "--preset", "custom", "--dry-run", "--set", f"evaluate.tasks={tasks}"]
    assert cli.execute(asked) == 0
    said = capsys.readouterr().out
    assert "needed before anything trains: away.jsonl (docs/DATA_FORMATS.md, section 7" in said
    (place / "away.jsonl").touch()
    assert cli.execute(asked) == 0
    assert "away.jsonl" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("pretrain --data nowhere", 2, "nowhere: no such folder"),
        ("pretrain --data packed", 4, "a.npy: id 99999 at (1, 2) is outside the vocabulary"),
        ("sft --start-from nowhere", 2, "no config.json; name a Hugging Face model folder"),
    ],
)
def test_a_dry_run_opens_what_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: str, code: int, message: str
) -> None:
    rows = np.zeros((4, 256), dtype=np.int64)
    rows[1, 2] = 99999
    (place / "packed").mkdir()
    np.save(place / "packed" / "a.npy", rows)
    assert cli.execute([*arguments.split(), "--dry-run"]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["packed"]


@pytest.mark.parametrize("flag", ["", " --no-resume"])
def test_a_stopped_stage_says_with_which_command_it_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """With --no-resume the same command would set the saved steps aside."""

    def call(module: str, function: str) -> Callable[..., None]:
        def perform(*anything: object) -> None:
            if function == "sft":
                raise StoppedError("run the same command again to go on")

        return perform

    monkeypatch.setattr(steps, "call", call)
    assert cli.execute(f"sft{flag}".split()) == 75
    said = "again to go on, without --no-resume this time" if flag else "again to go on"
    assert capsys.readouterr().err == f"error: run the same command {said}\n"


@pytest.mark.fault("K12")
def test_the_7b_without_a_gpu_says_what_it_needs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr("sevenfold.workflow.thresholds._find", lambda path: None)
    assert cli.execute(["run", "--preset", "7b", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert "plan of pretrain" in printed.out
    assert "before anything trains: data/pretrain/wikitext2_valid.txt, data/" in printed.out
    assert "data/safety/xstest_prompts.csv" in printed.out
    assert "no GPU on this machine: 7.39 B parameters need" in printed.err
    assert list(place.iterdir()) == []


@pytest.mark.fault("K03", "K12")
@pytest.mark.parametrize(
    "arguments",
    ["pretrain --fp8", "sft --fp8 --dry-run", "run --set dpo.train.precision=fp8"],
)
def test_fp8_without_its_gpu_is_refused_before_anything_is_read(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this machine's GPU computes in FP8")
    assert cli.execute(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: fp8 needs")
    assert said.endswith("use --no-fp8\n")
    kept = {path.name for path in place.rglob("*")}
    assert kept <= {"runs", "demo", ".lock"}


def test_a_source_stays_the_runs_source(place: Path) -> None:
    (place / "a.txt").write_text("A text that is long enough.\n" * 20)
    assert cli.execute(["download", "--source", "a.txt"]) == 0
    _, recipe = recipes.resolve()
    assert recipe.data.village is None
    assert [source.path for source in recipe.data.sources] == [str(place / "a.txt")]
    manifest = storage.read_manifest(Path("runs/demo/data/raw"))
    assert cli.execute(["download"]) == 0
    assert storage.read_manifest(Path("runs/demo/data/raw")) == manifest


def test_a_bad_source_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert cli.execute(["download", "--source", "a.jsonl"]) == 4
    assert "a.jsonl:2" in capsys.readouterr().err
    assert not (place / "runs/demo/run.json").exists()


@pytest.mark.fault("K08")
def test_a_run_in_use_ends_with_8(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with storage.lock_run(place / "runs/demo"):
        assert cli.execute(["clean"]) == 8
    assert "in use by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "stage", "override"),
    [
        ("--fp8", "pretrain", ["pretrain.precision=fp8"]),
        ("--no-fp8", "sft", ["sft.train.precision=bf16"]),
        ("", "dpo", []),
    ],
)
def test_fp8_flags(given: str, stage: str, override: list[str]) -> None:
    _, options = flags.parse([stage, *given.split()], verb=None, program="sevenfold")
    assert steps.precision_overrides(options, stage) == override


def test_one_process_per_gpu(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several GPUs the step is done again by as many processes; their exit code is ours."""
    from sevenfold.train import launch

    started: list[tuple[list[str], int]] = []

    def start(arguments: list[str], num_processes: int) -> int:
        started.append((arguments, num_processes))
        assert os.environ[steps.LOCK_HELD_VARIABLE] == str((place / "runs/demo").resolve())
        return 6

    monkeypatch.setattr(launch, "num_processes_to_start", lambda: 2)
    monkeypatch.setattr(launch, "launch", start)
    monkeypatch.setenv(steps.LOCK_HELD_VARIABLE, "")
    (place / "recipe.yaml").write_text("")
    line = ["sft", "--enable-oom-recovery", "--no-resume", "--force", "a test"]
    assert cli.execute(line) == 6
    assert "one of 2 processes ended with exit code 6" in capsys.readouterr().err
    arguments, num_processes = started[0]
    assert num_processes == 2
    assert arguments[:3] == ["-m", "sevenfold.workflow.cli", "sft"]
    assert arguments[3:] == [
        "--enable-oom-recovery", "--no-resume", "--force", "a test", "--run", "runs/demo",
    ]  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    assert steps._is_locked_for_us(Path("runs/demo"))


def test_a_dry_run_on_several_gpus_keeps_the_precision(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def on_all_gpus(arguments: list[str], run: object) -> bool:
        started.append(arguments)
        return True

    monkeypatch.setattr(steps, "on_all_gpus", on_all_gpus)
    assert cli.execute(["sft", "--no-fp8", "--set", "seed=4", "--dry-run"]) == 0
    expected = ["sft", "--dry-run", "--preset", "demo", "--no-fp8", "--set", "seed=4"]
    assert started == [expected]
    # All stages of a run are planned by the processes together; a script's is its own.
    assert cli.execute(["run", "--dry-run", "--from", "sft"]) == 0
    expected = ["run", "--from", "sft", "--until", "lora", "--dry-run", "--preset", "demo"]
    assert started[1:] == [expected]


def quick(command: list[str], *, code: int) -> str:
    started_s = time.monotonic()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    elapsed_s = time.monotonic() - started_s
    sys.stdout.write(f"{' '.join(map(str, command[1:]))}: {elapsed_s:.2f} s\n")
    assert answer.returncode == code, answer.stderr
    assert "Traceback" not in answer.stderr
    assert elapsed_s < QUICK_S
    return answer.stdout + answer.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_help_comes_at_once(script: Path) -> None:
    printed = quick([sys.executable, str(script), "--help"], code=0)
    assert printed.startswith(f"usage: {script.name} ")


def test_complaints_come_at_once(tmp_path: Path) -> None:
    script = str(REPOSITORY / "scripts/07_sft.py")
    printed = quick([sys.executable, script, "--set", "sft.beta=1", "--run", str(tmp_path)], code=2)
    assert "sft.beta: unknown key; did you mean 'dpo.beta'?" in printed


NOTHING_SLOW = """
import sys
from sevenfold.workflow import cli
code = cli.execute(sys.argv[1:])
slow = {"torch", "transformers", "datasets", "peft", "wandb", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {slow}" if slow else code)
"""


@pytest.mark.parametrize(
    "arguments", ["--help", "pretrain --help", "pretrain --set a=1", "clean --preset x", "chat"]
)
def test_help_and_complaints_import_nothing_slow(tmp_path: Path, arguments: str) -> None:
    command = [sys.executable, "-c", NOTHING_SLOW, *arguments.split()]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "imported" not in answer.stderr
    assert answer.returncode == (0 if "--help" in arguments else 2)


@pytest.mark.fault("K11")
def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "sevenfold.workflow.cli", "pretrain", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["production_pretrain", "full_model_pretrain"])
def test_deprecated_scripts_warn_and_call_the_new_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(REPOSITORY / f"scripts/{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(path, run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == (
        f"warning: scripts/{name}.py is deprecated; call scripts/05_pretrain.py\n"
    )
    assert "--enable-oom-recovery" in printed.out


@pytest.mark.fault("L11", "K12")
def test_an_old_torch_is_refused_before_it_is_imported(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(records.FLOORS, "torch", ("99.1", "CVE-0000-1: a hole"))
    assert cli.execute(["pretrain"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("at least 99.1 is needed (CVE-0000-1: a hole); pip install --upgrade "
                         "'torch>=99.1'\n")  # fmt: skip
    assert said.count("\n") == 1
    assert list(place.iterdir()) == []
    assert cli.execute(["pretrain", "--help"]) == 0
    assert cli.execute(["doctor"]) == 0


def test_the_kernel_set_up_is_importable_from_script_05() -> None:
    from sevenfold.model.kernels import setup_kernel_optimizations

    names = runpy.run_path(str(REPOSITORY / "scripts/05_pretrain.py"))
    assert names["setup_kernel_optimizations"] is setup_kernel_optimizations


@pytest.mark.fault("K11")
def test_a_closed_standard_error_is_no_error() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts/production_pretrain.py"), "--help"]
    answer = subprocess.run(
        command, stdout=subprocess.PIPE, check=False, preexec_fn=lambda: os.close(2)
    )
    assert answer.returncode == 0
    assert b"--enable-oom-recovery" in answer.stdout
