"""What most people run, beside ours: transformers' Llama with all of Liger and a plain loop.

    python bench/peers/transformers_liger.py pretrain|sft [--preset 7b] [--set a.b=c] [--steps N]
        [--micro-batch N] [--peer-tokens N] [--recompute] [--compile] [--alone]

Three JSON lines: ours, theirs, and the ratio. On a GPU Liger puts in RoPE, RMSNorm, SwiGLU and the
fused linear cross-entropy; on a CPU, where its kernels fail, the plain model trains, for a test.
Packed rows are told apart by positions that begin again, as transformers does it.
"""

from __future__ import annotations

from typing import Any

import beside
import numpy as np
import torch

from sevenfold.data.batches import NO_TARGET, Batch
from sevenfold.train import optimizer


def model_of(asked: beside.Asked) -> Any:
    """Return the model with Liger's kernels in it, where there is a GPU."""
    if asked.device.type == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True,
            rms_norm=True,
            swiglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=True,
        )
    model = beside.llama(asked).train()
    model.config.use_cache = False
    if asked.options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return torch.compile(model) if asked.options.compile else model


def loss_of(model: Any, batch: Batch, num_targets: int) -> torch.Tensor:
    """Return the model's own loss, as a share of the whole step's."""
    labels = torch.where(batch.targets_bt < 0, NO_TARGET, batch.targets_bt)
    found: torch.Tensor = model(
        input_ids=batch.inputs_bt,
        position_ids=batch.positions_bt if batch.documents_bt is not None else None,
        labels=labels,  # what is given as shifted already is not shifted again
        shift_labels=labels,
        num_items_in_batch=num_targets,
    ).loss
    return found


def main() -> None:
    """Measure ours, then theirs, and print the ratio."""
    asked = beside.ask(__doc__.splitlines()[0], ("pretrain", "sft"))
    beside.measure_ours(asked)
    config, rows, model = asked.config, beside.random_rows(asked), model_of(asked)
    updater = optimizer.make_optimizer(model, config.optimizer)
    optimizer.set_learning_rate(updater, 1e-6)
    rows_a_step = max(1, round(asked.rows_a_step))
    autocast = torch.autocast(asked.device.type, torch.bfloat16, enabled=config.precision != "fp32")
    timer = beside.Timer()
    for step in range(beside.WARM_UP + asked.options.steps):
        places = np.arange(step * rows_a_step, (step + 1) * rows_a_step) % rows.num_rows
        whole = rows.batch(places, config.longest_context)
        num_targets = int((whole.targets_bt != NO_TARGET).sum())
        with timer.step():
            for part in whole.split(asked.micro_batch):
                with autocast:
                    loss = loss_of(model, part.to(asked.device), num_targets)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            updater.step()
            updater.zero_grad(set_to_none=True)
            fill = getattr(rows, "fill", 1.0)
            tokens = rows_a_step * config.longest_context
            timer.count(tokens_s_per_gpu=tokens, non_padding_tokens_s_per_gpu=tokens * fill)
    key = "tokens_s_per_gpu" if asked.what == "pretrain" else "non_padding_tokens_s_per_gpu"
    liger = asked.device.type == "cuda"
    beside.finish(asked, "transformers", timer.rates(), key, liger=liger, loss=float(loss.detach()))


if __name__ == "__main__":
    main()
