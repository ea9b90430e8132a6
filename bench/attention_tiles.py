"""FlexAttention at the 7B's heads, tile by tile, on masks of the benchmark's own rows.

    PYTHONPATH=src python bench/attention_tiles.py [--processes 12]

Pretraining, conversations and pairs with shared prompts, rows of 2048. Every candidate is compiled
first, several at a time; then each is timed alone. A line a candidate: milliseconds forward, back
and to make the mask, for each kind of rows; the sums show whether all come to the same. Needs a
GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sevenfold.base.console import print_raw
from sevenfold.data.batches import Batch
from sevenfold.data.random_rows import RandomRows, random_conversations, random_preferences
from sevenfold.model.attention import may_look
from sevenfold.model.config import read_model_file
from sevenfold.workflow.trial import DOCUMENTS_PER_ROW

MODEL = read_model_file(Path(__file__).parents[1] / "configs" / "model_7b.py")
LENGTH, ROWS, DEVICE = 2048, 4, "cuda"
HEAD = MODEL.hidden_size // MODEL.num_heads
# Tokens of a mask's block, of queries and of keys; query and key tiles, stages and warps forward;
# the same backward, where gradients of keys and of queries have tiles of their own; anything else.
# None: what torch.compile takes.
Candidate = tuple[tuple[int, int], tuple[int, ...] | None, tuple[int, ...] | None, dict[str, bool]]
FORWARD = ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps")
BACKWARD = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps")
# Gives NaN: a tile has rows that see nothing in it. It is what the timings were taken with.
SAFE = {"ROWS_GUARANTEED_SAFE": True}
CANDIDATES: list[Candidate] = [
    ((128, 128), None, None, {}),
    ((128, 128), (64, 64, 3, 4), (64, 128, 128, 64, 2, 8), SAFE),
    ((128, 128), (64, 64, 2, 4), (64, 128, 128, 64, 3, 8), SAFE),
    ((128, 128), (64, 64, 4, 4), (64, 128, 128, 32, 3, 8), {}),
    ((128, 128), (64, 64, 3, 4), None, {"fwd_USE_TMA": True, "PRESCALE_QK": True, **SAFE}),
    ((128, 128), (128, 64, 2, 8), (32, 128, 128, 32, 3, 8), {}),
    ((64, 64), (64, 64, 3, 4), (32, 64, 64, 32, 3, 4), SAFE),
    ((64, 64), (64, 64, 2, 4), (64, 64, 64, 64, 2, 4), {}),
    ((64, 64), (64, 32, 3, 4), (64, 64, 64, 64, 2, 8), {}),
    ((64, 64), (64, 64, 3, 4), (32, 64, 64, 32, 2, 4), {"fwd_USE_TMA": True}),
    ((64, 128), (64, 64, 3, 4), (64, 128, 64, 64, 3, 8), {}),
    ((128, 64), (128, 64, 3, 8), (64, 64, 128, 64, 3, 8), {}),
]


def options(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as FlexAttention's kernel options."""
    _, forward, backward, more = candidate
    found = {f"fwd_{name}": value for name, value in zip(FORWARD, forward or (), strict=False)}
    found |= {f"bwd_{name}": value for name, value in zip(BACKWARD, backward or (), strict=False)}
    return found | more


def batches() -> dict[str, Batch]:
    """Return four rows of each kind."""
    told: dict[str, Any] = {"vocab_size": 1024, "seed": 1}
    shown = np.arange(ROWS)
    of = {
        "pretrain": RandomRows(LENGTH, vocab_size=1024, documents_per_row=DOCUMENTS_PER_ROW),
        "sft": random_conversations(100_000, LENGTH, **told),
        "dpo": random_preferences(100_000, LENGTH, share_prompts=True, **told),
    }
    return {name: rows.batch(shown, LENGTH) for name, rows in of.items()}


