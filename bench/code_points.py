"""At which code points do gigatoken and tokenizers cut words differently? Looks at all of them.

A vocabulary in which every two bytes merge, those with an ASCII byte first, shows in the ids where
a word ends. Prints the ranges; the exit code is 0 only if they are those of data/encoders.py.

    python bench/code_points.py        # about half a minute
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence

import numpy as np

from sevenfold.data import encoders
from sevenfold.data.tokenizer import TokenizerConfig, train_tokenizer

BATCH = 50_000
CONFIG = TokenizerConfig(vocab_size=300, path=None, max_digits=3, sample_characters=1)


def probe() -> str:
    """Return our tokenizer with a vocabulary of all bytes and all pairs of bytes."""
    facts = json.loads(train_tokenizer(["a"], CONFIG).backend_tokenizer.to_str())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    pairs = sorted(
        itertools.product(range(256), repeat=2), key=lambda p: (p[0] > 127, p[1] > 127, p)
    )
    merges = [[names[first], names[second]] for first, second in pairs]
    pieces = [*(names[byte] for byte in range(256)), *("".join(merge) for merge in merges)]
    facts["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    return json.dumps(facts | {"added_tokens": [], "post_processor": None})


def differing(points: Sequence[int]) -> list[int]:
    """Return the code points in whose surroundings the two engines cut differently."""
    backend_json = probe()
    found: list[int] = []
    for start in range(0, len(points), BATCH):
        batch = points[start : start + BATCH]
        texts = [f"x{c}x1{c}1!{c}! {c} x{c}\n{c}\r{c}{c}x '{c}s" for c in map(chr, batch)]
        fast = encoders.encode_fast(backend_json, texts)
        slow = encoders.encode("tokenizers", backend_json, texts)
        parts = [np.split(ids, np.cumsum(counts)[:-1]) for ids, counts in (fast, slow)]
        found += [p for p, *ids in zip(batch, *parts, strict=True) if not np.array_equal(*ids)]
    return found


def main() -> None:
    """Look at every code point that text may hold."""
    points = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    ranges: list[list[int]] = []
    for point in differing(points):
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    for first, last in ranges:
        sys.stdout.write(f"{first:#x} to {last:#x}\n")
    same = [tuple(pair) for pair in ranges] == list(encoders.CUT_DIFFERENTLY)
    sys.stdout.write(f"{len(ranges)} ranges; those of data/encoders.py: {same}\n")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
