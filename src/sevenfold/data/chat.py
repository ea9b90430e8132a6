"""Conversations to token ids, with a mask that says which of them carry loss.

The chat template is the tokenizer's own. Whatever people type stays text: a control token written
inside a message is encoded letter by letter, never as the control token's id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sevenfold.base.config import configuration
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.row_rules import RowRulesConfig
from sevenfold.data.sources import SourceConfig
from sevenfold.data.template_sandbox import (
    TemplateForbiddenError,
    TemplateRefusedError,
    render_template,
)
from sevenfold.data.tokenizer import CHAT_TEMPLATE, encode_texts, plain_backend

Messages = Sequence[Mapping[str, Any]]

_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_PRIVATE_CHARACTERS = range(0xE000, 0xF8FF)


@configuration
class ChatDataConfig:
    """Conversations to train on.

    ``weights`` (one a source; null: all 1) are passes over each source per pass over the data: 2.5
    takes every row twice and half of them a third time. ``max_length`` bounds the tokens of what
    stands in one row: a conversation, or a pair with its prompt twice and both answers, of which
    each with its prompt is bounded by what the model reads, too. At most
    ``max_bad_rows`` rows are left out and listed; with 0 the first one stops the preparation.
    ``rules`` say which good rows are left out; null: none.
    """

    sources: tuple[SourceConfig, ...]
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    max_length: Annotated[int, Field(ge=8)]
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    rules: RowRulesConfig | None = None

    def __post_init__(self) -> None:
        """Check that there is a weight for each source."""
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.sources)} sources; give one each"
            )


@configuration
class PreferenceDataConfig(ChatDataConfig):
    """Preference pairs to train on; ``replay``: instruction rows mixed in against forgetting."""

    replay: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True)
class _Rendered:
    """A conversation as the template writes it.

    ``text`` holds the break mark inside every control token that was typed, so that those the
    template wrote are the only ones left in it; ``carries`` has one flag per character.
    """

    text: str
    carries: bytes
    break_mark: str


def render(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and 1 for each that carries loss.

    Loss is on the assistant's text and the token that ends it, in every assistant turn whose
    ``weight`` is not 0.

    Errors:
        UsageError: the tokenizer has no chat template, or one whose answers cannot be located.
        BadDataError: the template refuses the conversation.
    """
    return _encode(tokenizer, _render(tokenizer, messages, prompt=False))


def render_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Return the ids after which the assistant's answer is to be generated.

    Errors:
        UsageError: the tokenizer has no chat template.
        BadDataError: the template refuses the conversation.
    """
    return _encode(tokenizer, _render(tokenizer, messages, prompt=True))[0]


def render_answer(tokenizer: Any, messages: Messages, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, and of the answer with its end token.

    The two are encoded apart, as they are when a model generates: no token spans both.

    Errors:
        UsageError: the tokenizer has no chat template, or one that rewrites earlier turns.
        BadDataError: the template refuses the conversation.
    """
    turns = [*messages, {"role": "assistant", "content": answer}]
    prompt = _render(tokenizer, messages, prompt=True)
    whole = _render(tokenizer, turns, prompt=False, unused_in=[prompt.text])
    head = prompt.text.replace(prompt.break_mark, whole.break_mark)
    if not whole.text.startswith(head):
        raise UsageError(
            f"{_name(tokenizer)}: the chat template writes a prompt differently once it is "
            "answered; give a template that only appends"
        )
    start, end = len(head), whole.carries.rfind(1) + 1
    tail = _Rendered(whole.text[start:end], whole.carries[start:end], whole.break_mark)
    return _encode(tokenizer, prompt)[0], _encode(tokenizer, tail)[0]


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or "the tokenizer")


def _render(
    tokenizer: Any, messages: Messages, *, prompt: bool, unused_in: Sequence[str] = ()
) -> _Rendered:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise UsageError(
            f"{_name(tokenizer)}: no chat template; add chat_template.jinja beside tokenizer.json "
            "(docs/DATA_FORMATS.md, section 4, has one for base models)"
        )
    contents = [message["content"] for message in messages]
    break_mark, begin, end = _unused_characters([*contents, template, *unused_in], 3)
    turns = [
        {"role": m["role"], "content": _break_control_tokens(tokenizer, m["content"], break_mark)}
        for m in messages
    ]
    if not _GENERATION.search(template):
        text = _apply(tokenizer, turns, template, prompt=prompt)
        spans = [] if prompt else _spans_between_prefixes(tokenizer, turns, text)
    else:
        marked = _GENERATION.sub(lambda tag: _mark_block(tag, begin, end), template)
        marked_text = _apply(tokenizer, turns, marked, prompt=prompt)
        text, spans = _take_out_marks(marked_text, begin, end)
    weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
    if not prompt and len(spans) != len(weights):
        raise UsageError(
            f"{_name(tokenizer)}: the chat template marks {len(spans)} answers of "
            f"{len(weights)}; put {{% generation %}} around every assistant turn"
        )
    carries = bytearray(len(text))
    for (start, stop), weight in zip(spans, weights, strict=False):
        carries[start:stop] = bytes([int(weight)]) * (stop - start)
    return _Rendered(text, bytes(carries), break_mark)


