"""The run's tokenizer: a byte-level BPE trained on the corpus, or an existing one taken over.

Control tokens come first, then the 256 bytes, then what training merged; reserved tokens fill up
to exactly the model's vocabulary, so that every row of the embedding has a token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sevenfold.base.config import configuration
from sevenfold.base.errors import UsageError

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLE_TOKENS = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>"}
CONTROL_TOKENS = (BOS, EOS, PAD, *ROLE_TOKENS.values(), END)
NUM_BYTES = 256
_RESERVED = re.compile(r"<\|reserved_\d+\|>")

# A space stands before the text of a turn, so that its first word is the token it is inside a
# sentence: " Tom", not the "Tom" that only ever opens a document. The village's model answered
# 0.99 of the questions about people never asked about with the space, and 0.00 without it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ ' ' + message['content'] }}<|end|>{% endgeneration %}"
    "{%- elif message['role'] in ('user', 'system') -%}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}"
    "{%- else -%}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@configuration
class TokenizerConfig:
    """A tokenizer of exactly ``vocab_size`` entries.

    ``path``: folder of an existing Hugging Face tokenizer, null to train one, for which the other
    two are read: numbers are cut into groups of at most ``max_digits`` digits, and training sees
    about ``sample_characters`` of the corpus.
    """

    vocab_size: int
    path: str | None
    max_digits: int
    sample_characters: int

    def __post_init__(self) -> None:
        """Check that bytes and control tokens find room."""
        smallest = NUM_BYTES + len(CONTROL_TOKENS)
        if self.vocab_size < smallest:
            raise ValueError(f"'vocab_size' is at least {smallest}: all bytes and control tokens")
        if self.max_digits < 1 or self.sample_characters < 1:
            raise ValueError("'max_digits' and 'sample_characters' are at least 1")


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Any:
    """Train on ``texts`` and return a transformers tokenizer of exactly ``config.vocab_size``."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word_pattern(config.max_digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    _fill_up(backend, config.vocab_size)
    _begin_with(backend, BOS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def word_pattern(max_digits: int) -> str:
    """Return the pattern that cuts text into words, as GPT-4's does, with our group of digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,"
        + str(max_digits)
        + r"}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _fill_up(backend: Any, vocab_size: int) -> None:
    from tokenizers import AddedToken

    missing = vocab_size - backend.get_vocab_size()
    names = (f"<|reserved_{number}|>" for number in itertools.count())
    free = (name for name in names if backend.token_to_id(name) is None)
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in itertools.islice(free, missing)
        ]
    )


def _begin_with(backend: Any, token: str) -> None:
    """Let plain encoding put ``token`` first, as every document in training begins with it."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A $B",
        special_tokens=[(token, backend.token_to_id(token))],
    )


def adopt_tokenizer(config: TokenizerConfig) -> Any:
    """Return the tokenizer in ``config.path``, with control and reserved tokens where they lack.

    Errors:
        UsageError: it is not readable, larger than ``vocab_size``, or has no room for the control
            tokens that a chat needs.
    """
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(Path(str(config.path)))
    backend = tokenizer.backend_tokenizer
    wanted = [token for token in (tokenizer.bos_token or BOS, tokenizer.eos_token or EOS)]
    wanted.append(tokenizer.pad_token or PAD)
    if tokenizer.chat_template is None:
        wanted += [*ROLE_TOKENS.values(), END]
        tokenizer.chat_template = CHAT_TEMPLATE
    lacking = [token for token in wanted if backend.token_to_id(token) is None]
    if backend.get_vocab_size() + len(lacking) > config.vocab_size:
        raise UsageError(
            f"{config.path}: the tokenizer has {backend.get_vocab_size()} entries and needs "
            f"{len(lacking)} more control tokens, but vocab_size is {config.vocab_size}; raise "
            "tokenizer.vocab_size and the model's to a multiple of 64 that holds them"
        )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in lacking]
    )
    _fill_up(backend, config.vocab_size)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = wanted[:3]
    return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in ``folder``, read as data: no code that lies beside it is run.

    Errors:
        UsageError: there is none, or it is not readable.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"{folder}: no tokenizer.json here; name a folder that holds a fast tokenizer"
        )
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{folder}: the tokenizer is not readable ({reason})") from None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 (hex) of what decides which ids a text or a chat becomes.

    It is the same for the run's tokenizer and for the copies beside each model.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = [
        {key: value for key, value in backend.items() if key not in ("truncation", "padding")},
        tokenizer.chat_template,
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def reserved_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the reserved tokens, which no text contains and none should generate."""
    added = tokenizer.added_tokens_decoder
    return sorted(i for i, token in added.items() if _RESERVED.fullmatch(token.content))


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer or a document."""
    end = tokenizer.convert_tokens_to_ids(END)
    known = END in tokenizer.get_vocab()
    return [end, tokenizer.eos_token_id] if known else [tokenizer.eos_token_id]


def plain_backend(tokenizer: Any, *, as_text: bool) -> Any:
    """Return the tokenizer's own engine, set to neither cut nor pad.

    ``as_text``: what looks like a control token is encoded as text.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = as_text
    return backend


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without any control token: what looks like one stays text."""
    backend = plain_backend(tokenizer, as_text=True)
    encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in encoded]
