"""An adapter starts as nothing, merges to what it was, and is refused when it cannot be right."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from sevenfold.base import storage
from sevenfold.base.config import build
from sevenfold.base.errors import CheckpointError, UsageError
from sevenfold.model import adapting
from sevenfold.model.config import InitConfig, LoRAAdapterConfig, ModelConfig
from sevenfold.model.float8 import convert_to_float8
from sevenfold.model.llama import initialize, save_model
from sevenfold.model.lora import (
    add_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)

IDS_BT = torch.arange(40).view(2, 20) * 7 % 320
CONFIG = LoRAAdapterConfig(r=4, alpha=8.0, dropout=0.0, targets="all-linear")
KINDS = {
    "lora": CONFIG,
    "rslora": dataclasses.replace(CONFIG, use_rslora=True),
    "dora": dataclasses.replace(CONFIG, use_dora=True),
    "both": dataclasses.replace(CONFIG, use_rslora=True, use_dora=True),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS_BT).logits
    return found


def trained(model: Any, spread: float = 0.1) -> Any:
    """Give an adapter weights as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
    return model


@pytest.fixture
def base(tiny: ModelConfig, init: InitConfig) -> Any:
    return initialize(tiny, init, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(base: Any, kind: str) -> None:
    before = logits(base)
    adapted = add_adapter(base, KINDS[kind])
    assert torch.equal(logits(adapted), before)
    open_to_training = [n for n, p in adapted.named_parameters() if p.requires_grad]
    # A, B and with DoRA a row's length, for seven linear modules in each of two layers.
    assert len(open_to_training) == (42 if KINDS[kind].use_dora else 28)
    assert all("lora_" in name for name in open_to_training)
    assert not any("lm_head" in name for name in open_to_training)


def test_the_seed_decides_the_adapter(base: Any) -> None:
    other, third = copy.deepcopy(base), copy.deepcopy(base)
    found = []
    for seed, model in ((1, base), (1, other), (2, third)):
        torch.manual_seed(seed)
        adapted = add_adapter(model, CONFIG)
        found.append({n: p for n, p in adapted.named_parameters() if "lora_A" in n})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_named_targets(base: Any) -> None:
    config = LoRAAdapterConfig(r=2, alpha=2.0, dropout=0.0, targets=("v_proj", "q_proj"))
    names = [n for n, p in add_adapter(base, config).named_parameters() if p.requires_grad]
    assert len(names) == 8
    assert all("q_proj" in name or "v_proj" in name for name in names)


# The compiler looks at the .grad of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_in_a_compiled_layer_frozen_weights_cost_no_gradient(
    tiny: ModelConfig, init: InitConfig, precision: str
) -> None:
    """One graph each way; adapters compute in bf16, and no product is for a frozen weight.

    All layers share it but the first, whose input has no gradient. Forward: a product of the base
    for each of seven linear layers, one of adapters for each of four inputs, and seven that add.
    Backward: one of the base, to the input, and two of the adapter for each layer, two for each
    input. Back end: none, as it would take long.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch.compiler.reset()
    model = initialize(dataclasses.replace(tiny, num_layers=4), init, 0, torch.bfloat16)
    if precision == "fp8":
        convert_to_float8(model, emulate=True)
    adapted = trained(add_adapter(model, CONFIG))
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    hidden_bth = adapted.get_decoder()(input_ids=IDS_BT, use_cache=False).last_hidden_state
    hidden_bth.float().square().sum().backward()
    kinds = [
        [node.args[0].meta["val"].dtype for node in graph.graph.nodes if _is_product(node)]
        for graph in graphs[1:3]
    ]
    assert len(graphs) == 4
    # The emulation of FP8 multiplies in fp64.
    base = torch.float64 if precision == "fp8" else torch.bfloat16
    found = [(kind.count(base), kind.count(torch.bfloat16), len(kind)) for kind in kinds]
    assert found == ([(7, 4, 11), (7, 22, 29)] if precision == "fp8" else [(11,) * 3, (29,) * 3])
    # What a product writes is added to another's by whatever reads both, without a copy.
    assert not any(
        _is_product(arg)
        for graph in graphs
        for node in graph.graph.nodes
        if node.target is torch.ops.aten.add.Tensor
        for arg in node.args
        if isinstance(arg, torch.fx.Node)
    )
    adding = [node for node in graphs[1].graph.nodes if "auto_functionalized" in str(node.target)]
    assert [node.args[0] for node in adding] == [torch.ops.sevenfold.add_low_rank.default] * 7
    assert all(p.grad is None for n, p in adapted.named_parameters() if "lora_" not in n)
    assert all(p.grad.dtype == torch.float32 for n, p in adapted.named_parameters() if "lora_" in n)


def _is_product(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.aten.mm.default


def learnt(adapted: Any, compute: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and gradients, with the adapter in another precision than its layers."""
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(compute)
    found = adapted(input_ids=IDS_BT).logits
    found.square().sum().backward()
    return found.detach(), {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}


