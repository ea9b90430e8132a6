"""One worst-case step of a stage on random tokens: does it fit, before anything starts?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sevenfold.base import storage
from sevenfold.base.hardware import OOMHandler, detect_gpu_type
from sevenfold.data.batches import Batches, RandomRows
from sevenfold.model import attention
from sevenfold.model import lora as adapters
from sevenfold.objective.next_token import NEXT_TOKEN
from sevenfold.train import checkpoint, loop, optimizer, parallel
from sevenfold.train.config import ContextPhase, TrainConfig
from sevenfold.train.recovery import Decisions, StepGuard, StopRequest
from sevenfold.workflow import workbench
from sevenfold.workflow.recipe import Recipe

STEPS_PER_LENGTH = 3
DOCUMENTS_PER_ROW = 8


def rehearse(recipe: Recipe, stage: str, config: TrainConfig) -> list[dict[str, float]]:
    """Build the stage's model with random weights and train a few steps at every context length.

    ``config`` is the stage's, with what the hardware decides decided. The optimizer's state exists
    from the second step on, so the peak of the last step is the run's.

    Returns:
        a row per context length: seq_len, peak_gib, step_s and tok_s of the last step.
    Errors:
        MemoryExhaustedError: it does not fit at the configured micro-batch.
    """
    processes = parallel.join()
    scorer = _random_model(recipe, stage, config, processes)
    made = optimizer.make_optimizer(scorer, config.optimizer)
    rows = []
    for length in sorted({phase.length for phase in config.contexts}):
        bench = _bench(recipe, stage, config, processes, scorer, made, length)
        for batch in bench.batches.prefetch(0):
            if processes.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            loop.train_step(bench, batch, length, StopRequest())
            bench.step += 1
            spent_s = time.perf_counter() - started
        rate = config.tokens_per_batch / spent_s / processes.world
        peak = torch.cuda.max_memory_allocated() / 2**30 if processes.device.type == "cuda" else 0.0
        rows.append({"seq_len": length, "peak_gib": peak, "step_s": spent_s, "tok_s": rate})
    return rows


def _random_model(
    recipe: Recipe, stage: str, config: TrainConfig, processes: parallel.Processes
) -> Any:
    from transformers import LlamaForCausalLM

    kernel = workbench.set_backends(config, recipe.kernels)
    torch.manual_seed(recipe.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(workbench.DTYPES[config.weights])
    try:
        with processes.device:
            model = LlamaForCausalLM._from_config(
                recipe.model.to_hf(), attn_implementation=attention.IMPLEMENTATION
            )
    finally:
        torch.set_default_dtype(before)
    scorer = workbench.make_scorer(model.train(), config, kernel)
    if stage == "lora":
        scorer.model = adapters.add_adapter(scorer.model, recipe.lora.adapter)
    workbench.place(scorer, config, processes)
    return scorer


def _bench(
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    processes: parallel.Processes,
    scorer: Any,
    made: torch.optim.Optimizer,
    length: int,
) -> loop.Workbench:
    nowhere = Path("/dev/null")
    masked = config.mask_documents or stage != "pretrain"
    rows = RandomRows(
        config.longest_context,
        vocab_size=recipe.model.vocab_size,
        documents_per_row=DOCUMENTS_PER_ROW if masked else None,
    )
    return loop.Workbench(
        stage=stage,
        scorer=scorer,
        objective=NEXT_TOKEN,
        batches=Batches(
            rows,
            tokens_per_batch=config.tokens_per_batch,
            contexts=[ContextPhase(length=length, until=1.0)],
            num_steps=STEPS_PER_LENGTH,
            seed=recipe.seed,
            rank=processes.rank,
            world=processes.world,
        ),
        validation=[],
        optimizer=made,
        config=config,
        processes=processes,
        checkpoints=checkpoint.Checkpoints(nowhere, keep=1),
        metrics=storage.JsonLines(nowhere),
        memory=OOMHandler(config.micro_batch, enabled=False),
        progress=workbench.Unseen(),
        identity={},
        flops_per_token=recipe.model.flops_per_token,
        peak_flops=detect_gpu_type()["peak_bf16_tflops"] * 1e12,
        guard=StepGuard(sigma=None, max_in_a_row=STEPS_PER_LENGTH),
        decisions=Decisions(),
    )
