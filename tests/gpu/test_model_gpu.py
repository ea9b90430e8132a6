"""What only a GPU can show: FP8 and Liger in place, equal weights, the planner's peak."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sevenfold.base.hardware import release_memory
from sevenfold.data.packing import PackedPreferences, Preference
from sevenfold.model import accumulating, adapting, float8, float8_linear
from sevenfold.model.attention import IMPLEMENTATION, register_attention
from sevenfold.model.config import InitConfig, LoRAAdapterConfig, ModelConfig
from sevenfold.model.float8 import convert_to_float8, why_not_float8
from sevenfold.model.llama import initialize
from sevenfold.model.lora import add_adapter
from sevenfold.model.transposing import transpose
from sevenfold.objective import linear_cross_entropy
from sevenfold.objective.next_token import Scorer
from sevenfold.objective.preference import preference_objective
from sevenfold.train.config import (
    ContextPhase,
    Duration,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from sevenfold.train.memory import Demand
from sevenfold.train.planner import plan
from sevenfold.workflow.workbench import set_what_is_kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CONFIG = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=256,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
INIT = InitConfig(std=0.02, scale_residual=True, dtype="bfloat16")


def forward(model: Any) -> torch.Tensor:
    ids_bt = torch.arange(512, device="cuda").view(2, 256) % 1024
    with torch.no_grad():
        logits_btv: torch.Tensor = model.eval()(input_ids=ids_bt, use_cache=False).logits
    return logits_btv.float()


def test_weights_on_the_gpu_are_those_on_the_cpu() -> None:
    there = initialize(CONFIG, INIT, 3, torch.bfloat16, "cuda").state_dict()
    here = initialize(CONFIG, INIT, 3, torch.bfloat16, "cpu").state_dict()
    assert all(torch.equal(there[name].cpu(), here[name]) for name in here)


def test_fp8_computes_about_the_same_and_gives_gradients() -> None:
    if reason := why_not_float8():
        pytest.skip(reason)
    model = initialize(CONFIG, INIT, 3, torch.bfloat16, "cuda")
    exact = forward(model)
    convert_to_float8(model)
    near = forward(model)
    assert 0 < (near - exact).norm() / exact.norm() < 0.1
    ids_bt = torch.arange(512, device="cuda").view(2, 256) % 1024
    model(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())


def test_fp8_products_on_the_gpu_are_those_of_the_emulation() -> None:
    """Compiled and not: the same roundings, so that only sums differ, in order and in bits."""
    if reason := why_not_float8():
        pytest.skip(reason)
    found = []
    for emulate, compiled in ((True, False), (False, False), (False, True)):
        torch.compiler.reset()
        model = initialize(CONFIG, INIT, 3, torch.bfloat16, "cuda")
        convert_to_float8(model, emulate=emulate)
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        ids_bt = torch.arange(512, device="cuda").view(2, 256) % 1024
        for _ in range(float8.ROUNDS + 1):
            model.zero_grad()
            float8.begin_step(model)
            model(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss.backward()
            float8.end_step(model)
        gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        found.append((gradients, model.get_buffer(f"model.{float8.HISTORY}")))
    # A sum that rounds to the next bf16 lets later values round to another FP8: noise of one bf16
    # step in the emulation's products moves gradients by 6 to 12 %, as FP8 itself does.
    for other in found[1:]:
        for name, gradient in found[0][0].items():
            assert (other[0][name] - gradient).norm() < 0.2 * gradient.norm(), name
        assert torch.allclose(other[1], found[0][1], rtol=0.2)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp8", 0.2)])
def test_compiled_adapters_that_share_inputs_learn_as_those_that_do_not(
    precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp8" and (reason := why_not_float8()):
        pytest.skip(reason)
    shape = LoRAAdapterConfig(r=16, alpha=32.0, dropout=0.0, targets="all-linear")
    ids_bt = torch.arange(512, device="cuda").view(2, 256) % 1024
    found = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(adapting, "make_linear", lambda *_, **__: None)
        torch.compiler.reset()
        torch.manual_seed(0)
        model = initialize(CONFIG, INIT, 3, torch.bfloat16, "cuda")
        if precision == "fp8":
            convert_to_float8(model)
        adapted = add_adapter(model, shape)
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        torch.manual_seed(1)
        for name, parameter in trained.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        for _ in range(float8.ROUNDS + 1):
            model.zero_grad()
            float8.begin_step(model)
            adapted(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss.backward()
            float8.end_step(model)
        found.append({name: parameter.grad for name, parameter in trained.items()})
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() < tolerance * gradient.norm(), name


@pytest.mark.parametrize("fast", [False, True])
def test_one_fp8_product_on_the_gpu_is_the_exact_one_to_rounding(fast: bool) -> None:
    if reason := why_not_float8():
        pytest.skip(reason)
    torch.manual_seed(0)
    scale = torch.tensor(64.0, device="cuda")
    left, right = (
        float8_linear.cast(torch.randn(rows, 512, device="cuda"), scale, float8_linear.E4M3)
        for rows in (256, 128)
    )
    real, exact = (
        float8_linear.multiply(
            left, right, (1 / scale, 1 / scale), torch.bfloat16, emulate=emulate, fast=fast
        ).double()
        for emulate in (False, True)
    )
    assert (real - exact).norm() < 0.01 * exact.norm()


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)
@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (100, 300), (37, 16), (1, 129)])
def test_the_transposing_kernel_moves_every_byte(rows: int, columns: int) -> None:
    bytes_of_it = torch.randint(256, (rows, columns), dtype=torch.uint8, device="cuda")
    assert torch.equal(transpose(bytes_of_it), bytes_of_it.t())


def test_the_kernels_of_the_optimizers_phase_compute_what_is_written_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the functions that run on CPUs; without a GPU Triton's interpreter is asked."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "unit" / "train")
    importlib.import_module("update_kernels").check("cuda")


def test_kept_logits_give_the_gradients_of_the_textbook_form() -> None:
    """Compiled, in bf16, over two chunks of unlike sizes."""
    torch.manual_seed(0)
    positions = linear_cross_entropy.CHUNK_POSITIONS + 100
    hidden_nh = torch.randn(positions, 64, device="cuda").bfloat16().requires_grad_()
    weight_vh = (torch.randn(1000, 64, device="cuda") / 8).bfloat16().requires_grad_()
    targets_n = torch.randint(1000, (positions,), device="cuda")
    targets_n[::3] = -100
    scores_n = linear_cross_entropy.negative_log_likelihood(
        hidden_nh, weight_vh, targets_n, kernel="chunked"
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_nh, weight_vh)]
    exact_n = torch.nn.functional.cross_entropy(
        exact[0] @ exact[1].t(), targets_n, reduction="none"
    )
    assert (scores_n - exact_n).abs().max() < 0.05
    found = torch.autograd.grad(scores_n.sum(), (hidden_nh, weight_vh))
    wanted = torch.autograd.grad(exact_n.sum(), exact)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() / other.norm() < 0.01


def test_liger_computes_the_same(tmp_path: Path) -> None:
    """In processes of their own, since Liger cannot be taken out again."""
    code = (
        "import sys, torch\n"
        "from sevenfold.model.kernels import setup_kernel_optimizations\n"
        "setup_kernel_optimizations(liger=sys.argv[1] == 'liger')\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_model_gpu import CONFIG, INIT, forward, initialize\n"
        "model = initialize(CONFIG, INIT, 3, torch.bfloat16, 'cuda')\n"
        "print(type(model.model.norm).__name__)\n"
        "torch.save(forward(model).cpu(), sys.argv[3])"
    )
    found = {}
    for kernel in ("plain", "liger"):
        file = tmp_path / kernel
        arguments = [sys.executable, "-c", code, kernel, str(Path(__file__).parent), str(file)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("Liger" in done.stdout) is (kernel == "liger")
        found[kernel] = torch.load(file, weights_only=True)
    error = (found["plain"] - found["liger"]).norm() / found["plain"].norm()
    assert error < 0.02


@pytest.mark.parametrize("share_prompts", [False, True])
def test_flex_attention_scores_packed_pairs_as_the_dense_mask_does(
    share_prompts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, loss and gradients; the CPU's own are tested against every answer alone."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    register_attention()
    generator = np.random.default_rng(0)
    pairs = [
        Preference(*(generator.integers(1, 1024, n).tolist() for n in generator.integers(1, 60, 3)))
        for _ in range(24)
    ]
    rows = PackedPreferences(pairs, 256, pad_id=0, seed=1, share_prompts=share_prompts)
    batch = rows.batch(np.arange(rows.num_rows), 256)
    found = {}
    for device in ("cpu", "cuda"):
        model = initialize(CONFIG, INIT, 3, torch.float32, device)
        model.set_attn_implementation(IMPLEMENTATION)
        scorer = Scorer(model, kernel="plain")
        objective = preference_objective(beta=0.1, nll_weight=0.5)
        total = objective.total(scorer, batch.to(torch.device(device))).total
        total.backward()
        gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        found[device] = (float(total.detach()), torch.cat(gradients))
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    difference = (found["cuda"][1] - found["cpu"][1]).norm()
    assert difference < 1e-3 * found["cpu"][1].norm()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_7bs_layers_need_what_the_planner_counts(precision: Any) -> None:
    """Two layers of the 7B's shape, compiled; the optimizer's state is left out on both sides."""
    config = dataclasses.replace(
        CONFIG,
        hidden_size=4096,
        intermediate_size=14_336,
        num_heads=32,
        num_kv_heads=8,
        max_seq_len=2048,
    )
    train = TrainConfig(
        duration=Duration(steps=1),
        tokens_per_batch=8192,
        contexts=(ContextPhase(length=2048, until=1.0),),
        micro_batch=2,
        mask_documents=False,
        optimizer=OptimizerConfig(
            kind="adamw_8bit", betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
        ),
        schedule=ScheduleConfig(kind="cosine", peak_lr=1e-4, final_lr=0.0, warmup_fraction=0.0),
        precision=precision,
        weights="bf16",
        compile="default",
        recompute=False,
        deterministic=False,
        validate_every=1,
        validation_batches=1,
        checkpoint_every=1,
        keep_checkpoints=1,
        log_every=1,
        keep_best=False,
        spike_sigma=6.0,
        max_skipped_steps=0,
        max_rollbacks=0,
    )
    if precision == "fp8" and (reason := why_not_float8()):
        pytest.skip(reason)
    demand = Demand(model=config, train=train, precision=precision, loss_kernel="cce")
    planned = plan(demand, num_steps=1).memory[0]
    set_what_is_kept(train, adapted=False)
    torch.compiler.reset()
    release_memory()
    of_others = torch.cuda.memory_allocated()
    model = initialize(config, INIT, 0, torch.bfloat16, "cuda")
    if precision == "fp8":
        convert_to_float8(model)
    else:
        accumulating.accumulate_in_products(model)
    for layer in model.model.layers:
        layer.compile()
    ids_bt = torch.randint(0, 1024, (2, 2048), device="cuda")
    accumulating.begin_step(model)
    for _ in range(2):
        # The gradients of the first round stay, as they do over the micro-batches of a step.
        torch.cuda.reset_peak_memory_stats()
        model.model(input_ids=ids_bt, use_cache=False).last_hidden_state.float().sum().backward()
    measured_gib = (torch.cuda.max_memory_allocated() - of_others) / 2**30
    assert measured_gib == pytest.approx(planned.peak_gib - planned.optimizer_gib, rel=0.1)