# In fp64 to the rounding of an fp32 gradient; FP8 rounds to 8 bits what differs in the 24th.
@pytest.mark.parametrize(
    ("kind", "weights", "adapter", "tolerance"),
    [
        ("lora", torch.float32, torch.float32, 0.0),
        ("lora", torch.float64, torch.float32, 1e-6),
        ("rslora", torch.float64, torch.float32, 1e-6),
        ("fp8", torch.float32, torch.float64, 1e-3),
    ],
)
def test_inputs_read_once_give_what_layer_by_layer_gives(
    tiny: ModelConfig,
    init: InitConfig,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    weights: torch.dtype,
    adapter: torch.dtype,
    tolerance: float,
) -> None:
    found = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(adapting, "make_linear", lambda *_, **__: None)
        torch.manual_seed(0)
        base = initialize(tiny, init, 0).to(weights)
        with_bias = base.model.layers[0].mlp.up_proj
        with_bias.bias = torch.nn.Parameter(torch.rand_like(with_bias.weight[:, 0]))
        if kind == "fp8":
            convert_to_float8(base, emulate=True)
        adapted = trained(add_adapter(base, KINDS.get(kind, CONFIG)))
        shared = [m for m in adapted.modules() if hasattr(m, "shared_input")]
        assert len(shared) == (14 if together else 0)
        found.append(learnt(adapted, adapter))
    (ours, our_gradients), (theirs, gradients) = found
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_layers_that_are_given_different_inputs_are_not_mixed_up(base: Any) -> None:
    attention = add_adapter(base.double(), CONFIG).get_decoder().layers[0].self_attn
    trained(attention)
    for module in attention.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.float()
            module.lora_B.float()
    one, other = torch.randn(2, 3, base.config.hidden_size, dtype=torch.float64)
    key = attention.k_proj
    change = key.lora_B["default"].weight @ key.lora_A["default"].weight * 2
    for values in (one, other, one, one):
        attention.q_proj(one)
        expected = values @ (key.base_layer.weight + change).t()
        assert torch.allclose(key(values), expected)


@pytest.mark.parametrize(
    "change", [{"dropout": 0.1}, {"use_dora": True}, {"dropout": 0.1, "use_rslora": True}]
)
def test_dropout_and_dora_are_peft_s_own(base: Any, change: dict[str, Any]) -> None:
    adapted = add_adapter(base, dataclasses.replace(CONFIG, **change))
    assert not any(hasattr(module, "shared_input") for module in adapted.modules())


def test_a_bf16_layer_and_its_adapter_say_what_peft_says_to_rounding(
    tiny: ModelConfig, init: InitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ours = logits(trained(add_adapter(initialize(tiny, init, 0, torch.bfloat16), CONFIG))).float()
    monkeypatch.setattr(adapting, "make_linear", lambda *_, **__: None)
    torch.manual_seed(0)
    adapted = trained(add_adapter(initialize(tiny, init, 0, torch.bfloat16), CONFIG))
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            del module.lora_variant["default"]
            module.cast_input_dtype_enabled = True
    theirs = logits(adapted).float()
    assert 0 < (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.fault("J06")
def test_targets_that_match_nothing_are_refused(base: Any) -> None:
    wrong = LoRAAdapterConfig(r=2, alpha=2.0, dropout=0.0, targets=("q_prj",))
    with pytest.raises(UsageError, match="'q_prj' matches no linear module.*did you mean 'q_proj'"):
        add_adapter(base, wrong)
    head = LoRAAdapterConfig(r=2, alpha=2.0, dropout=0.0, targets=("lm_head",))
    with pytest.raises(UsageError, match="'lm_head' matches no linear module"):
        add_adapter(base, head)
    with pytest.raises(UsageError, match=r"lora\.targets is empty; name modules or write all-lin"):
        add_adapter(base, LoRAAdapterConfig(r=2, alpha=2.0, dropout=0.0, targets=()))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "down_proj")])
def test_the_adapters_size_is_counted_exactly(
    base: Any, tiny: ModelConfig, targets: Any, use_dora: bool
) -> None:
    config = LoRAAdapterConfig(r=3, alpha=2.0, dropout=0.0, targets=targets, use_dora=use_dora)
    adapted = add_adapter(base, config)
    added = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert config.num_parameters(tiny) == added


@pytest.mark.parametrize(
    "change", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": 3}, {"rank": 2}]
)
def test_settings_are_validated(change: dict[str, Any]) -> None:
    good = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj"]}
    assert build(LoRAAdapterConfig, good).targets == ("q_proj",)
    assert build(LoRAAdapterConfig, {**good, "targets": "all-linear"}).targets == "all-linear"
    with pytest.raises(UsageError, match=next(iter(change))):
        build(LoRAAdapterConfig, {**good, **change})


@pytest.mark.fault("J01")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_merged_equals_adapter(
    tiny: ModelConfig, init: InitConfig, tie_embeddings: bool, kind: str
) -> None:
    model = initialize(dataclasses.replace(tiny, tie_embeddings=tie_embeddings), init, 0)
    before = logits(model)
    adapted = trained(add_adapter(model, KINDS[kind]))
    with_adapter = logits(adapted)
    assert (with_adapter - before).abs().max() > 0.1
    merged = merge_adapter(adapted)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name in merged.state_dict())
    assert (logits(merged) - with_adapter).abs().max() <= 1e-5


