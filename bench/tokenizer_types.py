"""How many bytes a token takes on books: ours, the types of GPT-NeoX's and Llama-2's, others.

Those two tokenizers themselves are not at hand: what is compared is their type, trained on the same
books with their sizes. Tokenizers that are at hand are given as folders, and read as they are.

    python bench/tokenizer_types.py BOOKS [TOKENIZER_FOLDER ...]   # some two minutes
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sevenfold.data import sources
from sevenfold.data.clean import cut
from sevenfold.data.tokenizer import TokenizerConfig, encode_texts, train_tokenizer

HELD_OUT_EVERY = 4  # books: every fourth is measured on, the others are trained on
PIECE = 20_000
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A space belongs to the word after it, digits stand alone, letters and marks do not mix.
SCRIPTS_AND_DIGITS = r"▁?\p{L}+|▁?\p{N}|▁?[^\s\p{L}\p{N}▁]+|▁+(?=▁)|▁|\s"


def ours(texts: list[str]) -> Callable[[list[str]], int]:
    """Return what counts the tokens of the 7B preset's tokenizer."""
    config = TokenizerConfig(vocab_size=50_304, path=None, max_digits=3, sample_characters=1)
    made = train_tokenizer(texts, config)
    return lambda measured: sum(map(len, encode_texts(made, measured)))


def neox_type(texts: list[str]) -> Callable[[list[str]], int]:
    """Return the same for byte-level BPE of GPT-2's words, with GPT-NeoX's 50,277 entries."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=50_277,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(texts, trainer)
    return counted_by(made)


def llama2_type(texts: list[str]) -> Callable[[list[str]], int]:
    """Return the same for SentencePiece's BPE, with Llama-2's 32,000 entries."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex(SCRIPTS_AND_DIGITS), behavior="isolated")
    made.decoder = decoders.ByteFallback()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=32_000, show_progress=False, special_tokens=fallback)
    made.train_from_iterator(texts, trainer)
    return counted_by(made)


def counted_by(made: Any) -> Callable[[list[str]], int]:
    """Return what counts the tokens of a tokenizer, control tokens left out."""

    def count(texts: list[str]) -> int:
        return sum(len(each) for each in made.encode_batch_fast(texts, add_special_tokens=False))

    return count


def main(books: Path, folders: list[Path]) -> None:
    """Train and measure; print a table."""
    every = list(sources.read_documents(sources.source_from_path(books)))
    pieces = [list(cut(book["text"], PIECE)) for book in every]
    train = [text for i, book in enumerate(pieces) if i % HELD_OUT_EVERY for text in book]
    held_out = [text for i, book in enumerate(pieces) if not i % HELD_OUT_EVERY for text in book]
    size = sum(len(text.encode()) for text in held_out)
    counters = {
        "ours, 50,304": ours(train),
        "GPT-NeoX's type, 50,277": neox_type(train),
        "Llama-2's type, 32,000": llama2_type(train),
    }
    for folder in folders:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        made.no_truncation()
        counters[f"{folder.name}, {made.get_vocab_size():,}, as it is"] = counted_by(made)
    sys.stdout.write(f"{len(held_out)} pieces of held-out books, {size:,} bytes\n")
    for name, count in counters.items():
        tokens = count(held_out)
        sys.stdout.write(f"| {name} | {tokens:,} | {size / tokens:.3f} |\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
