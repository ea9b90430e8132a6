"""What a stage does before it trains."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.toy_scorer import make_scorer
from torch._functorch import config as functorch

from sevenfold.base.errors import UsageError
from sevenfold.model import float8
from sevenfold.model.config import KernelConfig
from sevenfold.train import parallel
from sevenfold.workflow import cli, training, workbench
from sevenfold.workflow import recipe as recipes


class Layer:
    """A layer that notes when it is compiled."""

    def __init__(self, notes: list[str]):
        self.notes = notes

    def compile(self, **options: Any) -> None:
        self.notes.append(f"compile {options}")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", []),
        ("default", ["reset", *["compile {'mode': None, 'dynamic': False}"] * 2]),
    ],
)
def test_a_stage_compiles_afresh(
    mode: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four stages in one process have more variants of a layer than PyTorch keeps."""
    notes: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: notes.append("reset"))
    decoder = types.SimpleNamespace(layers=[Layer(notes), Layer(notes)])
    model = types.SimpleNamespace(get_decoder=lambda: decoder)
    scorer: Any = types.SimpleNamespace(causal_model=model, model=model)
    _, recipe = recipes.resolve(overrides=[f"pretrain.compile={mode}"])
    workbench.place(scorer, recipe, "pretrain", recipe.pretrain, parallel.join())
    assert notes == expected