@pytest.mark.fault("J01")
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_merged_in_fp32_and_rounded_once(
    tiny: ModelConfig, init: InitConfig, kind: str
) -> None:
    model = initialize(tiny, init, 0, torch.bfloat16)
    name = "layers.0.self_attn.q_proj"
    before = model.get_submodule(f"model.{name}").weight.detach().float()
    adapted = trained(add_adapter(model, KINDS[kind]))
    module = adapted.get_submodule(f"base_model.model.model.{name}")
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    assert down.dtype == up.dtype == torch.float32
    # alpha / r = 8 / 4; alpha / sqrt(r) = 8 / 2
    factor = 4.0 if KINDS[kind].use_rslora else 2.0
    expected = (before.double() + factor * (up.double() @ down.double())).float()
    if KINDS[kind].use_dora:
        lengths = module.lora_magnitude_vector["default"].weight.double()
        expected = (expected * (lengths / expected.double().norm(dim=1))[:, None]).detach()
    expected = expected.bfloat16()
    merged = merge_adapter(adapted)
    assert torch.equal(merged.get_submodule(f"model.{name}").weight, expected)


@pytest.mark.fault("J02")
def test_merging_twice_is_refused(base: Any) -> None:
    merged = merge_adapter(trained(add_adapter(base, CONFIG)))
    with pytest.raises(UsageError, match="no LoRA adapter, or it was merged already; give"):
        merge_adapter(merged)  # type: ignore[arg-type]


@pytest.mark.fault("J03")
def test_an_adapter_that_was_not_trained_is_refused(base: Any, tmp_path: Path) -> None:
    adapted = add_adapter(base, CONFIG)
    with pytest.raises(CheckpointError, match=r"zero everywhere.*not trained; run the lora stage"):
        merge_adapter(adapted)
    with pytest.raises(CheckpointError, match="zero everywhere"):
        save_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.fault("J03")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(base: Any, tmp_path: Path, value: float) -> None:
    adapted = trained(add_adapter(base, CONFIG))
    weight = adapted.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight
    with torch.no_grad():
        weight[0, 0] = value
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.lora_A.*lower schedule"):
        merge_adapter(adapted)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        save_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_saved_adapter_is_read_by_peft_elsewhere(
    base: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    save_model(base, tokenizer_folder, tmp_path / "base", torch.float32)
    for kind in ("lora", "both"):
        folder = tmp_path / kind
        adapted = trained(add_adapter(copy.deepcopy(base), KINDS[kind]))
        manifest = save_adapter(adapted, folder, base="dpo/model", base_fingerprint="abc")
        assert (manifest["kind"], manifest["base_fingerprint"]) == ("adapter", "abc")
        assert {file["path"] for file in manifest["files"]} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        settings = storage.read_json(folder / "adapter_config.json")
        assert settings["base_model_name_or_path"] == "dpo/model"
        assert settings["target_modules"] == sorted(settings["target_modules"])
        torch.save(logits(adapted), tmp_path / f"{kind}.pt")
    code = (
        "import torch, sys; from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids = torch.arange(40).view(2, 20) * 7 % 320\n"
        "for kind in ('lora', 'both'):\n"
        "    base = AutoModelForCausalLM.from_pretrained('base')\n"
        "    model = PeftModel.from_pretrained(base, kind).eval()\n"
        "    with torch.no_grad(): found = model(input_ids=ids).logits\n"
        "    print((found - torch.load(kind + '.pt')).abs().max().item() <= 1e-5)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_path_of_this_machine_is_not_written_down(base: Any, tmp_path: Path) -> None:
    adapted = trained(add_adapter(base, CONFIG))
    with pytest.raises(
        UsageError, match="is a path of this machine; give a name such as dpo/model"
    ):
        save_adapter(adapted, tmp_path / "adapter", base=str(tmp_path))
    save_adapter(adapted, tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.fault("J02")
def test_loading_checks_base_and_bytes(
    base: Any, tiny: ModelConfig, init: InitConfig, tmp_path: Path
) -> None:
    plain = copy.deepcopy(base)
    adapted = trained(add_adapter(base, CONFIG))
    folder = tmp_path / "adapter"
    save_adapter(adapted, folder, base_fingerprint="right")
    loaded = load_adapter(copy.deepcopy(plain), folder, base_fingerprint="right")
    assert torch.equal(logits(loaded), logits(adapted))
    with pytest.raises(CheckpointError, match=r"trained on the base model right, not.*\(wrong\)"):
        load_adapter(plain, folder, base_fingerprint="wrong")
    wider = initialize(dataclasses.replace(tiny, intermediate_size=64), init, 0)
    with pytest.raises(CheckpointError, match="does not fit this model.*it was trained on"):
        load_adapter(wider, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_adapter(plain, folder)
