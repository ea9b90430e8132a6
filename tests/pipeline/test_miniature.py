"""All steps through the command line on a miniature: kills, resumes, and every exit code.

The whole run, a stage that goes on elsewhere and what ends before it imports much are started as
people start them; the others are forks of a process that has imported what they need.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.pipeline.miniature import (
    STAGES,
    fingerprint,
    forked,
    losses,
    sevenfold,
    without,
    write_gates,
    write_recipe,
)

from sevenfold.verify.integrity import IN_RUN, IN_STAGE, NOT_COVERED, NOT_MISSED, examine
from sevenfold.workflow import cli


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = sevenfold(
        "run", "--config", write_recipe(folder), "--run", folder / "run",
        "--gates", write_gates(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to be spoilt."""
    shutil.copytree(unbroken, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def test_the_whole_run_leaves_what_is_promised(unbroken: Path) -> None:
    run = unbroken / "run"
    for stage in STAGES:
        names = {path.name for path in (run / stage).iterdir()}
        assert {
            "checkpoints", "model", "metrics.jsonl", "evaluation.json", "verdict.json",
            "record.json",
        } <= names  # fmt: skip
        assert len(list((run / stage / "checkpoints").iterdir())) == 3
        assert json.loads((run / stage / "verdict.json").read_text())["promoted"] is True
    assert (run / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert "</html>" in (run / "report.html").read_text()
    assert not list(run.rglob(".*.partial-*"))


@pytest.mark.fault("C17")
def test_the_same_command_again_does_nothing(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    again = forked("run", "--run", copy, "--gates", copy.parent / "gates.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already finished") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}


@pytest.mark.fault("A02", "A05", "C01", "K10")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["kill@step=9", "term@step=6:phase=backward"])
def test_stopped_in_a_step_the_same_command_ends_with_the_same_model(
    copy: Path, unbroken: Path, stage: str, fault: str
) -> None:
    """The second time from another folder, with the run named from there.

    Killed in step 9, the checkpoint of step 8 may or may not have been written already.
    """
    without(copy, stage)
    stopped = forked(stage, "--run", copy, faults=fault)
    killed = fault.startswith("kill")
    assert stopped.returncode == (-signal.SIGKILL if killed else 75), stopped.stderr
    assert examine(copy).problems == {}
    again = forked(stage, "--run", copy.name, cwd=copy.parent)
    assert again.returncode == 0, again.stderr
    assert examine(copy).problems == {}
    assert re.search(f"resuming from step {'[48]' if killed else '6'} of", again.stdout)
    assert losses(copy, stage) == losses(unbroken / "run", stage)
    assert fingerprint(copy, stage) == fingerprint(unbroken / "run", stage)


@pytest.fixture(scope="module")
def whole(unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the whole run with one checkpoint a stage, whose files are put back as they were.

    Beside it logs of wandb and TensorBoard, as runs with them have one.
    """
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(unbroken / "run", run)
    assert cli.execute(["checkpoints", str(run), "--prune", "1"]) == 0
    for name in ("wandb", "tensorboard"):
        (run / name).mkdir()
        (run / name / "log").write_bytes(b"anything")
    assert cli.execute(["verify", str(run)]) == 0
    return run


SEALED = IN_RUN | IN_STAGE | {"manifest.json", "README.md"}


def files_of(run: Path) -> list[Path]:
    return [path for path in sorted(run.rglob("*")) if path.is_file()]


def is_left_out(path: Path, run: Path) -> bool:
    """True of what docs and code say is not looked at: three names, each with its reason."""
    assert set(NOT_COVERED) == {".", "wandb", "tensorboard"}
    return path.relative_to(run).parts[0] in (".lock", "wandb", "tensorboard")


def verify(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.execute(["verify", str(run)])
    printed = capsys.readouterr()
    return code, re.sub(r"\s", "", printed.out + printed.err)


@pytest.mark.fault("K07")
def test_one_flipped_bit_anywhere_is_named(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every file; of those with a seal, or checksums in their lines, in an end as well."""
    draw = random.Random(20261123)
    covered = [path for path in files_of(whole) if not is_left_out(path, whole)]
    # Nothing ran out of memory here, so nothing was decided that a resume has to know; and no
    # judge was asked.
    assert SEALED - {path.name for path in covered} == {"recovery.json", "judge.json"}
    for path in covered:
        data = path.read_bytes()
        inside = [draw.randrange(len(data)) for _ in range(2 if len(data) > 100_000 else 1)]
        ends = [draw.choice((0, len(data) - 1))] if path.name in SEALED else []
        for place in {*inside, *ends}:
            changed = bytearray(data)
            changed[place] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            code, printed = verify(whole, capsys)
            assert code == (5 if "checkpoints" in path.parts else 4), (path, place)
            assert str(path) in printed, (path, place)
        path.write_bytes(data)
    assert verify(whole, capsys)[0] == 0


def test_a_file_that_is_missing_is_named(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missed = []
    for path in files_of(whole):
        data = path.read_bytes()
        path.unlink()
        found = examine(whole).problems
        if str(path) not in " ".join(map(str, found.values())):
            missed.append(path)
        path.write_bytes(data)
    left = {path.name for path in missed if not is_left_out(path, whole)}
    assert left == {*NOT_MISSED, "run.json"}
    (whole / "run.json").rename(whole.parent / "run.json")
    assert verify(whole, capsys)[0] == 2
    (whole.parent / "run.json").rename(whole / "run.json")
    assert verify(whole, capsys)[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", "sft/notes.json", "sft/model/more.safetensors", "data/clean/train-9.jsonl.zst",
        "data/more/rows.jsonl", "dpo/checkpoints/note", "run2/run.json",
    ],
)  # fmt: skip
def test_a_file_too_many_is_named(
    whole: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole / name
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    code, printed = verify(whole, capsys)
    path.unlink()
    for folder in made:
        folder.rmdir()
    assert code == (5 if "checkpoints" in name else 4)
    assert str(path) in printed or str(path.parent / "manifest.json") in printed


def test_stopped_in_the_last_step_the_stage_is_finished_and_the_run_stops(copy: Path) -> None:
    without(copy, "dpo")
    stopped = forked("dpo", "--run", copy, faults="term@step=9")
    assert stopped.returncode == 75
    assert "dpo is finished and saved" in stopped.stderr
    assert forked("dpo", "--run", copy).returncode == 0


@pytest.mark.fault("A02", "C14", "J02")
@pytest.mark.parametrize("operation", [5, 19, 33, 47])
def test_killed_at_a_file_operation_the_same_command_ends_with_the_same_model(
    copy: Path, unbroken: Path, operation: int
) -> None:
    without(copy, "lora")
    stopped = forked("lora", "--run", copy, faults=f"kill@fs:{operation}")
    assert stopped.returncode == -signal.SIGKILL
    again = forked("lora", "--run", copy)
    assert again.returncode == 0, again.stderr
    assert fingerprint(copy, "lora") == fingerprint(unbroken / "run", "lora")
    assert losses(copy, "lora") == losses(unbroken / "run", "lora")
    assert not list((copy / "lora").rglob(".*.partial-*"))


def test_a_finished_model_that_was_damaged_is_made_again(copy: Path, unbroken: Path) -> None:
    path = copy / "sft" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = forked("sft", "--run", copy)
    assert again.returncode == 0, again.stderr
    assert "model.safetensors" in again.stderr
    assert "made again from the last checkpoint" in again.stderr
    assert "resuming from step 10 of 10" in again.stdout
    assert fingerprint(copy, "sft") == fingerprint(unbroken / "run", "sft")


ELSEWHERE = """
import socket, sys, time
now = time.time
time.time = lambda: now() - 86_400
socket.gethostname = lambda: "another-host"
from sevenfold.workflow import cli
cli.main()
"""


@pytest.mark.fault("K10")
def test_moved_to_another_place_host_time_zone_and_day_a_stage_goes_on(
    copy: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(copy, "sft")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    assert sevenfold("sft", "--run", copy, faults="term@step=8").returncode == 75
    moved = copy.parent.parent / "moved"
    copy.parent.rename(moved)
    checkpoints = sorted((moved / "run" / "sft" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    for path in (moved / "run" / "sft").rglob("*"):
        assert path.is_dir() or str(copy.parent).encode() not in path.read_bytes(), path
    for number, path in enumerate(reversed(checkpoints)):
        os.utime(path, (2e9 + number, 2e9 + number))
    monkeypatch.setenv("TZ", "Pacific/Apia")
    again = sevenfold("sft", "--run", moved / "run", program=("-c", ELSEWHERE))
    assert again.returncode == 0, again.stderr
    assert "resuming from step 8" in again.stdout
    assert losses(moved / "run", "sft") == losses(unbroken / "run", "sft")
    assert fingerprint(moved / "run", "sft") == fingerprint(unbroken / "run", "sft")


@pytest.mark.fault("L06")
def test_no_secret_of_the_environment_is_kept(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "CANARY7d1f"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD"):
        monkeypatch.setenv(name, f"{canary}-{name}".ljust(40, "0"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{canary}@127.0.0.1:9")
    without(copy, "lora")
    said = []
    for arguments in (
        ("run", "--from", "lora", "--gates", copy.parent / "gates.yaml", "--set", "tracking=wandb"),
        ("lora", "--run", copy, "--debug", "--set", f"sft.data.replay=https://u:{canary}@host/x"),
        ("download", "--source", f"https://u:{canary}@host/x"),
    ):
        done = forked(*arguments, *(() if "--run" in arguments else ("--run", copy)))
        said.append(done.stdout + done.stderr)
        assert canary not in said[-1]
        assert done.returncode == (2 if len(said) > 1 else 0), said[-1]
    kept = [path for path in copy.rglob("*") if path.is_file()]
    assert {".wandb", ".html", ".json", ".jsonl", ".safetensors"} <= {p.suffix for p in kept}
    assert [path for path in kept if canary.encode() in path.read_bytes()] == []


# --- exit codes


@pytest.mark.fault("K01")
def test_2_an_unknown_key_comes_with_the_nearest(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, sead=3)
    asked = sevenfold("download", "--config", path, "--run", tmp_path / "run")
    assert asked.returncode == 2
    assert "sead: unknown key; did you mean 'seed'?" in asked.stderr
    assert len(asked.stderr.strip().split("\n")) == 1
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.fault("K04")
def test_2_a_misspelt_metric_is_refused_before_training(copy: Path, tmp_path: Path) -> None:
    without(copy, "pretrain")
    gates = json.loads((copy.parent / "gates.yaml").read_text())
    gates["custom"]["lora"][0]["metric"] = "bits_per_bite"
    (tmp_path / "gates.yaml").write_text(json.dumps(gates))
    asked = sevenfold("run", "--run", copy, "--gates", tmp_path / "gates.yaml")
    assert asked.returncode == 2
    assert "bits_per_bite" in asked.stderr
    assert "did you mean 'bits_per_byte'" in asked.stderr
    assert not (copy / "pretrain").exists()


@pytest.mark.fault("K09")
def test_2_another_preset_than_the_runs(copy: Path) -> None:
    asked = sevenfold("sft", "--run", copy, "--preset", "demo")
    assert asked.returncode == 2
    assert "made with preset 'custom', not 'demo'" in asked.stderr


@pytest.mark.fault("K09")
def test_2_a_changed_setting_of_a_finished_stage_is_named(copy: Path) -> None:
    asked = forked("dpo", "--run", copy, "--set", "dpo.beta=0.5")
    assert asked.returncode == 2
    assert "config.beta 0.1, now it is 0.5" in asked.stderr
    assert "--no-resume" in asked.stderr


def test_3_a_stage_without_a_verdict_before_it(copy: Path) -> None:
    without(copy, "sft")
    (copy / "pretrain" / "verdict.json").unlink()
    asked = forked("sft", "--run", copy)
    assert asked.returncode == 3
    assert "run scripts/11_evaluate.py pretrain, then scripts/12_check_gates.py" in asked.stderr
    assert not (copy / "sft").exists()


def test_3_a_verdict_that_was_edited(copy: Path) -> None:
    without(copy, "sft")
    path = copy / "pretrain" / "verdict.json"
    path.write_text(path.read_text().replace('"confidence": 0.95', '"confidence": 0.96') + " ")
    asked = forked("sft", "--run", copy)
    assert asked.returncode == 3
    assert "changed after the gate wrote it" in asked.stderr


@pytest.mark.fault("K13")
def test_3_a_refusing_gate_stops_the_run_and_force_is_recorded(copy: Path) -> None:
    without(copy, "sft")
    strict = write_gates(copy.parent, limit=0.001)
    refused = forked("run", "--run", copy, "--gates", strict, "--until", "sft")
    assert refused.returncode == 3
    assert (copy / "report.html").is_file()
    forced = forked("run", "--run", copy, "--gates", strict, "--force", "only a trial")
    assert forced.returncode == 0, forced.stderr
    for stage, count in (("sft", 1), ("dpo", 2), ("lora", 3)):
        record = json.loads((copy / stage / "record.json").read_text())
        assert len(record["forced_promotions"]) == count
        assert record["forced_promotions"][0] == {"stage": "pretrain", "reason": "only a trial"}
    assert "only a trial" in (copy / "report.html").read_text()


@pytest.mark.fault("B02")
def test_4_a_flipped_bit_in_a_promoted_model(copy: Path) -> None:
    without(copy, "sft")
    path = copy / "pretrain" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    asked = forked("sft", "--run", copy)
    assert asked.returncode == 4
    assert "model.safetensors: its SHA-256 is not the manifest's" in asked.stderr


def test_4_an_id_outside_the_vocabulary_in_data_of_ones_own(tmp_path: Path) -> None:
    rows = np.ones((6, 128), dtype=np.int64)
    rows[4, 7] = 512
    (tmp_path / "packed").mkdir()
    np.save(tmp_path / "packed" / "mine.npy", rows)
    asked = forked(
        "pretrain", "--config", write_recipe(tmp_path), "--run", tmp_path / "run",
        "--data", tmp_path / "packed",
    )  # fmt: skip
    assert asked.returncode == 4
    assert "mine.npy: id 512 at (4, 7)" in asked.stderr
    assert not (tmp_path / "run" / "pretrain").exists()


def test_0_packed_ids_of_ones_own_train_without_steps_01_to_03(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 512, (40, 128))
    (tmp_path / "packed").mkdir()
    np.save(tmp_path / "packed" / "mine.npy", rows)
    done = forked(
        "pretrain", "--config", write_recipe(tmp_path), "--run", tmp_path / "run",
        "--data", tmp_path / "packed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "pretrain" / "model" / "model.safetensors").is_file()


def test_4_an_empty_message_names_file_line_and_field(copy: Path, tmp_path: Path) -> None:
    good = {
        "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    }
    bad = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": ""}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good, bad)))
    before = (copy / "data" / "sft" / "manifest.json").read_bytes()
    asked = forked("prepare-sft", "--run", copy, "--source", path)
    assert asked.returncode == 4
    assert "rows.jsonl:3:messages" in asked.stderr
    assert (copy / "data" / "sft" / "manifest.json").read_bytes() == before


@pytest.mark.fault("B01", "B04")
def test_5_all_checkpoints_damaged(copy: Path) -> None:
    without(copy, "sft")
    assert forked("sft", "--run", copy, faults="kill@step=9").returncode == -signal.SIGKILL
    for path in (copy / "sft" / "checkpoints").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    asked = forked("sft", "--run", copy)
    assert asked.returncode == 5
    assert "every checkpoint is damaged" in asked.stderr
    assert forked("sft", "--run", copy).returncode == 5
    assert "--no-resume" in asked.stderr


@pytest.mark.fault("D01")
def test_6_numbers_that_are_not_finite(copy: Path) -> None:
    without(copy, "dpo")
    asked = forked("dpo", "--run", copy, faults="nan@step=3")
    assert asked.returncode == 6
    assert "smaller schedule.peak_lr" in asked.stderr


@pytest.mark.fault("E02")
def test_7_out_of_memory_at_micro_batch_one(copy: Path) -> None:
    without(copy, "lora")
    asked = forked("lora", "--run", copy, "--enable-oom-recovery", faults="oom@step=2:times=9")
    assert asked.returncode == 7
    assert "out of memory at micro-batch 1 (step 2, seq_len 128" in asked.stderr


@pytest.mark.fault("K08")
def test_8_a_run_in_use(copy: Path) -> None:
    from sevenfold.base.storage import lock_run

    with lock_run(copy):
        asked = sevenfold("lora", "--run", copy)
    assert asked.returncode == 8
    assert "in use by process" in asked.stderr


@pytest.mark.fault("J01")
def test_adapter_and_merged_model_agree_in_a_process_of_their_own(unbroken: Path) -> None:
    """Transformers and PEFT read the folders without this package."""
    script = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
run = Path(sys.argv[1])
ids = torch.arange(5, 45)[None]
base = AutoModelForCausalLM.from_pretrained(run / "dpo" / "model")
merged = AutoModelForCausalLM.from_pretrained(run / "lora" / "model")
tokenizer = AutoTokenizer.from_pretrained(run / "lora" / "model")
plain = base(ids).logits
adapted = PeftModel.from_pretrained(base, run / "lora" / "adapter")
with torch.no_grad():
    difference = (adapted(ids).logits - merged(ids).logits).abs().max().item()
    change = (adapted(ids).logits - plain).abs().max().item()
print(json.dumps({"difference": difference, "change": change, "vocabulary": len(tokenizer)}))
"""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", script, str(unbroken / "run")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < 1e-4
    assert found["change"] > 1e-3
    assert found["vocabulary"] == 512
