"""Benchmarks, each case on a model of a few thousand weights; and the rehearsal, which is one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sevenfold.base.errors import CheckpointError, DivergedError, StoppedError
from sevenfold.model import accumulating
from sevenfold.objective.next_token import NEXT_TOKEN, Objective
from sevenfold.train import checkpoint, launch, loop, optimizer, replicas, resuming
from sevenfold.train.config import TrainConfig
from sevenfold.train.recovery import StopRequest
from sevenfold.workflow import bench, cli, rehearsal, steps, toy, trial, workbench
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.flags import parse
from sevenfold.workflow.recipe import Recipe

LENGTH = 32
TRAIN = {"tokens_per_batch": 4 * LENGTH, "micro_batch": 2, "compile": "none"}
SETTINGS: dict[str, Any] = {
    **toy.SETTINGS,
    **{
        f"{stage}.train.{name}": value
        for stage in ("sft", "dpo", "lora")
        for name, value in {**TRAIN, "contexts": [{"length": LENGTH, "until": 1.0}]}.items()
    },
    **{f"{stage}.data.max_length": LENGTH for stage in ("sft", "dpo", "lora")},
}
ASSIGNMENTS = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
PHASES = ("wait_s", "forward_backward_s", "optimizer_s", "other_s")
EVERYWHERE = {"case", "preset", "stage", "seq_len", "tokens_per_batch", "micro_batch", "gpu"}
EVERYWHERE |= {"power_limit_w", "versions", "code", "precision", "compile", "processes"}


@pytest.fixture
def tried() -> trial.Trial:
    recipe, config = tiny()
    return trial.prepare(recipe, "pretrain", config)


def tiny() -> tuple[Recipe, TrainConfig]:
    recipe = recipes.resolve("demo", None, ASSIGNMENTS)[1]
    return recipe, recipe.pretrain


def run(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> list[dict[str, Any]]:
    """Run the verb; every line on standard output must be one JSON object of a case."""
    chosen = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
    code = cli.execute(["bench", what, "--folder", str(folder), *chosen, *flags])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert list(folder.rglob("*")) == []
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert all(line.keys() >= EVERYWHERE and line["case"] == what for line in lines)
    return lines


@pytest.mark.parametrize("what", ["pretrain", "sft", "dpo", "lora"])
def test_a_stage(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(what, tmp_path, capsys, "--steps", "3")
    assert [line["seq_len"] for line in lines] == ([8, 32] if what == "pretrain" else [32])
    for line in lines:
        assert line["steps"] == 3
        assert line["tokens_s_per_gpu"] == pytest.approx(4 * LENGTH / line["step_s"])
        # Medians of the phases and the median of the whole need not be of the same step.
        assert sum(line[phase] for phase in PHASES) < 2 * line["slowest_step_s"]
        assert line["forward_backward_s"] > line["wait_s"] >= 0
        assert line["optimizer_s"] > 0
        assert line["first_step_s"] > 0
        assert line["slowest_step_s"] >= line["step_s"]
        assert line["peak_gib"] > 0 < line["planned_gib"]
        assert {"sm_clock_mhz", "slowed_by"} <= line.keys()
        assert line["mfu"] is None  # no peak is known of a CPU
    if what != "pretrain":
        packed = lines[0]["non_padding_tokens_s_per_gpu"] / lines[0]["tokens_s_per_gpu"]
        assert 0.5 < packed <= 1
    assert ("pairs_s_per_gpu" in lines[0]) is (what == "dpo")


def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("checkpoint", tmp_path, capsys, "--steps", "4")
    assert [line["save"] for line in lines] == [1, 2]
    for line in lines:
        assert line["bytes"] > 1000
        assert line["durable_s"] > 0
        assert line["blocked_s"] == line["call_s"] + line["next_step_extra_s"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `bench resume` would start a process for."""
    monkeypatch.setattr(launch, "launch", lambda command, num: cli.execute(command[2:]))


