"""Pairs as long as UltraFeedback's: how full their rows are, and how many have to be shortened.

    PYTHONPATH=src python bench/pair_rows.py

The benchmark's own pairs in rows of three lengths; how much hangs on which pairs are drawn, and so
on how many; then a million drawn lengths against the bounds of a pair (`dpo.data.max_length`, its
prompt twice) and of an answer with its prompt (the context).
"""

from __future__ import annotations

import numpy as np

from sevenfold.base.console import print_raw
from sevenfold.data.packing import PackedPreferences
from sevenfold.data.random_rows import ANSWER, PROMPT, random_preferences

CONTEXT, BATCH, SEED = 2048, 131_072, 1
DRAWS, SEEDS = (1 << 19, 1 << 22, 1 << 24), (7, 1, 2)
ROWS, STEPS, BOUNDS, DRAWN = (2048, 4096, 8192), (2, 5, 40), (2048, 4096), 1_000_000


def main() -> None:
    """Pack, draw and print."""
    for steps in STEPS:
        pairs = random_preferences(
            steps * BATCH, CONTEXT, vocab_size=9, seed=SEED, share_prompts=True
        ).preferences
        for length in ROWS:
            packed = PackedPreferences(
                pairs, length, pad_id=0, seed=SEED, share_prompts=True, packing="tight"
            )
            print_raw(f"{steps} steps, rows of {length}: {packed.fill:.1%} no padding\n")
    for tokens in DRAWS:
        drawn = [
            random_preferences(
                tokens, CONTEXT, vocab_size=9, seed=seed, share_prompts=True, packing="tight"
            )
            for seed in SEEDS
        ]
        fills = ", ".join(f"{each.fill:.1%}" for each in drawn)
        pairs_a_step = [len(d.preferences) * BATCH / (d.num_rows * CONTEXT) for d in drawn]
        steps_of = ", ".join(f"{count:.1f}" for count in pairs_a_step)
        print_raw(
            f"{drawn[0].num_rows} rows of {CONTEXT} and as many by other seeds: {fills} no "
            f"padding; {steps_of} pairs a step\n"
        )
    generator = np.random.default_rng(SEED)
    prompt, chosen, rejected = (
        generator.lognormal(*kind, DRAWN) for kind in (PROMPT, ANSWER, ANSWER)
    )
    for bound in BOUNDS:
        too_long = 2 * prompt + chosen + rejected > bound
        too_long |= prompt + np.maximum(chosen, rejected) > CONTEXT
        print_raw(f"pairs of at most {bound}: {too_long.mean():.1%} shortened\n")


if __name__ == "__main__":
    main()
