"""The reference's log-probabilities: computed once, and again when what they rest on differs."""

from __future__ import annotations

import dataclasses
import logging
import math
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tests.unit.toy_scorer import make_scorer
from tests.unit.workflow.forked import kill_everywhere

from sevenfold.base import records, storage
from sevenfold.base.errors import MemoryExhaustedError, UsageError
from sevenfold.data.packing import PackedPreferences, Preference
from sevenfold.model import float8
from sevenfold.model.config import LoRAAdapterConfig
from sevenfold.model.lora import add_adapter
from sevenfold.objective.next_token import Scorer
from sevenfold.objective.preference import preference_objective
from sevenfold.train import parallel
from sevenfold.workflow import dpo
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.training import StageOptions

PREFERENCES = [
    Preference([1, 2, 3], [4, 5], [6, 7, 8]),
    Preference([9, 2], [4], [5, 5]),
    Preference([3, 1], [8, 9], []),
    Preference([7], [1, 2, 3], [3, 2, 1]),
]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return make_scorer()


@pytest.fixture
def job(tmp_path: Path) -> Any:
    _, recipe = recipes.resolve()
    config = dataclasses.replace(recipe.dpo.train, precision="fp32", compile="none", micro_batch=1)
    return types.SimpleNamespace(
        folder=tmp_path / "dpo",
        inputs={"model": "a" * 64, "data": "b" * 64},
        recipe=recipe,
        config=config,
        options=StageOptions(oom_recovery=True),
        processes=parallel.join(),
    )


