"""The planner against measured peaks, and its refusals with the numbers in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sevenfold.base.errors import UsageError
from sevenfold.base.hardware import GPUInfo, detect_gpu_type
from sevenfold.model.config import LoRAAdapterConfig, read_model_file
from sevenfold.train import layout
from sevenfold.train.config import (
    ContextPhase,
    Duration,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from sevenfold.train.layout import lay_out
from sevenfold.train.memory import Adapter, Demand, Precision
from sevenfold.train.planner import Plan, Rate, assumed_mfu, plan, require_room
from sevenfold.workflow.planning import describe

CONFIGS = Path(__file__).parents[3] / "configs"
BIG = read_model_file(CONFIGS / "model_7b.py")
DEMO = read_model_file(CONFIGS / "model_demo.py")
SMALL = read_model_file(CONFIGS / "model_small.py")
LORA = LoRAAdapterConfig(r=16, alpha=32, dropout=0.0, targets="all-linear")
TRAIN = TrainConfig(
    duration=Duration(steps=100),
    tokens_per_batch=131_072,
    contexts=(ContextPhase(length=2048, until=1.0),),
    micro_batch=2,
    mask_documents=False,
    optimizer=OptimizerConfig(
        kind="adamw_8bit", betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
    ),
    schedule=ScheduleConfig(kind="cosine", peak_lr=3e-4, final_lr=0.0, warmup_fraction=0.02),
    precision="bf16",
    weights="bf16",
    compile="auto",
    recompute=False,
    deterministic=False,
    validate_every=10,
    validation_batches=1,
    checkpoint_every=10,
    keep_checkpoints=1,
    log_every=1,
    keep_best=False,
    spike_sigma=6.0,
    max_skipped_steps=0,
    max_rollbacks=0,
)
H100 = GPUInfo(
    name="NVIDIA H100 80GB HBM3",
    gpu_type="H100",
    num_gpus=1,
    memory_gib=79.1,
    compute_capability=(9, 0),
    supports_bf16=True,
    supports_fp8=True,
    compile_mode="max-autotune",
    peak_bf16_tflops=989.0,
)
CPU = GPUInfo(**{**H100, "name": "CPU", "gpu_type": "cpu", "num_gpus": 0, "memory_gib": 0.0})


def big_plan(**changes: Any) -> Plan:
    about = {name: changes.pop(name) for name in ("rate", "price_per_gpu_hour") if name in changes}
    num_steps = changes.pop("num_steps", 100)
    asked = {"model": BIG, "train": TRAIN, "precision": "bf16", "loss_kernel": "cce", **changes}
    return plan(Demand(**asked), num_steps=num_steps, **about)


@pytest.mark.parametrize(
    ("precision", "micro_batch", "per_step", "loss_kernel", "measured_gib"),
    [
        ("bf16", 2, 8, "cce", 59.1),
        ("bf16", 4, 4, "cce", 76.4),
        ("fp8_torchao", 2, 1, "cce", 43.0),
        ("fp8_torchao", 2, 8, "cce", 54.0),
        ("fp8_torchao", 4, 4, "cce", 66.0),
        ("bf16", 2, 32, "chunked", 59.53),
        ("fp8", 4, 16, "chunked", 74.59),
    ],
)
def test_within_five_percent_of_what_was_measured_on_an_h100(
    precision: str, micro_batch: int, per_step: int, loss_kernel: str, measured_gib: float
) -> None:
    train = dataclasses.replace(
        TRAIN, micro_batch=micro_batch, tokens_per_batch=micro_batch * per_step * 2048
    )
    found = big_plan(train=train, precision=precision, loss_kernel=loss_kernel)
    assert found.micro_batches_per_step == per_step
    assert found.peak_gib == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize(
    ("micro_batch", "adapted", "measured_gib"),
    [(16, False, 12.16), (8, False, 7.12), (8, True, 6.31)],
    ids=["pretrain", "sft and dpo", "lora"],
)
def test_within_five_percent_of_fp32_weights_under_autocast(
    micro_batch: int, adapted: bool, measured_gib: float
) -> None:
    train = dataclasses.replace(
        TRAIN,
        micro_batch=micro_batch,
        tokens_per_batch=micro_batch * 2048,
        weights="fp32",
        optimizer=dataclasses.replace(TRAIN.optimizer, kind="adamw"),
    )
    adapter = Adapter(num_parameters=LORA.num_parameters(SMALL), rank=16) if adapted else None
    found = big_plan(model=SMALL, train=train, loss_kernel="chunked", adapter=adapter)
    # Measured with a loss that held 2,048 positions' logits and then, or besides, their gradients;
    # the planned one holds the logits of all positions.
    positions = 2048 * (2 if adapted else 1) - micro_batch * 2048
    then_gib = found.peak_gib + positions * SMALL.vocab_size * 2 / 2**30
    assert then_gib == pytest.approx(measured_gib, rel=0.03)


def test_two_gpus_share_weights_gradients_and_moments() -> None:
    train = dataclasses.replace(TRAIN, micro_batch=4)
    assert big_plan(train=train, world_size=2).peak_gib == pytest.approx(57.2, rel=0.05)


@pytest.mark.parametrize(("precision", "measured_gib"), [("bf16", 105.1), ("fp8_torchao", 82.0)])
def test_layers_that_stay_gathered_are_counted(
    precision: Precision, measured_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two H200s with 8 rows and two micro-batches a step: 11 and 6 GiB more than without."""
    monkeypatch.setattr(layout, "_may_keep_whole", lambda *_: False)
    train = dataclasses.replace(TRAIN, micro_batch=8, tokens_per_batch=65_536)
    demand = Demand(model=BIG, train=train, precision=precision, world_size=2)
    found = lay_out(demand, memory_gib=139.8)
    assert (found.stays_gathered, found.replicated, found.copies) == (True, False, 1)
    assert found.peak_gib == pytest.approx(measured_gib, rel=0.015)
    assert found.peak_gib > demand.peak_gib + 5