def mask_maker(batch: Batch, block: tuple[int, int]) -> Callable[[], BlockMask]:
    """Return what makes the mask of a batch in blocks of so many tokens."""
    assert batch.documents_bt is not None
    branches = None if batch.branches_bt is None else batch.branches_bt.to(DEVICE)
    rule = may_look(batch.documents_bt.to(DEVICE), branches)
    make: Callable[..., BlockMask] = torch.compile(create_block_mask)
    return functools.partial(
        make, rule, ROWS, None, LENGTH, LENGTH, device=DEVICE, BLOCK_SIZE=block
    )


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and the output's gradient, laid out as layers do."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    heads = (MODEL.num_heads, MODEL.num_kv_heads, MODEL.num_kv_heads, MODEL.num_heads)
    tensors = [
        torch.randn(ROWS, LENGTH, n, HEAD, device=DEVICE, generator=generator).bfloat16()
        for n in heads
    ]
    query, key, value = (t.transpose(1, 2).requires_grad_() for t in tensors[:3])
    return query, key, value, tensors[3]


def work(mine: list[int], barrier: Any, lock: Any, results: Any) -> None:
    """Compile these candidates, wait for the others, then time each alone."""
    # A variant a candidate and kind of rows; a graph is gone through more than once.
    torch._dynamo.config.recompile_limit = 100
    torch._inductor.config.compile_threads = 1
    torch._functorch.config.donated_buffer = False
    query, key, value, gradient = drawn()
    inputs = (query, key, value)
    kinds = batches()
    ready: dict[tuple[int, str], tuple[Callable[[], Tensor], Callable[[], BlockMask]]] = {}
    failed: dict[int, str] = {}

    def attend(made: BlockMask, told: dict[str, Any]) -> Tensor:
        out = flex_attention(
            query, key, value, block_mask=made, enable_gqa=True, kernel_options=told
        )
        return out.transpose(1, 2).contiguous()

    for number in mine:
        for name, batch in kinds.items():
            try:
                make = mask_maker(batch, CANDIDATES[number][0])
                compiled = torch.compile(attend, dynamic=False)
                run = functools.partial(compiled, make(), options(CANDIDATES[number]))
                torch.autograd.grad(run(), inputs, gradient)
                ready[number, name] = (run, make)
            except Exception as error:  # a tile that does not fit is a result, too
                failed[number] = str(error)[:200]
    barrier.wait(timeout=150)
    for number in mine:
        line: dict[str, Any] = {"candidate": CANDIDATES[number], "failed": failed.get(number)}
        for name in kinds:
            if (number, name) in ready:
                with lock:
                    line[name] = timed(*ready[number, name], inputs, gradient)
        results.put((number, line))


def timed(
    run: Callable[[], Tensor],
    make: Callable[[], BlockMask],
    inputs: tuple[Tensor, ...],
    gradient: Tensor,
) -> dict[str, Any]:
    """Return milliseconds of both passes and of making the mask, and what came out, summed up."""
    from triton.testing import do_bench

    out = run()
    back = functools.partial(torch.autograd.grad, out, inputs, gradient, retain_graph=True)
    milliseconds = [
        round(do_bench(each, warmup=20, rep=reps, return_mode="median"), 4)
        for each, reps in ((run, 80), (back, 120), (make, 40))
    ]
    sums = [float(x.detach().double().abs().sum()) for x in (out, *back())]
    return dict(zip(("forward", "backward", "mask"), milliseconds, strict=True), sums=sums)


def main() -> None:
    """Time them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=12)
    count = min(parser.parse_args().processes, len(CANDIDATES))
    context = multiprocessing.get_context("spawn")
    barrier, lock, results = context.Barrier(count), context.Lock(), context.Queue()
    shares = [list(range(start, len(CANDIDATES), count)) for start in range(count)]
    workers = [
        context.Process(target=work, args=(share, barrier, lock, results)) for share in shares
    ]
    for worker in workers:
        worker.start()
    for _ in CANDIDATES:
        print_raw(json.dumps(results.get(timeout=300)[1]) + "\n")
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
