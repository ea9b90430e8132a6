"""Pairs as long as UltraFeedback's: how full their rows are, and how many have to be shortened.

    PYTHONPATH=src python bench/pair_rows.py

The benchmark's own pairs in rows of three lengths; then a million drawn lengths against the bounds
of a pair (`dpo.data.max_length`, its prompt twice) and of an answer with its prompt (the context).
"""

from __future__ import annotations

import numpy as np

from sevenfold.base.console import print_raw
from sevenfold.data.packing import PackedPreferences
from sevenfold.data.random_rows import ANSWER, PROMPT, random_preferences

CONTEXT, BATCH, SEED = 2048, 131_072, 1
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