def refer(job: Any, scorer: Scorer) -> PackedPreferences:
    rows = PackedPreferences(PREFERENCES, 16, pad_id=0, seed=1)
    held_out = PackedPreferences(PREFERENCES[:1], 16, pad_id=0, seed=1)
    dpo.refer(job, scorer, {"train": rows, "validation": held_out})
    return rows


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every time that log-probabilities are computed rather than read."""
    notes: list[str] = []
    compute = dpo.reference_scores

    def noted(*arguments: Any, **settings: Any) -> Any:
        notes.append("computed")
        return compute(*arguments, **settings)

    monkeypatch.setattr(dpo, "reference_scores", noted)
    return notes


@pytest.mark.fault("I01")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "adapter"])
def test_training_starts_at_ln_2_with_margins_of_zero(job: Any, kind: str) -> None:
    """In the packs that training uses, and from what was stored as from what was computed."""
    scorer = make_scorer()
    if kind == "adapter":
        config = LoRAAdapterConfig(r=4, alpha=8.0, dropout=0.0, targets="all-linear")
        scorer.model = add_adapter(scorer.model, config)
    if kind == "bf16":
        job.config = dataclasses.replace(job.config, precision="bf16")
    objective = preference_objective(beta=0.1, nll_weight=0.0)
    for _ in range(2):
        rows = refer(job, scorer)
        assert scorer.training
        assert not any(m.p for m in scorer.modules() if isinstance(m, torch.nn.Dropout))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            summed = objective.total(scorer, rows.batch(np.arange(rows.num_rows), 16))
        assert float(summed.extras["pairs"]) == 3
        tolerance = 1e-3 if kind == "bf16" else 1e-6
        assert float(summed.total.detach()) / 3 == pytest.approx(math.log(2), abs=tolerance)
        assert float(summed.extras["margin"]) == pytest.approx(0.0, abs=tolerance)


@pytest.mark.fault("C19", "I01")
def test_in_fp8_the_scales_are_kept_with_what_was_computed_by_them(
    job: Any, computed: list[str]
) -> None:
    job.config = dataclasses.replace(job.config, precision="fp8")
    found = []
    for _ in range(2):
        scorer = make_scorer()
        float8.convert_to_float8(scorer.model, emulate=True)
        rows = refer(job, scorer)
        batch = rows.batch(np.arange(rows.num_rows), 16)
        with parallel.autocast(job.config, job.processes):
            loss = preference_objective(beta=0.1, nll_weight=0.0).total(scorer, batch)
        assert float(loss.total.detach()) / 3 == pytest.approx(math.log(2), abs=1e-6)
        found.append(rows.reference_n2)
    assert computed == ["computed"] * 2
    assert np.array_equal(*found)
    (job.folder / "reference" / dpo.MAGNITUDES).unlink()
    refer(job, scorer)
    assert computed == ["computed"] * 4


@pytest.mark.parametrize("precision", ["fp8", "fp8_torchao", "bf16"])
def test_scales_that_depend_on_the_batch_are_warned_of(
    job: Any, scorer: Scorer, precision: Any, caplog: pytest.LogCaptureFixture
) -> None:
    job.config = dataclasses.replace(job.config, precision=precision)
    refer(job, scorer)
    assert (dpo.TORCHAOS_SCALES in caplog.messages) is (precision == "fp8_torchao")


@pytest.mark.fault("C19")
def test_what_was_computed_is_read_again(job: Any, scorer: Scorer, computed: list[str]) -> None:
    first = refer(job, scorer).reference_n2
    assert computed == ["computed"] * 2
    assert first is not None
    assert np.array_equal(first, refer(job, scorer).reference_n2)
    assert computed == ["computed"] * 2
    job.config = dataclasses.replace(job.config, micro_batch=2)
    refer(job, scorer)
    assert computed == ["computed"] * 2


CHANGES: dict[str, Any] = {
    "model": lambda job: job.inputs.update(model="c" * 64),
    "data": lambda job: job.inputs.update(data="c" * 64),
    "precision": lambda job: change_config(job, precision="bf16"),
    "compile": lambda job: change_config(job, compile="default"),
    "deterministic": lambda job: change_config(job, deterministic=not job.config.deterministic),
    "packing": lambda job: change_dpo(job, packing="tight"),
    "share_prompts": lambda job: change_dpo(job, share_prompts=not job.recipe.dpo.share_prompts),
}


def change_config(job: Any, **changes: Any) -> None:
    job.config = dataclasses.replace(job.config, **changes)


def change_dpo(job: Any, **changes: Any) -> None:
    changed = dataclasses.replace(job.recipe.dpo, **changes)
    job.recipe = dataclasses.replace(job.recipe, dpo=changed)


@pytest.mark.fault("C19")
@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_than_before_is_computed_anew(
    job: Any, scorer: Scorer, computed: list[str], name: str
) -> None:
    refer(job, scorer)
    CHANGES[name](job)
    refer(job, scorer)
    assert computed == ["computed"] * 4


@pytest.mark.fault("C19")
def test_other_kernels_versions_or_devices_give_other_numbers(
    job: Any, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [dpo.reference_key(job, scorer)]
    keys.append(dpo.reference_key(job, Scorer(scorer.model, kernel="chunked")))
    monkeypatch.setattr(records, "package_versions", lambda: {"torch": "9.9"})
    keys.append(dpo.reference_key(job, scorer))
    monkeypatch.setattr(dpo, "detect_gpu_type", lambda: {"name": "NVIDIA H100"})
    keys.append(dpo.reference_key(job, scorer))
    assert len(set(keys)) == 4


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Any] = {
    "bit": lambda folder: flip(folder / "train.npy"),
    "cut": lambda folder: (folder / "train.npy").write_bytes(b""),
    "missing": lambda folder: (folder / "validation.npy").unlink(),
    "manifest": lambda folder: (folder / storage.MANIFEST).write_text("{"),
    "no_manifest": lambda folder: (folder / storage.MANIFEST).unlink(),
}


@pytest.mark.fault("C19", "L01")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_log_probabilities_are_set_aside_and_computed_again(
    job: Any, scorer: Scorer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = refer(job, scorer).reference_n2
    for number in (1, 2):
        DAMAGES[damage](job.folder / "reference")
        with caplog.at_level(logging.WARNING):
            again = refer(job, scorer).reference_n2
        assert np.array_equal(first, again)
        assert f"set aside as reference.damaged-{number}, and computed again" in caplog.text
        assert (job.folder / f"reference.damaged-{number}").is_dir()
    storage.verify_folder(job.folder / "reference")


@pytest.mark.fault("A04")
def test_killed_at_any_file_operation_the_log_probabilities_end_the_same(
    job: Any, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = records.package_versions()  # slow to find out
    monkeypatch.setattr(records, "package_versions", lambda: versions)
    expected = refer(job, scorer).reference_n2
    assert expected is not None
    known = {len(PREFERENCES): expected, 1: expected[:1]}
    monkeypatch.setattr(dpo, "reference_scores", lambda _, rows, **__: known[len(rows.preferences)])
    whole = storage.verify_folder(job.folder / "reference")["fingerprint"]

    def start() -> None:
        storage.remove_folder(job.folder / "reference")

    def check() -> None:
        assert np.array_equal(refer(job, scorer).reference_n2, expected)
        assert storage.verify_folder(job.folder / "reference")["fingerprint"] == whole
        assert [path.name for path in job.folder.iterdir()] == ["reference"]

    assert kill_everywhere(start, check) > 10


@pytest.mark.fault("I05")
@pytest.mark.parametrize("beta", ["0", "-0.1", ".nan", ".inf"])
def test_an_impossible_beta_is_refused(beta: str) -> None:
    with pytest.raises(UsageError, match=r"dpo\.beta.*(greater than 0|finite number)"):
        recipes.resolve(overrides=[f"dpo.beta={beta}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss=ipo", "label_smoothing=0.1"],
            r"no effect on loss ipo; set it to 0, or loss to",
        ),
        (["loss=hinge", "label_smoothing=0.1"], r"no effect on loss hinge; set it to 0"),
        (["loss=robust"], r"loss robust with label_smoothing 0 is loss sigmoid; set label_smooth"),
        (["loss=ipo", "length_normalized=true"], r"no effect on loss ipo.*; set it to false"),
        (["label_smoothing=0.5"], r"dpo\.label_smoothing.*less than 0\.5"),
        (["loss=sigmoid_norm"], r"dpo\.loss.*'sigmoid', 'robust', 'ipo' or 'hinge'"),
    ],
)
def test_settings_of_the_loss_that_do_nothing_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipes.resolve(overrides=[f"dpo.{override}" for override in overrides])


def test_what_the_recipe_says_reaches_rows_and_loss(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(columns, dataclasses.astuple(p), strict=True)) for p in PREFERENCES]
    for part in ("rows", "validation"):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / part))
    tokenizer = types.SimpleNamespace(pad_token_id=3)
    monkeypatch.setattr(dpo.llama, "load_tokenizer", lambda _: tokenizer)
    job.source = types.SimpleNamespace(folder=tmp_path)
    job.run = types.SimpleNamespace(data=lambda _: tmp_path)
    for share_prompts in (False, True):
        change_dpo(job, share_prompts=share_prompts, loss="robust", label_smoothing=0.25)
        for packed in dpo.preference_rows(job):
            assert packed.share_prompts is share_prompts
            assert packed.pad_id == 3
            assert packed.preferences == PREFERENCES
    change_dpo(job, beta=0.5, nll_weight=0.75, length_normalized=True)
    assert dpo.objective(job.recipe.dpo).total.keywords == {
        "beta": 0.5,
        "nll_weight": 0.75,
        "loss": "robust",
        "label_smoothing": 0.25,
        "length_normalized": True,
    }


@pytest.mark.fault("I06")
def test_the_reference_cannot_be_another_model_than_the_one_trained() -> None:
    """There is no setting for it: it is the model that the stage starts from."""
    with pytest.raises(UsageError, match=r"dpo\.reference: unknown key"):
        recipes.resolve(overrides=["dpo.reference=other"])
    fields = {field.name for field in dataclasses.fields(recipes.DPOConfig)}
    assert not any("ref" in field or "model" in field for field in fields)


@pytest.mark.fault("E08")
def test_where_memory_runs_out_fewer_rows_are_scored_at_a_time(
    job: Any, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = refer(job, scorer).reference_n2
    storage.remove_folder(job.folder / "reference")
    job.config = dataclasses.replace(job.config, micro_batch=4)
    compute, sizes = dpo.reference_scores, []

    def tight(*arguments: Any, micro_batch: int, **settings: Any) -> Any:
        sizes.append(micro_batch)
        if micro_batch > 1:
            raise torch.OutOfMemoryError("fake")
        return compute(*arguments, micro_batch=micro_batch, **settings)

    monkeypatch.setattr(dpo, "reference_scores", tight)
    assert np.array_equal(refer(job, scorer).reference_n2, expected)
    assert sizes == [4, 2, 1, 4, 2, 1]
    storage.remove_folder(job.folder / "reference")
    job.options = StageOptions()
    with pytest.raises(MemoryExhaustedError, match=r"4 \(phase reference, .*enable-oom-recovery"):
        refer(job, scorer)