def test_parts_are_counted_from_the_sizes() -> None:
    part = big_plan().memory[0]
    gib = BIG.num_parameters / 2**30
    assert part.weights_gib == pytest.approx(2 * gib)
    assert part.gradients_gib == pytest.approx(2 * gib)
    assert part.optimizer_gib == pytest.approx(2.03 * gib, rel=0.001)
    full = dataclasses.replace(
        TRAIN, weights="fp32", optimizer=dataclasses.replace(TRAIN.optimizer, kind="adamw")
    )
    part = big_plan(train=full).memory[0]
    assert part.weights_gib + part.gradients_gib + part.optimizer_gib == pytest.approx(16 * gib)


def test_what_saves_memory_saves_it() -> None:
    before = big_plan()
    recomputed = big_plan(train=dataclasses.replace(TRAIN, recompute=True))
    assert recomputed.memory[0].activations_gib < before.memory[0].activations_gib / 5
    cheap = big_plan(train=dataclasses.replace(TRAIN, recompute="cheap", micro_batch=4))
    # 94,344 bytes a token and layer, as counted in the graph that torch.compile makes of one.
    inside = 4 * 2048 * (6 * 14_336 + 2 * 4096)
    kept_gib = (32 * 94_344 * 4 * 2048 + inside) / 2**30
    assert cheap.memory[0].activations_gib == pytest.approx(kept_gib, rel=1e-6)
    assert big_plan(world_size=4).peak_gib < before.peak_gib
    in_fp8 = big_plan(precision="fp8").memory[0]
    assert in_fp8.activations_gib < before.memory[0].activations_gib
    # Weights in 8 bits beside those in bf16; torchao keeps none.
    assert in_fp8.gathered_gib == pytest.approx(32 * 218.1e6 / 2**30, rel=1e-3)
    assert big_plan(precision="fp8_torchao").peak_gib < before.peak_gib
    assert big_plan(adapter=Adapter(num_parameters=40_000_000)).peak_gib < before.peak_gib - 20
    assert big_plan(compiled=False).peak_gib > before.peak_gib
    assert big_plan(loss_kernel="plain").memory[0].loss_gib > 1
    assert big_plan(precision="fp32").peak_gib > before.peak_gib


def test_every_context_of_the_curriculum_is_planned() -> None:
    phases = ((512, 0.25), (1024, 0.5), (2048, 1.0))
    contexts = tuple(ContextPhase(length=length, until=until) for length, until in phases)
    found = big_plan(train=dataclasses.replace(TRAIN, contexts=contexts))
    assert [part.seq_len for part in found.memory] == [512, 1024, 2048]
    # As many tokens in a micro-batch at every length, so about as much memory.
    peaks = [part.peak_gib for part in found.memory]
    assert max(peaks) == pytest.approx(min(peaks), rel=0.01)
    tokens = 100 * 131_072
    by_hand = sum(
        share * tokens * BIG.flops_per_token(length)
        for share, length in ((0.25, 512), (0.25, 1024), (0.5, 2048))
    )
    assert found.flops == pytest.approx(by_hand)


def test_time_and_cost_from_a_measured_rate() -> None:
    found = big_plan(
        rate=Rate(tokens_per_s=10_000), world_size=2, price_per_gpu_hour=3.0, num_steps=1000
    )
    assert found.tokens == 131_072_000
    assert found.elapsed_s == pytest.approx(6553.6)
    assert found.gpu_hours == pytest.approx(2 * 6553.6 / 3600)
    assert found.cost == pytest.approx(3 * 2 * 6553.6 / 3600)
    rows = dict(describe(found))
    assert rows["rate"] == "10,000 tokens/s per GPU (measured)"
    assert rows["cost"] == "10.92"
    assert rows["memory: peak at 2048"].endswith("GiB")


