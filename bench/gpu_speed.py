"""Is this GPU as fast as its kind? One line in a few seconds: its products, its memory, its clock.

    PYTHONPATH=src python bench/gpu_speed.py

The exit code is 1 where products reach less than half of the data sheet's peak. What is measured
on such a GPU says nothing about others of its kind.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from sevenfold.base.console import print_raw
from sevenfold.base.gpu_clock import ClockWatch, power_limit_w
from sevenfold.base.hardware import detect_gpu_type, wait_for_gpu

SIZE, COPIED, SECONDS, LOOK_EVERY_S = 8192, 2**32, 2.0, 0.3


def rate(work: Callable[[], object], amount: float) -> float:
    """Return how much of ``amount`` is done a second, by a GPU that is warm."""
    work()
    wait_for_gpu()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        for _ in range(8):
            work()
        wait_for_gpu()
        count += 8
    return count * amount / (time.perf_counter() - started)


def main() -> None:
    """Measure both, print the line, and judge."""
    gpu = detect_gpu_type()
    if not gpu["num_gpus"]:
        sys.exit("gpu_speed: no GPU here")
    left, right = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    source = torch.randint(256, (COPIED,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    with ClockWatch(LOOK_EVERY_S) as clock:
        tflops = rate(lambda: torch.mm(left, right), 2 * SIZE**3) / 1e12
    line = {
        "case": "gpu_speed",
        "gpu": gpu["name"],
        "bf16_tflops": round(tflops, 1),
        "copied_tb_s": round(rate(lambda: target.copy_(source), 2 * COPIED) / 1e12, 3),
        "sm_clock_mhz": clock.sm_clock_mhz,
        "slowed_by": clock.slowed_by,
        "power_limit_w": power_limit_w(),
    }
    print_raw(json.dumps(line) + "\n")
    if tflops < gpu["peak_bf16_tflops"] / 2:
        sys.exit(f"gpu_speed: {tflops:.0f} of {gpu['peak_bf16_tflops']:.0f} TFLOP/s: a slow one")


if __name__ == "__main__":
    main()
