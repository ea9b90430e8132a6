"""Training on several nodes under Slurm, with stand-ins for `srun` and `scontrol`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "scripts/slurm_train.sbatch"
# Two nodes of four GPUs; the stand-in for srun is the sixth process: the second of the second node.
SLURM = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "node[3-4]",
    "SLURM_GPUS_ON_NODE": "4",
}
TASK = "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_NNODES=2"
STAND_INS = {
    "scontrol": """
case $1 in
show) printf 'node3\\nnode4\\n' ;;
*) echo "$@" >> "$NOTES/scontrol" ;;
esac""",
    "srun": f"""
while [ "$1" != bash ]; do echo "$1" >> "$NOTES/srun"; shift; done
export {TASK}
exec "$@" """,
    "python": """
echo "$@" > "$NOTES/python"
env | grep -E '^(MASTER_|RANK|LOCAL_|WORLD_)' | sort >> "$NOTES/python"
trap 'sleep 0.3; exit 75' TERM
touch "$NOTES/started"
while [ -n "${LASTING:-}" ]; do sleep 0.1; done
exit "$CODE" """,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What Slurm sets, and a PATH with the stand-ins, which write to tmp_path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash{text}\n")
        (programs / name).chmod(0o755)
    found = {name: text for name, text in os.environ.items() if name != "PYTHON"}
    path = f"{programs}:{os.environ['PATH']}"
    return {**found, **SLURM, "PATH": path, "NOTES": str(tmp_path), "CODE": "0"}


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_one_process_a_gpu_meets_on_the_first_node(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = submit(environment, "pretrain", "--preset", "7b", "--set", "tracking=none or so")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "srun").read_text().split()
    assert {"--ntasks-per-node=4", "--gpu-bind=none"} <= set(asked)
    # Else srun kills all others when the first ends with 75, and ends with 137. One that fails
    # leaves others waiting for it, so they are not left alone for ever.
    assert {"--kill-on-bad-exit=0", "--wait=300"} <= set(asked)
    assert (tmp_path / "python").read_text().splitlines() == [
        "-m sevenfold.workflow.cli pretrain --preset 7b --set tracking=none or so",
        "LOCAL_RANK=1",
        "LOCAL_WORLD_SIZE=4",
        "MASTER_ADDR=node3",
        "MASTER_PORT=21234",
        "RANK=5",
        "WORLD_SIZE=8",
    ]
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("code", ["1", "6", "75", "76", "137"])
def test_only_what_was_stopped_is_queued_again(
    environment: dict[str, str], tmp_path: Path, code: str
) -> None:
    assert submit({**environment, "CODE": code}, "sft").returncode == int(code)
    noted = tmp_path / "scontrol"
    assert (noted.read_text() if noted.exists() else "") == (
        "requeue 41234\n" if code == "75" else ""
    )


@pytest.mark.fault("A05")
def test_when_the_time_is_up_all_save_before_the_job_is_queued_again(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Slurm tells the batch script alone."""
    job = subprocess.Popen(["bash", SCRIPT, "dpo"], env={**environment, "LASTING": "yes"})
    for _ in range(200):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 75
    assert (tmp_path / "scontrol").read_text() == "requeue 41234\n"


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        # Slurm runs a copy, whose path tells a user nothing.
        ([], "usage: sbatch scripts/slurm_train.sbatch pretrain|sft|dpo|lora [options"),
        (["chat"], "pretrain|sft|dpo|lora [options of the stage]"),
        (["pretrain", "--no-resume"], "start afresh each time; leave it out"),
    ],
)
def test_what_cannot_go_on_is_refused(
    environment: dict[str, str], tmp_path: Path, arguments: list[str], advice: str
) -> None:
    done = submit(environment, *arguments)
    assert done.returncode == 2
    assert advice in done.stderr
    assert not (tmp_path / "srun").exists()


def test_outside_slurm_it_says_what_to_do(environment: dict[str, str]) -> None:
    del environment["SLURM_GPUS_ON_NODE"]
    done = submit(environment, "pretrain")
    assert done.returncode != 0
    assert "start this with sbatch, and ask for --gpus-per-node" in done.stderr