def test_an_assumption_is_called_one() -> None:
    found = big_plan(rate=Rate(assumed_mfu=0.5, peak_flops=989e12))
    assert found.tokens_per_s_per_gpu == pytest.approx(0.5 * 22_114, rel=0.001)
    assert "assumed: 50% of 989 TFLOP/s" in dict(describe(found))["rate"]


@pytest.mark.parametrize(
    ("model", "precision", "adapter", "measured"),
    [
        (BIG, "bf16", None, 13_227),
        (BIG, "fp8", None, 19_737),
        (BIG, "fp8_torchao", None, 16_771),
        (BIG, "bf16", Adapter(num_parameters=41_943_040, rank=16), 16_835),
        (BIG, "fp8", Adapter(num_parameters=41_943_040, rank=16), 25_234),
        (SMALL, "bf16", None, 323_600),
    ],
)
def test_what_is_assumed_is_near_what_was_measured(
    model: Any, precision: Any, adapter: Adapter | None, measured: float
) -> None:
    """Tokens a second and GPU, at 2048 tokens; docs/performance.md says of which GPUs."""
    demand = Demand(
        model=model,
        train=TRAIN,
        precision=precision,
        adapter=adapter,
    )
    rate = Rate(assumed_mfu=assumed_mfu(demand), peak_flops=989e12)
    found = plan(demand, num_steps=100, rate=rate)
    assert found.tokens_per_s_per_gpu == pytest.approx(measured, rel=0.04)


def test_without_a_rate_there_is_no_time() -> None:
    found = big_plan(price_per_gpu_hour=3.0)
    assert (found.elapsed_s, found.gpu_hours, found.cost) == (None, None, None)
    assert not {"rate", "time", "cost"} & set(dict(describe(found)))


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({}, "exactly one of tokens_per_s and assumed_mfu"),
        ({"tokens_per_s": 1.0, "assumed_mfu": 0.5}, "exactly one of"),
        ({"assumed_mfu": 0.5}, "assumed_mfu needs peak_flops"),
    ],
)
def test_a_rate_is_one_thing(given: dict[str, float], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Rate(**given)


def test_the_7b_on_a_machine_without_a_gpu_is_explained() -> None:
    with pytest.raises(UsageError) as caught:
        require_room(big_plan(), CPU, memory_gib=24.0)
    message = str(caught.value)
    for part in ("no GPU on this machine", "7.39 B parameters need 59.1 GiB", "weights 13.8"):
        assert part in message
    assert "run it on a GPU with at least 80 GiB, or take --preset demo" in message
    assert caught.value.exit_code == 2
    # Memory enough, but months of work.
    with pytest.raises(UsageError, match=r"about [\d,]+ days"):
        require_room(big_plan(num_steps=10_000), CPU, memory_gib=1024.0)


def test_the_demo_fits_here() -> None:
    train = dataclasses.replace(
        TRAIN,
        tokens_per_batch=4096,
        contexts=(ContextPhase(length=128, until=1.0),),
        micro_batch=16,
        weights="fp32",
        optimizer=dataclasses.replace(TRAIN.optimizer, kind="adamw"),
    )
    small = big_plan(
        model=DEMO,
        train=train,
        num_steps=500,
        precision="fp32",
        loss_kernel="plain",
        compiled=False,
    )
    assert small.peak_gib < 1
    require_room(small, detect_gpu_type())


def test_a_gpu_that_is_too_small_is_refused_with_the_numbers() -> None:
    require_room(big_plan(), H100)
    small = GPUInfo(**{**H100, "name": "NVIDIA A100 40GB", "memory_gib": 39.4})
    with pytest.raises(UsageError, match=r"59\.1 GiB are needed.*has 39\.4 GiB; set a smaller"):
        require_room(big_plan(), small)


def test_fewer_key_value_heads_need_less() -> None:
    one = dataclasses.replace(BIG, num_kv_heads=1)
    assert big_plan(model=one).peak_gib < big_plan().peak_gib


def test_a_base_in_four_bits_takes_a_quarter_of_its_bf16_weights() -> None:
    whole, small = (
        big_plan(adapter=Adapter(num_parameters=40_000_000), four_bits=four).memory[-1]
        for four in (False, True)
    )
    in_layers = BIG.num_layers * BIG.num_layer_matmul_parameters
    saved = in_layers * (2 - 0.516) / 2**30
    assert whole.weights_gib - small.weights_gib == pytest.approx(saved, rel=1e-3)
    assert small.peak_gib < whole.peak_gib - 0.9 * saved