@pytest.mark.usefixtures("in_this_process")
def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = tmp_path / bench.FOLDER / "step-00000099"
    killed.mkdir(parents=True)
    (killed / "state.json").write_text("{}")
    (line,) = run("resume", tmp_path, capsys, "--length", "8")
    assert line["seq_len"] == 8
    assert line["identical"] is True
    warm = ("start_s", "build_s", "read_s", "restore_s", "first_step_s")
    assert line["resume_s"] == pytest.approx(sum(line[part] for part in warm))
    cold = ("cold_build_s", "cold_first_step_s", "copied_s", "durable_s")
    assert min(line[part] for part in (*warm, *cold)) > 0
    assert line["bytes"] > 1000
    assert line["files"] == 5


@pytest.mark.usefixtures("in_this_process")
def test_a_resume_that_is_cut_off_has_said_where_the_time_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cut_off(*_: object) -> object:
        told = [r.getMessage().rpartition(": ")[0] for r in caplog.records]
        assert [line for line in told if line.startswith("bench resume: ")][-3:] == [
            "bench resume: process started, libraries imported",
            "bench resume: model built again",
            "bench resume: checkpoint read, SHA-256 checked",
        ]
        raise DivergedError("cut off")

    monkeypatch.setattr(resuming, "restore", cut_off)
    with caplog.at_level("INFO"):
        chosen = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
        code = cli.execute(["bench", "resume", "--folder", str(tmp_path), *chosen])
    assert code == DivergedError.exit_code
    assert "checkpoint durable, and read again" in caplog.text
    assert list(tmp_path.rglob("*")) == []


def test_resume_starts_its_processes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.execute(["bench", "resume", "--folder", str(tmp_path)]) == 2
    assert "twice; call it without torchrun" in capsys.readouterr().err


def test_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What several GPUs send each other is in it: weights in the update, gradients before it."""
    monkeypatch.setattr(replicas, "gather", lambda _: time.sleep(0.05))
    monkeypatch.setattr(replicas, "exchange", lambda _: time.sleep(0.1))
    (line,) = run("optimizer", tmp_path, capsys, "--steps", "3")
    assert line["optimizer_s"] > line["update_s"] > 0.05
    assert line["exchange_s"] > 0.1 > line["clip_s"]
    assert line["parameters"] > 1000


def test_gradients_for_the_optimizer_lie_where_training_sums_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU in bf16; gradients of their own beside the sums would count twice in the peak."""
    layers: list[accumulating.AccumulatingLinear] = []

    def prepare(*asked: Any) -> trial.Trial:
        made = trial_prepare(*asked)
        accumulating.accumulate_in_products(made.scorer.model)
        found = (m for m in made.scorer.modules() if hasattr(m, "total"))
        layers.extend(found)  # type: ignore[arg-type]
        return made

    seen: list[bool] = []

    def norm(parameters: Any) -> Any:
        gradients = {p.grad.data_ptr() for p in parameters}
        seen.append(all(layer.total.data_ptr() in gradients for layer in layers))
        return gradient_norm(parameters)

    trial_prepare, gradient_norm = trial.prepare, optimizer.gradient_norm
    monkeypatch.setattr(trial, "prepare", prepare)
    monkeypatch.setattr(optimizer, "gradient_norm", norm)
    run("optimizer", tmp_path, capsys, "--steps", "1")
    assert len(layers) == 7
    assert all(seen)
    assert all(float(layer.total.std()) > 0 for layer in layers)


@pytest.mark.usefixtures("in_this_process")
def test_restored_weights_that_differ_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = checkpoint.Checkpoints.load

    def bent(self: checkpoint.Checkpoints, step: int) -> checkpoint.Snapshot:
        snapshot = load(self, step)
        next(iter(snapshot.model.values())).view(-1)[0] += 1
        return snapshot

    monkeypatch.setattr(checkpoint.Checkpoints, "load", bent)
    chosen = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
    code = cli.execute(["bench", "resume", "--folder", str(tmp_path), *chosen])
    assert code == CheckpointError.exit_code
    told = capsys.readouterr().err
    assert "not what was saved" in told
    assert "the process that goes on ended with exit code 5; its own message is above" in told
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["resume", "--steps", "2"], "which does one step; leave it out"),
        (["optimizer", "--length", "8"], "bench optimizer takes it 0 times, leave"),
        (["checkpoint", "--length", "8", "--length", "32"], "takes it 1 times, leave"),
        (["sft", "--length", "7"], "contexts: length 7 does not divide"),
        (["pretrian"], "pretrain"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], advice: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
    assert cli.execute(["bench", *flags, "--folder", str(tmp_path), *chosen]) == 2
    assert advice in capsys.readouterr().err


