"""The kernels of the optimizer's phase on the 7B's shapes, beside what torch.compile makes of them.

    PYTHONPATH=src python bench/optimizer_kernels.py [--repeats 10]

A layer's matrices and the head, random weights and gradients, moments from three steps. A line a
case, extrapolated to the weights of the 7B; then how far the two updates are apart.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sevenfold.base.console import print_raw
from sevenfold.model import many_tensors
from sevenfold.model.config import read_model_file
from sevenfold.model.float8_linear import E4M3
from sevenfold.train import adamw_8bit, adamw_8bit_triton
from sevenfold.train.adamw_8bit import BLOCK, MOMENTS

MODEL = read_model_file(Path(__file__).parents[1] / "configs" / "model_7b.py")
CONFIGURATIONS = ((8, 8), (4, 4), (16, 16), (16, 8), (8, 4))  # blocks a program, and its warps
CONSTANTS = (0.9, 0.95, 1e-8)
# Kept weight, step size, 1 / sqrt(correction 2), factor of the gradients: of the fourth step.
FACTORS = (1 - 3e-5, 3e-4 / (1 - 0.9**4), (1 - 0.95**4) ** -0.5, 0.7)


def shapes() -> list[tuple[int, int]]:
    """Return the matrices of a layer, and the head."""
    wide, inner = MODEL.hidden_size, MODEL.intermediate_size
    of_keys = wide // MODEL.num_heads * MODEL.num_kv_heads
    attention = [(wide, wide), (of_keys, wide), (of_keys, wide), (wide, wide)]
    return [*attention, (inner, wide), (inner, wide), (wide, inner), (MODEL.vocab_size, wide)]


def drawn(shape: tuple[int, int]) -> list[Tensor]:
    """Return weights, gradient, codes and scales, in blocks, after three steps."""
    blocks = math.prod(shape) // BLOCK
    weights = torch.randn(blocks, BLOCK, device="cuda", dtype=torch.bfloat16) * 0.02
    codes = [torch.zeros(blocks, BLOCK, device="cuda", dtype=torch.uint8) for _ in MOMENTS]
    scales = [torch.zeros(blocks, 1, device="cuda") for _ in MOMENTS]
    for _ in range(3):  # rows of unlike sizes, as gradients have them
        gradient = torch.randn_like(weights) * 1e-5 * torch.randn_like(weights[:, :1]).exp()
        update(adamw_8bit_triton.update_blocks, [weights, gradient, *codes, *scales])
    return [weights, gradient, *codes, *scales]


def update(kernel: Callable[..., None], tensors: list[Tensor]) -> None:
    """Update one matrix."""
    kernel(*tensors, *constants(), *CONSTANTS)


@functools.cache
def constants() -> list[Any]:
    """Return the tables of both moments, the factors, and a seed."""
    kinds = [adamw_8bit._codes_of(moment, torch.device("cuda")) for moment in MOMENTS]
    return [*kinds, torch.tensor(FACTORS).cuda(), torch.tensor(7, dtype=torch.int32).cuda()]


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Return what torch.compile makes of a function, for matrices of any size."""
    made = torch.compile(function, options={"assert_indirect_indexing": False})

    def of_any_size(*given: Any) -> None:
        for tensor in (each for each in given if isinstance(each, Tensor) and each.ndim == 2):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        made(*given)

    return of_any_size


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of the GPU, and of the host, which does not wait for it."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(10_000_000)  # some 5 ms, in which the host gets ahead
        begin.record()
        started = time.perf_counter()
        work()
        host = (time.perf_counter() - started) * 1000
        end.record()
        torch.cuda.synchronize()
        times.append((begin.elapsed_time(end), host))
    gpus, hosts = zip(*times[2:], strict=True)
    return statistics.median(gpus), statistics.median(hosts)


def cases(matrices: list[list[Tensor]]) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return what is timed, and the bytes of a weight that it moves."""
    kernels = {"update, compiled": compiled(adamw_8bit._update_blocks)}
    for blocks, warps in CONFIGURATIONS:
        kernels[f"update, {blocks} blocks, {warps} warps"] = functools.partial(
            adamw_8bit_triton.update_blocks, blocks=blocks, num_warps=warps
        )
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, kernel in kernels.items():
        found[name] = lambda kernel=kernel: [update(kernel, each) for each in matrices], 10
    weights, gradients = ([each[place] for each in matrices] for place in (0, 1))
    targets = [torch.empty_like(weight, dtype=E4M3) for weight in weights]
    scales = torch.full((len(weights),), 64.0, device="cuda")
    singly = list(zip(weights, scales, targets, strict=True))
    found["norms, PyTorch's"] = lambda: torch._foreach_norm(gradients, 2, torch.float32), 2
    found["norms"] = lambda: many_tensors.norms(gradients, 2.0), 2
    found["largest"] = lambda: many_tensors.norms(weights, math.inf), 2
    cast = compiled(lambda weight, scale, target: target.copy_(weight * scale))
    found["casts, compiled"] = lambda: [cast(*each) for each in singly], 3
    found["casts"] = lambda: many_tensors.cast(weights, scales, targets), 3
    return found


def differences(tensors: list[Tensor]) -> str:
    """Say how far the compiled update and the kernel's are apart on one matrix."""
    made, said = [[tensor.clone() for tensor in tensors] for _ in range(2)], []
    update(compiled(adamw_8bit._update_blocks), made[0])
    update(adamw_8bit_triton.update_blocks, made[1])
    for name, place in (("weights", 0), ("codes", 2), ("codes of squares", 3)):
        apart = (made[0][place].float() - made[1][place].float()).abs()
        said.append(f"{name} {float((apart > 0).double().mean()):.1e}, at most {apart.max():.1e}")
    return "apart: " + "; ".join(said) + "\n"


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    matrices = [drawn(shape) for shape in shapes()]
    size, head = sum(each[0].numel() for each in matrices), matrices[-1][0].numel()
    for name, (work, num_bytes) in cases(matrices).items():
        gpu, host = timed(work, asked.repeats)
        casting = "casts" in name or name == "largest"  # neither embedding nor head
        whole = gpu / size * (MODEL.num_layers * (size - head) + (0 if casting else 2 * head))
        line = f"{name:26} {gpu:7.3f} ms, {size * num_bytes / gpu / 1e6:5.0f} GB/s"
        print_raw(f"{line}, host {host:6.3f} ms; the 7B {whole:6.1f} ms\n")
    print_raw(differences(matrices[4]))


if __name__ == "__main__":
    main()