def _mark_block(tag: re.Match[str], begin: str, end: str) -> str:
    """Return a block that writes a mark; white space around it is treated as around the tag."""
    mark = "{{ '" + (end if tag[2] else begin) + "' }}"
    return f"{{%{tag[1]} if true %}}{mark}{{% endif {tag[3]}%}}"


def _unused_characters(texts: Sequence[str], count: int) -> list[str]:
    """Return private-use characters that occur in none of ``texts``."""
    used = set().union(*texts)
    free = (chr(code) for code in _PRIVATE_CHARACTERS if chr(code) not in used)
    return [next(free) for _ in range(count)]


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    return _pattern_of(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=4)
def _pattern_of(tokenizer: Any, size: int) -> re.Pattern[str]:
    """Listing the added tokens is slow; ``size`` tells when there are new ones."""
    del size
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _break_control_tokens(tokenizer: Any, content: str, mark: str) -> str:
    """Put ``mark`` after the first character of every control token in ``content``."""
    return _control_pattern(tokenizer).sub(lambda m: m[0][0] + mark + m[0][1:], content)


def _apply(tokenizer: Any, turns: Messages, template: str, *, prompt: bool) -> str:
    """Return what ``template``, which may hold marks, writes; our own needs no guard."""
    import jinja2

    try:
        if tokenizer.chat_template != CHAT_TEMPLATE:
            tokens = tokenizer.special_tokens_map
            return render_template(template, turns, tokens, prompt=prompt)
        text: str = tokenizer.apply_chat_template(
            list(turns), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except (jinja2.TemplateError, TemplateRefusedError) as error:
        raise BadDataError(
            f"the chat template refuses this conversation ({error}); remove the row, or choose "
            "another tokenizer"
        ) from None
    except TemplateForbiddenError as error:
        raise UsageError(
            f"{_name(tokenizer)}: the chat template was stopped ({error}); mend "
            "chat_template.jinja, or choose another tokenizer"
        ) from None
    return text


def _take_out_marks(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """Return ``text`` without the marks, and the spans that stood between them."""
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin:
            start = length
        elif piece == end:
            spans.append((start, length))
        else:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), spans


def _spans_between_prefixes(tokenizer: Any, turns: Messages, text: str) -> list[tuple[int, int]]:
    """Locate the answers of a template without marks, by rendering the turns before each.

    An answer ends after the first control token that follows it: line feeds after that are the
    template's.
    """
    pattern = _control_pattern(tokenizer)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        template = tokenizer.chat_template
        before = _apply(tokenizer, turns[:index], template, prompt=True)
        after = _apply(tokenizer, turns[: index + 1], template, prompt=False)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise UsageError(
                f"{_name(tokenizer)}: the answers cannot be located in what the chat template "
                "writes; put {% generation %} and {% endgeneration %} around the assistant's turn"
            )
        closing = list(pattern.finditer(text, len(before), len(after)))
        only_space_follows = closing and not text[closing[-1].end() : len(after)].strip()
        spans.append((len(before), closing[-1].end() if only_space_follows else len(after)))
    return spans


def _encode(tokenizer: Any, rendered: _Rendered) -> tuple[list[int], list[int]]:
    """Encode what was rendered; a token carries loss if its first character does."""
    if rendered.break_mark not in rendered.text:
        # Nothing was typed that looks like a control token: exactly what any other tool encodes.
        return _encode_part(tokenizer, rendered.text, rendered.carries, as_text=False)
    ids: list[int] = []
    mask: list[int] = []
    for part, carries, is_control in _parts(tokenizer, rendered):
        if is_control:
            ids.append(tokenizer.convert_tokens_to_ids(part))
            mask.append(carries[0])
        elif part:
            found = _encode_part(tokenizer, part, carries, as_text=True)
            ids += found[0]
            mask += found[1]
    return ids, mask


def _parts(tokenizer: Any, rendered: _Rendered) -> Iterator[tuple[str, bytes, bool]]:
    """Cut at the template's own control tokens; take the break marks out of the text between."""
    position = 0
    matches = list(_control_pattern(tokenizer).finditer(rendered.text))
    for match in [*matches, None]:
        stop = match.start() if match else len(rendered.text)
        kept = [i for i in range(position, stop) if rendered.text[i] != rendered.break_mark]
        text = "".join(rendered.text[i] for i in kept)
        yield text, bytes(rendered.carries[i] for i in kept), False
        if match:
            yield match[0], rendered.carries[match.start() : match.end()], True
            position = match.end()


def _encode_part(
    tokenizer: Any, text: str, carries: bytes, *, as_text: bool
) -> tuple[list[int], list[int]]:
    encoded = plain_backend(tokenizer, as_text=as_text).encode(text, add_special_tokens=False)
    return encoded.ids, [carries[start] for start, _ in encoded.offsets]


def render_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the ids of a plain text between BOS and EOS; all but BOS carry loss.

    A tokenizer without one of the two, as Qwen's without BOS, leaves it out.
    """
    around = [[] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    ids = [*around[0], *encode_texts(tokenizer, [text])[0], *around[1]]
    return ids, [0] * len(around[0]) + [1] * (len(ids) - len(around[0]))