@pytest.mark.parametrize(
    ("replicated", "expected"),
    [(True, ["whole"]), (False, [{"bf16": True, "num_copies": 2, "keep_whole": True}])],
)
def test_several_processes_hold_the_model_as_planned(
    replicated: bool, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = types.SimpleNamespace(replicated=replicated, copies=2, stays_gathered=True)
    notes: list[Any] = []
    monkeypatch.setattr(workbench.choosing, "laid_out", lambda *asked: held)
    monkeypatch.setattr(parallel, "replicate", lambda *_: notes.append("whole"))
    monkeypatch.setattr(parallel, "shard", lambda *_, **how: notes.append(how))
    _, recipe = recipes.resolve(overrides=["pretrain.precision=bf16"])
    decoder = types.SimpleNamespace(layers=[])
    model = types.SimpleNamespace(config=recipe.model.to_hf(), get_decoder=lambda: decoder)
    scorer: Any = types.SimpleNamespace(causal_model=model, model=model)
    four = parallel.Processes(rank=0, world=4, device=torch.device("cpu"), per_node=2)
    workbench.place(scorer, recipe, "pretrain", recipe.pretrain, four)
    assert notes == expected


@pytest.mark.parametrize(("precision", "adapted"), [("fp8", False), ("fp8", True), ("bf16", False)])
def test_only_whole_weights_in_fp8_compute_their_inputs_again(
    precision: str, adapted: bool
) -> None:
    _, recipe = recipes.resolve(overrides=["pretrain.compile=default"])
    config = dataclasses.replace(recipe.pretrain, precision=precision)  # type: ignore[arg-type]
    decoder = types.SimpleNamespace(layers=[])
    model = types.SimpleNamespace(get_decoder=lambda: decoder)
    scorer: Any = types.SimpleNamespace(causal_model=model, model=object() if adapted else model)
    with functorch.patch(ban_recompute_materialized_backward=True):
        workbench.place(scorer, recipe, "pretrain", config, parallel.join())
        kept = functorch.ban_recompute_materialized_backward
    assert kept is (adapted or precision == "bf16")


class Gated(torch.nn.Module):
    """A norm and an MLP: what lies between matrix products is cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(16)
        self.gate, self.up = torch.nn.Linear(16, 64), torch.nn.Linear(16, 64)
        self.down = torch.nn.Linear(64, 16)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        normed = self.norm(values)
        product = torch.nn.functional.silu(self.gate(normed)) * self.up(normed)
        found: torch.Tensor = values + self.down(product)
        return found


@pytest.fixture
def memory_budget() -> Iterator[None]:
    """Afterwards what it was; pytest's monkeypatch deletes such settings of PyTorch."""
    with functorch.patch(activation_memory_budget=1.0):
        yield


@pytest.mark.usefixtures("memory_budget")
def test_cheap_recomputation_keeps_products_only() -> None:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    _, recipe = recipes.resolve(overrides=["pretrain.compile=default"])
    values = torch.randn(40, 16)
    kept, gradients = {}, {}
    for recompute in ("cheap", False):
        config = dataclasses.replace(recipe.pretrain, recompute=recompute)
        nothing = types.SimpleNamespace(layers=[])
        model = types.SimpleNamespace(get_decoder=lambda found=nothing: found)
        scorer: Any = types.SimpleNamespace(causal_model=model, model=model)
        workbench.place(scorer, recipe, "pretrain", config, parallel.join())
        graphs: list[torch.fx.GraphModule] = []

        def note(graph: torch.fx.GraphModule, _: Any, found: Any = graphs) -> Any:
            found.append(graph)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)
        torch.manual_seed(0)
        layer = Gated()
        torch.compile(layer, backend=backend)(values).square().sum().backward()
        outputs: Any = graphs[0].graph.output_node().args[0]
        sizes = [node.meta["val"].numel() for node in outputs if node.op == "call_function"]
        kept[recompute] = sum(sizes) - values.numel()
        gradients[recompute] = [p.grad for p in layer.parameters()]
    # Gate, up and one number a row of the norm; else the normed input and the product, too.
    assert kept == {"cheap": 40 * (64 + 64 + 1), False: 40 * (64 + 64 + 1 + 16 + 64)}
    for one, other in zip(gradients["cheap"], gradients[False], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_cheap_recomputation_without_compiling_is_refused() -> None:
    _, recipe = recipes.resolve(
        overrides=["pretrain.recompute=cheap", "pretrain.compile=none", "pretrain.precision=bf16"]
    )
    with pytest.raises(UsageError, match="cheap is torch.compile's.*set recompute to false or"):
        training.decide(recipe.pretrain, stage="pretrain")


def test_four_bits_train_on_one_gpu() -> None:
    _, recipe = recipes.resolve(overrides=["lora.base=nf4"])
    two = parallel.Processes(rank=0, world=2, device=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"2 processes are here; set lora\.base=full, or show one"):
        workbench.freeze(None, recipe.lora.train, two)


def test_four_bits_that_cannot_be_had_are_refused_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = ["run", "--run", str(tmp_path / "run"), "--set", "lora.base=nf4"]
    for flags in ([], ["--dry-run"]):
        assert cli.execute([*command, *flags]) == 2
        assert "pip install -e '.[qlora]', or set lora.base=full" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_four_bits_are_not_computed_in_fp8() -> None:
    with pytest.raises(UsageError, match=r"base nf4 computes in bf16 or fp32, not in precision fp"):
        recipes.resolve(overrides=["lora.base=nf4", "lora.train.precision=fp8"])


def test_kernels_for_llama_are_refused_on_another_family() -> None:
    wanted = KernelConfig(liger=True, cce=False)
    workbench.require_effect(wanted, "llama")
    workbench.require_effect(KernelConfig(liger=False, cce=True), "qwen2")
    with pytest.raises(UsageError, match=r"on model type 'qwen2'; set kernels\.liger=false"):
        workbench.require_effect(wanted, "qwen2")


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "expected"),
    [
        ("dpo", "fp8", "fp32", True),
        ("dpo", "fp8_torchao", "fp32", True),
        ("dpo", "fp8", "bf16", False),
        ("dpo", "bf16", "fp32", False),
        ("lora", "fp8", "fp32", False),  # the base stays what it was
    ],
)
def test_weights_stored_in_bf16_and_trained_in_fp32_do_not_jump_in_fp8(
    stage: str,
    precision: str,
    weights: str,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = make_scorer().causal_model.bfloat16()
    stored.save_pretrained(tmp_path)
    for name in ("convert_to_float8", "convert_with_torchao"):
        monkeypatch.setattr(float8, name, lambda *_, **__: None)
    _, recipe = recipes.resolve(overrides=["kernels.liger=false", "kernels.cce=false"])
    job: Any = types.SimpleNamespace(
        stage=stage,
        recipe=recipe,
        config=dataclasses.replace(recipe.dpo.train, precision=precision, weights=weights),  # type: ignore[arg-type]
        source=types.SimpleNamespace(folder=tmp_path, external=False),
        processes=parallel.join(),
    )
    loaded = workbench.load_scorer(job).causal_model
    casts = float8.float8_names(loaded)
    for name, before in stored.named_parameters():
        found = loaded.get_parameter(name)
        is_moved = not torch.equal(found.float(), before.float())
        assert is_moved is (expected and name.removesuffix(".weight") in casts), name
        assert torch.equal(found.bfloat16(), before)
