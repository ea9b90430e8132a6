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
from torch._functorch import config as functorch

from sevenfold.base.errors import UsageError
from sevenfold.model.config import KernelConfig
from sevenfold.train import parallel, replicas
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
    scorer: Any = types.SimpleNamespace(causal_model=model)
    _, recipe = recipes.resolve(overrides=[f"pretrain.compile={mode}"])
    workbench.place(scorer, recipe.pretrain, parallel.join())
    assert notes == expected


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
        scorer: Any = types.SimpleNamespace(causal_model=model)
        workbench.place(scorer, config, parallel.join())
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
        training.decide(recipe.pretrain)


class Agreeing(parallel.Processes):
    """Processes of one opinion."""

    def sum(self, values: list[float]) -> list[float]:
        return [value * self.world for value in values]


@pytest.mark.parametrize(
    ("nodes", "per_node", "memory_gib", "rows", "expected"),
    [
        (1, 2, 140, 8, (1, True)),
        (1, 2, 80, 4, (1, True)),
        (1, 2, 80, 5, (1, False)),
        (1, 8, 80, 2, (1, True)),
        (2, 8, 80, 2, (2, True)),
        (4, 8, 40, 1, (4, True)),
        (4, 8, 40, 2, (4, False)),
        (4, 2, 44, 1, (4, False)),
        (4, 2, 40, 1, (1, True)),  # 32.2 GiB, and 6.9 that sums of gradients take more in fp32
        (4, 2, 40, 2, (1, False)),
        (4, 1, 80, 2, (1, True)),
    ],
)
def test_memory_decides_how_the_7b_is_shared_out(
    nodes: int,
    per_node: int,
    memory_gib: float,
    rows: int,
    expected: tuple[int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy on each node where a node's GPUs have room for it, and layers gathered once."""
    _, recipe = recipes.resolve("7b", overrides=[f"pretrain.micro_batch={rows}"])
    config = dataclasses.replace(recipe.pretrain, precision="bf16")
    monkeypatch.setattr(workbench, "detect_gpu_type", lambda: {"memory_gib": memory_gib})
    model = types.SimpleNamespace(config=recipe.model.to_hf())
    weights = [torch.nn.Parameter(torch.zeros(1))]
    scorer: Any = types.SimpleNamespace(
        causal_model=model, kernel="cce", parameters=lambda: iter(weights)
    )
    processes = Agreeing(
        rank=0, world=nodes * per_node, device=torch.device("cpu"), per_node=per_node
    )
    assert workbench.sharding(scorer, config, processes) == expected


@pytest.mark.parametrize(
    ("wanted", "nodes", "weights", "precision", "memory_gib", "expected"),
    [
        (True, 1, "bf16", "bf16", 60, True),
        (True, 1, "bf16", "bf16", 57, False),
        (True, 1, "bf16", "fp8", 57, True),
        (True, 1, "fp32", "bf16", 140, False),
        (True, 2, "bf16", "fp8", 140, False),
        (False, 1, "bf16", "bf16", 80, False),
    ],
)
def test_gpus_of_one_node_keep_whole_weights_where_they_fit(
    wanted: bool,
    nodes: int,
    weights: Any,
    precision: Any,
    memory_gib: float,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A 7B's 2 rows on each of two GPUs: 52.5 GiB planned, of which 90 % of 60 have room."""
    monkeypatch.setattr(replicas, "WANTED", wanted)
    monkeypatch.setattr(workbench, "detect_gpu_type", lambda: {"memory_gib": memory_gib})
    _, recipe = recipes.resolve("7b", overrides=["pretrain.micro_batch=2"])
    adamw = dataclasses.replace(recipe.pretrain.optimizer, kind="adamw")
    config = dataclasses.replace(recipe.pretrain, precision=precision)
    if weights == "fp32":
        config = dataclasses.replace(config, weights=weights, optimizer=adamw)
    model = types.SimpleNamespace(config=recipe.model.to_hf())
    weight = [torch.nn.Parameter(torch.zeros(1))]
    scorer: Any = types.SimpleNamespace(
        causal_model=model, kernel="chunked", parameters=lambda: iter(weight)
    )
    processes = Agreeing(rank=0, world=2, device=torch.device("cpu"), per_node=2 // nodes)
    assert workbench.keeps_whole(scorer, config, processes) is expected


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
        assert "pip install 'sevenfold[qlora]', or set lora.base=full" in capsys.readouterr().err
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
