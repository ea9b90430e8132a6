"""Attention in which packed documents cannot see each other.

One rule, :func:`may_look`, over the document and the branch of every token, and two back ends:
FlexAttention on GPUs, a dense mask through SDPA on a CPU, where FlexAttention has no backward.
Without document numbers the mask is plain causal and SDPA's fastest kernel serves.

Shapes: b rows, t tokens, h heads, k key-value heads, d head size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sevenfold.base.errors import UsageError

IMPLEMENTATION = "sevenfold"
# The branch of tokens that their whole document may see.
TRUNK = 0
# What some models add to attention: a cap on its logits, sinks.
UNSERVED = ("softcap", "s_aux")
# What transformers calls layers that look back a limited way.
SLIDING = "sliding_attention"

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def register_attention() -> None:
    """Make the name ``sevenfold`` known to transformers as an attention implementation."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)


def prefer_fast_kernels(compute_capability: tuple[int, int], *, deterministic: bool) -> None:
    """Let SDPA use cuDNN on Hopper, where it is the fastest; elsewhere PyTorch's own order holds.

    Measured on an H100 at 2048 tokens, forward and backward: cuDNN 338-379 TFLOP/s,
    FlashAttention-2 194-212. cuDNN's backward is not deterministic.
    """
    use_cudnn = compute_capability[0] == 9 and not deterministic
    torch.backends.cuda.enable_cudnn_sdp(use_cudnn)
    torch.backends.cuda.enable_flash_sdp(not use_cudnn)
    torch.backends.cuda.enable_mem_efficient_sdp(not use_cudnn)


@contextlib.contextmanager
def kernels_for_changing_lengths() -> Iterator[None]:
    """Let SDPA use kernels that need no plan of their own for each new length, as cuDNN's do.

    An answer grows by a token at a time, and every item of a task has another length. What
    :func:`prefer_fast_kernels` chose holds again afterwards.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend under ``attention_mask``, or causally where it is None.

    Shapes:
        query [b, h, t, d]; key, value [b, k, t, d]; attention_mask: BlockMask, or bool
        [b, 1, t, t] that is true where a token may look.

    Returns:
        [b, t, h, d], and no weights.
    Errors:
        UsageError: the model's attention does something that is not done here.
    """
    for name in UNSERVED:
        if others.get(name) is not None:
            raise UsageError(
                f"{type(module).__name__}: its attention has '{name}', which is not computed "
                "here; start from a model without it, such as Llama, Mistral or Qwen"
            )
    grouped = query.shape[1] != key.shape[1]
    if isinstance(attention_mask, BlockMask):
        # Inside a compiled layer FlexAttention is compiled with it; on its own it needs its own.
        attend: Callable[..., Any] = flex_attention
        if not torch.compiler.is_compiling():
            attend = _compiled_flex()
        out = attend(
            query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped
        )
    else:
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout if module.training else 0.0,
            is_causal=attention_mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


@functools.cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    compiled: Callable[..., BlockMask] = torch.compile(create_block_mask)
    return compiled


def may_look(
    documents_bt: Tensor,
    branches_bt: Tensor | None = None,
    positions_bt: Tensor | None = None,
    window: int | None = None,
) -> Rule:
    """Return the rule of who may look at whom, a function of row, head, query and key indices.

    A token sees earlier tokens of its document, and itself. Where a document branches, as a prompt
    with two answers does, it sees the trunk and its own branch, never another one. With a
    ``window`` it sees that many tokens, itself among them, counted by their positions.

    Shapes:
        documents_bt [b, t]: number of the document each token belongs to; branches_bt [b, t]: its
        branch within it, ``TRUNK`` for what all branches see; None where no document branches;
        positions_bt [b, t]: needed where there is a window.
    """

    def in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_bt[row, query] == documents_bt[row, key])

    if window is not None:
        assert positions_bt is not None
        unbounded = may_look(documents_bt, branches_bt)

        def in_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = positions_bt[row, query] - positions_bt[row, key]
            return unbounded(row, head, query, key) & (distance < window)

        return in_window
    if branches_bt is None:
        return in_document

    def in_branch(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branches_bt[row, key]
        seen = (branch == TRUNK) | (branch == branches_bt[row, query])
        return in_document(row, head, query, key) & seen

    return in_branch


def document_mask(
    documents_bt: Tensor | None,
    branches_bt: Tensor | None = None,
    positions_bt: Tensor | None = None,
    window: int | None = None,
) -> Tensor | BlockMask | None:
    """Describe who may look at whom, by the rule of :func:`may_look`.

    Returns:
        BlockMask on a GPU, bool [b, 1, t, t] on a CPU; None, plain causal, without documents.
    """
    if window is not None:
        assert positions_bt is not None
        if window >= positions_bt.shape[1]:
            window = None
        elif documents_bt is None:
            documents_bt = torch.zeros_like(positions_bt)
    if documents_bt is None:
        return None
    rule = may_look(documents_bt, branches_bt, positions_bt, window)
    num_rows, length = documents_bt.shape
    if documents_bt.device.type == "cuda":
        return _compiled_block_mask()(
            rule, num_rows, None, length, length, device=documents_bt.device
        )
    rows, places = torch.arange(num_rows), torch.arange(length)
    head = torch.zeros((), dtype=torch.long)
    seen_btt = rule(rows[:, None, None], head, places[:, None], places)
    return seen_btt[:, None]


def layer_masks(
    config: Any, documents_bt: Tensor | None, branches_bt: Tensor | None, positions_bt: Tensor
) -> Any:
    """Return what a transformers decoder takes as ``attention_mask``.

    That is one mask for all layers or, where only some of them have a sliding window, a dictionary
    with one for each type of layer.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = set(getattr(text, "layer_types", None) or ())
    whole = functools.partial(document_mask, documents_bt, branches_bt)
    if window is None or (types and SLIDING not in types):
        return whole()
    if not types:
        return whole(positions_bt, window)
    return {kind: whole(positions_bt, window) if kind == SLIDING else whole() for kind in types}
