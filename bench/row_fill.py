"""How full SFT's rows are: conversations of the given files, packed as a stage packs them.

    PYTHONPATH=src python bench/row_fill.py TOKENIZER_FOLDER FILE...

One line for each row length, way of packing and seed. A conversation longer than a row is left out;
the share of positions that are no padding counts the last row, which is seldom full.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import get_args

from sevenfold.data.best_fit import Packing
from sevenfold.data.chat import render, render_text
from sevenfold.data.packing import PackedConversations, Piece
from sevenfold.data.rows import read_examples
from sevenfold.data.sources import read_rows, sources_from_paths
from sevenfold.data.tokenizer import load_tokenizer

LENGTHS, SEEDS = (1024, 2048, 4096), (7, 8, 9)


def main() -> None:
    """Pack and print."""
    tokenizer = load_tokenizer(Path(sys.argv[1]))
    pieces = []
    for source in sources_from_paths([Path(name).resolve() for name in sys.argv[2:]]):
        for row in read_rows(source):
            for example in read_examples(row.values, row.where, source.name):
                is_chat = bool(example.messages)
                ids, mask = (
                    render(tokenizer, example.messages)
                    if is_chat
                    else render_text(tokenizer, example.text)
                )
                pieces.append(Piece(ids, mask))
    for length in LENGTHS:
        kept = [piece for piece in pieces if len(piece.ids) <= length]
        for packing, seed in itertools.product(get_args(Packing), SEEDS):
            packed = PackedConversations(kept, length, pad_id=0, seed=seed, packing=packing)
            sys.stdout.write(
                f"rows of {length}, {packing}, seed {seed}: {packed.fill:.2%} of "
                f"{packed.num_rows} rows, {len(kept)} of {len(pieces)} conversations\n"
            )


if __name__ == "__main__":
    main()