def test_on_several_gpus_each_process_is_asked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(steps, "on_all_gpus", lambda asked: started.append(asked) or True)
    flags = "pretrain --preset 7b --steps 3 --length 512 --length 1024 --set seed=1 --set seed=2"
    for _ in range(2):
        _, options = parse(["bench", *flags.split(), "--debug"], verb=None, program="sevenfold")
        bench.bench(options)
        flags = " ".join(started[0][1:])
    assert vars(options)["length"] == [512, 1024]
    assert sorted(started[0]) == sorted(started[1])
    assert options.set == ["seed=1", "seed=2"]


def test_a_skipped_step_is_no_measurement(tried: trial.Trial) -> None:
    next(tried.scorer.parameters()).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"3 of 3 steps .* choose another precision"):
        trial.measure(tried, LENGTH, num_steps=1)


def test_the_clock_is_that_of_the_measured_steps(
    tried: trial.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that waits for the compiler has its highest clock, and is not at work."""
    trained_before: list[int] = []

    class Watch(trial.ClockWatch):
        def forget(self) -> None:
            trained_before.append(made[0].step)

    made: list[Any] = []
    make = trial.make_bench
    monkeypatch.setattr(trial, "ClockWatch", Watch)
    monkeypatch.setattr(
        trial, "make_bench", lambda *given, **more: made.append(make(*given, **more)) or made[0]
    )
    trial.measure(tried, LENGTH, num_steps=2)
    assert trained_before == [trial.WARM_UP]


def test_a_signal_ends_it_and_nothing_is_kept(tried: trial.Trial) -> None:
    made = trial.make_bench(tried, LENGTH, num_steps=3)

    def total(scorer: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return NEXT_TOKEN.total(scorer, batch)

    made.objective = Objective(weigh=NEXT_TOKEN.weigh, total=total)
    with pytest.raises(StoppedError, match="start it again"):
        trial.train(made, 3)
    assert made.step == 1


def test_a_timed_step_is_an_ordinary_step() -> None:
    """`fit` under the stopwatch ends with the same weights as the same steps without a clock."""
    digests = []
    for timed in (True, False):
        recipe, config = tiny()
        made = trial.make_bench(trial.prepare(recipe, "pretrain", config), LENGTH, num_steps=3)
        digests.append(workbench.digest(made))
        if timed:
            timed_steps = trial.train(made, 3)
            assert [list(step) for step in timed_steps] == [
                [p.removesuffix("_s") for p in PHASES]
            ] * 3
        else:
            for step in range(3):
                loop.train_step(made, made.batches.batch(step), LENGTH, StopRequest())
                made.step += 1
        digests.append(workbench.digest(made))
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_the_rehearsal_covers_every_length() -> None:
    recipe, config = tiny()
    rows = rehearsal.rehearse(recipe, "pretrain", config)
    assert [row["seq_len"] for row in rows] == [8, LENGTH]
    for row in rows:
        assert row["tok_s"] == pytest.approx(config.tokens_per_batch / row["step_s"])
        assert row["peak_gib"] > 0


def test_the_rehearsal_of_preferences_reads_pairs() -> None:
    recipe, _ = tiny()
    config = recipe.dpo.train
    made = trial.make_bench(trial.prepare(recipe, "dpo", config), LENGTH, num_steps=1)
    assert made.objective.weigh(made.batches.batch(0)) >= 1
    assert made.batches.batch(0).examples_bs is not None


def test_digests_tell_names_types_and_values_apart() -> None:
    one = {"a": torch.tensor([1.0, 2.0])}
    others = [
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 3.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": one["a"].view(torch.int32)},
    ]
    assert checkpoint.digest(one) == checkpoint.digest({"a": torch.tensor([1.0, 2.0])})
    assert checkpoint.digest(one) not in [checkpoint.digest(other) for other in others]
    assert checkpoint.digest({"a": torch.tensor(1.0)}) != checkpoint.digest(
        {"a": torch.tensor(2.0)}
    )
