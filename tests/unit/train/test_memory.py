"""What a layer keeps for its backward pass: as counted, and as torch.compile decides it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from tests.unit.train.test_planner import TRAIN
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph

from sevenfold.model import float8, lora
from sevenfold.model.config import InitConfig, LoRAAdapterConfig, ModelConfig
from sevenfold.model.llama import initialize
from sevenfold.train.config import TrainConfig
from sevenfold.train.memory import GIB, Adapter, Demand, Precision
from sevenfold.workflow import workbench

MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=320,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=512,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
ROWS, LENGTH = 2, 320


class _Opaque(torch.autograd.Function):
    """Attention as a kernel of its own, which keeps what FlexAttention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, log_sums = torch.ops.memory_test.attend(query, key, value)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.ops.memory_test.attend_backward(gradient, *ctx.saved_tensors)


@pytest.fixture(scope="module", autouse=True)
def opaque_attention() -> Any:
    library = torch.library.Library("memory_test", "DEF")
    library.define("attend(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
    library.define(
        "attend_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor o, Tensor l)"
        " -> (Tensor, Tensor, Tensor)"
    )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)

    def backward(gradient: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(each) for each in kept[:3])

    for key in ("CompositeExplicitAutograd", "Meta"):
        library.impl("attend", attend, key)
        library.impl("attend_backward", backward, key)
    yield
    library._destroy()


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    if torch.is_autocast_enabled("cpu"):  # as FlexAttention does
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    return _Opaque.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]


def cut(graph: Any, inputs: Any, **options: Any) -> Any:
    """Cut forward and backward in two as Inductor does, after its changes of the whole graph."""
    joint_graph.joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, inputs, **options)


def kept_bytes_per_token(
    weights: torch.dtype, train: TrainConfig, targets: tuple[str, ...] | None
) -> float:
    """Return the bytes that one layer's backward is given for each token, rotations apart."""
    from transformers import AttentionInterface, LlamaForCausalLM

    AttentionInterface.register("memory_test", _attention)
    model: Any = LlamaForCausalLM._from_config(MODEL.to_hf(), attn_implementation="memory_test")
    model.to(weights)
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    if train.precision == "fp8":
        float8.convert_to_float8(model, emulate=True)
    if targets is not None:
        config = LoRAAdapterConfig(r=16, alpha=32, dropout=0.0, targets=targets)
        lora.add_adapter(model, config)
    given: list[list[Any]] = []

    def run(graph: Any, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    def note(graph: Any, _: Any) -> Any:
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]

        def backward(*values: Any) -> Any:
            given.append([v for n, v in zip(names, values, strict=True) if "tangents" not in n])
            return graph.forward(*values)

        return make_boxed_func(backward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=run,
        bw_compiler=note,
        partition_fn=cut,
        decompositions=select_decomp_table(),
    )
    layer.compile(backend=backend, dynamic=False)
    context: Any = contextlib.nullcontext()
    if train.weights == "fp32" and train.precision == "bf16":
        context = torch.autocast("cpu", torch.bfloat16)
    hidden = torch.randn(ROWS, LENGTH, MODEL.hidden_size, dtype=weights, requires_grad=True)
    positions = torch.arange(LENGTH)[None].expand(ROWS, -1)
    # Given as they are, so that they are again afterwards.
    with (
        functorch.patch(activation_memory_budget=1.0, ban_recompute_materialized_backward=True),
        context,
    ):
        workbench.set_what_is_kept(train, adapted=targets is not None)
        out = layer(hidden, position_embeddings=rotary(hidden, positions), position_ids=positions)
        out.float().sum().backward()
    # Of a token's own: not weights, nor the cosines and sines that all layers share; views once.
    shared = (ROWS, LENGTH, MODEL.head_width)
    own = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in given[0]
        if isinstance(value, Tensor)
        and tuple(value.shape) != shared
        and set(value.shape) & {ROWS, ROWS * LENGTH}
    }
    return sum(own.values()) / (ROWS * LENGTH)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("weights", "precision", "recompute", "targets"),
    [
        ("bf16", "bf16", False, None),
        ("bf16", "bf16", "cheap", None),
        ("fp32", "bf16", False, None),
        ("fp32", "fp32", False, None),
        ("bf16", "bf16", False, ALL),
        ("bf16", "bf16", False, ("gate_proj", "down_proj")),
        ("fp32", "bf16", False, ALL),
        ("fp32", "bf16", False, ("q_proj", "v_proj")),
        ("bf16", "fp8", False, None),
        ("bf16", "fp8", False, ALL),
    ],
)
def test_what_a_compiled_layer_keeps_is_what_is_counted(
    weights: str, precision: Precision, recompute: Any, targets: tuple[str, ...] | None
) -> None:
    train = dataclasses.replace(
        TRAIN,
        weights=weights,
        precision=precision,
        recompute=recompute,
        optimizer=dataclasses.replace(TRAIN.optimizer, kind="adamw"),
    )
    demand = Demand(
        model=MODEL,
        train=train,
        precision=precision,
        loss_kernel="cce",
        adapter=None if targets is None else Adapter(num_parameters=1, rank=16, targets=targets),
    )
    found = kept_bytes_per_token(
        torch.float32 if weights == "fp32" else torch.bfloat16, train, targets
    )
    assert demand.layer_bytes_per_token() == found


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_kept_in_eight_bits_are_what_is_counted(adapted: bool) -> None:
    train = dataclasses.replace(TRAIN, weights="bf16", precision="fp8")
    init = InitConfig(std=0.02, scale_residual=True, dtype="bfloat16")
    model: Any = initialize(MODEL, init, 0, torch.bfloat16)
    float8.convert_to_float8(model, emulate=True)
    if adapted:
        lora.add_adapter(
            model, LoRAAdapterConfig(r=2, alpha=2.0, dropout=0.0, targets="all-linear")
        )
    model(input_ids=torch.zeros(1, 16, dtype=torch.int64), use_cache=False)
    kept = sum(b.nbytes for b in model.buffers() if b.dtype == torch.float8_e4m3fn)
    adapter = Adapter(num_parameters=1, rank=2) if adapted else None
    demand = Demand(model=MODEL, train=train, precision="fp8", adapter=adapter)
    assert demand.memory(ROWS * LENGTH).gathered_gib * GIB == kept
