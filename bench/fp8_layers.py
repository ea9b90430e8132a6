"""Where the time of the 7B's layers goes: forward and backward, with gradients added up.

    PYTHONPATH=src python bench/fp8_layers.py [bf16_plain] [bf16] [fp8] [fp8_torchao]
                                              [--micro-batch 4] [--cheap] [--keep] [--lora]

One JSON line a precision: milliseconds a layer and micro-batch, seconds to compile, memory, and the
kernels that take longest, in microseconds a layer. Needs a GPU; fp8 needs Hopper.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch

from sevenfold.base.console import print_raw
from sevenfold.model import accumulating, attention, float8, lora
from sevenfold.model.config import LoRAAdapterConfig, read_model_file
from sevenfold.workflow import workbench

MODEL = read_model_file(Path(__file__).parents[1] / "configs" / "model_7b.py")
LAYERS, LENGTH, REPEATS, SHOWN = 4, 2048, 10, 28
ADAPTER = LoRAAdapterConfig(r=16, alpha=32.0, dropout=0.0, targets="all-linear")
CONVERT = {
    "bf16_plain": lambda model: model,
    "bf16": accumulating.accumulate_in_products,
    "fp8": float8.convert_to_float8,
    "fp8_torchao": float8.convert_with_torchao,
}


def build(precision: str, *, keep: bool, adapted: bool) -> Any:
    """Return a few layers of the 7B, compiled as training compiles them, frozen if ``adapted``."""
    from transformers import LlamaForCausalLM

    torch.compiler.reset()
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL, num_layers=LAYERS, vocab_size=1024)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(
            config.to_hf(), attn_implementation=attention.IMPLEMENTATION
        )
    torch.set_default_dtype(torch.float32)
    CONVERT["bf16_plain" if adapted and precision == "bf16" else precision](model)
    if adapted:
        lora.add_adapter(model, ADAPTER)
    functorch.ban_recompute_materialized_backward = precision != "fp8" or keep or adapted
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return model


def measure(precision: str, micro_batch: int, *, keep: bool, adapted: bool) -> dict[str, Any]:
    """Time a precision and name its longest kernels."""
    model = build(precision, keep=keep, adapted=adapted)
    ids_bt = torch.randint(0, 1024, (micro_batch, LENGTH), device="cuda")

    def step(*, first: bool = False) -> None:
        float8.begin_step(model)
        if first:
            accumulating.begin_step(model)
        hidden_bth = model.model(input_ids=ids_bt, use_cache=False).last_hidden_state
        hidden_bth.float().square().mean().backward()
        float8.end_step(model)

    started = time.perf_counter()
    step(first=True)
    torch.cuda.synchronize()
    compiled_s = time.perf_counter() - started
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(REPEATS):
        step()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - started) / REPEATS / LAYERS * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    per_layer = 3 * LAYERS
    return {
        "precision": precision,
        "adapted": adapted,
        "micro_batch": micro_batch,
        "layer_ms": round(milliseconds, 3),
        "compile_s": round(compiled_s, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "kernels_us": [
            [row.key[:110], round(row.self_device_time_total / per_layer, 1), row.count / per_layer]
            for row in rows[:SHOWN]
        ],
    }


def main() -> None:
    """Measure the precisions asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("precision", nargs="*", default=list(CONVERT))
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--cheap", action="store_true", help="recompute what costs little")
    parser.add_argument("--keep", action="store_true", help="keep transposed inputs in FP8")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16, all else frozen")
    options = parser.parse_args()
    functorch.activation_memory_budget = workbench.CHEAP if options.cheap else 1.0
    attention.register_attention()
    attention.prefer_fast_kernels(torch.cuda.get_device_capability(), deterministic=False)
    for precision in options.precision:
        asked = {"keep": options.keep, "adapted": options.lora}
        print_raw(json.dumps(measure(precision, options.micro_batch, **asked)) + "\n")


if __name__ == "__main__":
    main()
