"""What FP8 does to the scores of a real model's answers; on a CPU, its roundings emulated.

    PYTHONPATH=src python bench/smollm2/fp8_scores.py MODEL RUN/data/dpo/rows [--rows N]

Three tables. The first: log-probabilities of answers by inputs' own scales (as a reference without
held ones would have them), by those of earlier steps (as training has them), and by held ones,
against exact products and against each other. The second: what one step of the same size for every
weight, along the gradient of DPO, changes in the margins of one row, for weights in fp32 as they
were stored, drawn anew within their rounding, and in bf16 rounded stochastically. The third:
torchao's FP8, whose scales are those of what is computed together: several rows, and one by one.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from torch import Tensor

from sevenfold.base.console import print_raw
from sevenfold.data.packing import PackedPreferences, Preference
from sevenfold.model import attention, float8, llama
from sevenfold.model.rounded_weights import spread
from sevenfold.objective.next_token import Scorer
from sevenfold.objective.preference import (
    answer_scores,
    input_magnitudes,
    preference_objective,
    reference_scores,
)

ROW, SEED = 1024, 7
STEPS = (5e-7, 5e-6)
CPU: Any = {"device": torch.device("cpu"), "autocast": contextlib.nullcontext()}


def scorer_of(folder: Path, *, fp8: bool, weights: dict[str, Tensor] | None = None) -> Scorer:
    """Load the model, with other weights where some are given."""
    model = llama.load_model(folder, attn_implementation=attention.IMPLEMENTATION)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return Scorer(float8.convert_to_float8(model, emulate=True) if fp8 else model, kernel="plain")


def scores(scorer: Scorer, rows: PackedPreferences, *, together: int = 1) -> Tensor:
    """Return log-probabilities [pairs, 2] as a reference gets them."""
    return torch.from_numpy(reference_scores(scorer, rows, micro_batch=together, **CPU))


def scores_in_training(scorer: Scorer, rows: PackedPreferences) -> Tensor:
    """Return them [pairs, 2] as a step sees them, after some that found the scales."""
    input_magnitudes(scorer, rows, num_rows=1, micro_batch=1, **CPU)
    found = torch.zeros(len(rows.preferences), 2)
    for _ in range(float8.ROUNDS + 1):
        float8.begin_step(scorer)
        for number, pack in enumerate(rows.packs):
            batch = rows.batch(np.array([number]), ROW)
            found[pack] = answer_scores(scorer(batch), batch)[0][0, : len(pack)].detach()
        float8.end_step(scorer)
    return found


def apart(title: str, one: Tensor, other: Tensor) -> None:
    """Print how far scores and margins are apart."""
    answers = one - other
    margins = answers[:, 0] - answers[:, 1]
    print_raw(f"| {title} | {answers.std():.2f} | {margins.std():.2f} |\n")


def rounded_stochastically(weight: Tensor) -> Tensor:
    """Return the weights as bf16 numbers, one of the two neighbours each."""
    noise = torch.randint(0, 1 << 16, weight.shape, dtype=torch.int32)
    return ((weight.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


def step(folder: Path, rows: PackedPreferences) -> None:
    """Print what a step changes in exact products and in FP8."""
    scorer = scorer_of(folder, fp8=False)
    rows.reference_n2 = scores(scorer, rows).numpy()
    objective = preference_objective(beta=0.1, nll_weight=1.0)
    objective.total(scorer, rows.batch(np.array([0]), ROW)).total.backward()
    parameters = dict(scorer.causal_model.named_parameters())
    moves = {name: -each.grad.sign() for name, each in parameters.items() if each.grad is not None}
    stored = {name: parameters[name].detach() for name in moves}
    drawn = {name: weight.clone() for name, weight in stored.items()}
    spread(drawn.values(), SEED)
    variants: Any = {
        "fp32, as stored": (stored, lambda weight: weight),
        "fp32, drawn anew": (drawn, lambda weight: weight),
        "bf16, stochastic rounding": (stored, rounded_stochastically),
    }
    for title, (start, kept) in variants.items():
        for size in STEPS:
            changes = []
            for fp8 in (False, True):
                torch.manual_seed(SEED)
                after = {name: kept(start[name] + size * move) for name, move in moves.items()}
                pair = [scores(scorer_of(folder, fp8=fp8, weights=w), rows) for w in (start, after)]
                changes.append((pair[1] - pair[0])[: len(rows.packs[0])])
            exact, found = (each[:, 0] - each[:, 1] for each in changes)
            print_raw(
                f"| {title} | {size:g} | {exact.mean():+.2f} | {found.mean():+.2f} | "
                f"{(found - exact).std():.2f} |\n"
            )


def torchaos(folder: Path, rows: PackedPreferences, exact: Tensor) -> None:
    """Print what torchao's FP8 makes of rows that are computed together."""
    model = llama.load_model(folder, attn_implementation=attention.IMPLEMENTATION)
    scorer = Scorer(float8.convert_with_torchao(model, emulate=True), kernel="plain")
    alone = scores(scorer, rows)
    apart("torchao's FP8, one by one, from exact", alone, exact)
    for together in range(2, rows.num_rows + 1, 2):
        found = scores(scorer, rows, together=together)
        apart(f"torchao's FP8, {together} rows together, from one by one", found, alone)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=3)
    options = parser.parse_args()
    attention.register_attention()
    table = load_from_disk(str(options.pairs))
    columns = zip(table["prompt_ids"], table["chosen_ids"], table["rejected_ids"], strict=True)
    pairs = [Preference(*row) for row in columns][:200]
    packs = PackedPreferences(pairs, ROW, pad_id=0, seed=SEED).packs[: options.rows]

    def some(chosen: list[list[int]]) -> PackedPreferences:
        picked = [pairs[number] for pack in chosen for number in pack]
        return PackedPreferences(picked, ROW, pad_id=0, seed=SEED)

    rows = some(packs)
    print_raw(f"{len(rows.preferences)} pairs in {rows.num_rows} rows of {ROW}; nats\n\n")
    print_raw("| scores | answers apart by | margins |\n| --- | ---: | ---: |\n")
    exact = scores(scorer_of(options.model, fp8=False), rows)
    scorer = scorer_of(options.model, fp8=True)
    own, delayed = scores(scorer, rows), scores_in_training(scorer, rows)
    apart("FP8, own scales, from exact", own, exact)
    apart("FP8, delayed scales, from own ones", delayed, own)
    magnitudes = input_magnitudes(scorer, rows, num_rows=rows.num_rows, micro_batch=1, **CPU)
    assert magnitudes is not None
    float8.hold_inputs(scorer, torch.from_numpy(magnitudes))
    held = scores(scorer, rows)
    apart("FP8, held scales, from exact", held, exact)
    apart("FP8, held scales, in training", scores_in_training(scorer, rows), held)
    print_raw("\n| weights | step | margins, exact | FP8 | error |\n| --- |" + " ---: |" * 4 + "\n")
    step(options.model, some(packs[:1]))
    print_raw("\n| scores | answers apart by | margins |\n| --- | ---: | ---: |\n")
    torchaos(options.model, rows, exact)


if __name__ == "__main__":
    main()
