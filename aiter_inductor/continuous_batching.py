"""Attention over pages in transformers' continuous batching (`generate_batch` and its manager).

transformers keeps keys and values in pages, but its `paged|eager` attention gathers every cached
token of every request into new tensors, repeats them for the query heads and masks the product of
all requests with all tokens. `enable()` gives that name an implementation whose decoding batches
read the pages where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.lowerings.paged_attention import paged_attention

NAME = "paged|eager"


class ContinuousBatchingError(AiterInductorError, ImportError):
    """A transformers whose paged cache this package does not know."""


def enable() -> None:
    """Let models of this process attend by `paged_attention` under `paged|eager`.

    Continuous batching takes that implementation for a model of
    `attn_implementation="paged|eager"` or `"eager"`. Batches in which a request has more than one
    new token, and layers with a sliding window, stay with transformers' own function.

    Raises:
        ContinuousBatchingError: if transformers is missing or its paged cache has no page views.
    """
    try:
        from transformers import AttentionInterface
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
        from transformers.generation.continuous_batching.cache_allocators import (
            FullAttentionCacheAllocator,
        )
    except ImportError as error:
        raise ContinuousBatchingError(
            f"no paged cache of transformers to attend to: {error}"
        ) from None
    for owner, name in (
        (PagedAttentionCache, "update"),
        (FullAttentionCacheAllocator, "get_cache_for_block_table"),
    ):
        if not hasattr(owner, name):
            raise ContinuousBatchingError(f"transformers' {owner.__name__} has no {name}")
    AttentionInterface.register(NAME, paged_attention_forward)


@torch.compiler.disable
def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Store the new keys and values, then attend to the pages of each request.

    Args:
        module: the attention layer.
        query: [1, num_heads, num_tokens, head_dim], the new tokens of all requests.
        key: [1, num_kv_heads, num_tokens, head_dim].
        value: the same for values.
        attention_mask: of all requests' tokens; not read where each request has one new token.
        scaling: factor on the scores.
        **kwargs: what continuous batching passes, `transformers` "PagedAttentionArgs".

    Returns:
        [1, num_tokens, num_heads, head_dim], and the weights where transformers' function ran.
    """
    from transformers.integrations.eager_paged import eager_paged_attention_forward

    layer = _decoding_layer(module, kwargs)
    if layer is None:
        result: tuple[Tensor, Tensor | None] = eager_paged_attention_forward(
            module, query, key, value, attention_mask, scaling, **kwargs
        )
        return result
    slots = kwargs["read_index"][layer.index]
    nothing = [index[:0] for index in kwargs["read_index"]]
    kwargs["cache"].update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        kwargs={**kwargs, "read_index": nothing},
    )
    key_pages, value_pages = layer.get_cache_for_block_table(module.layer_idx)
    most = int(kwargs["max_length_k"][layer.layer_type])
    starts = kwargs["cu_seq_lens_k"][layer.layer_type]
    tables, lengths = page_tables(slots, starts, key_pages.shape[1], most)
    sinks = getattr(module, "sinks", None)
    rows = query.squeeze(0).transpose(0, 1)
    out = paged_attention(
        rows, key_pages, value_pages, tables, lengths, sinks=sinks, scale=float(scaling)
    )
    return out.unsqueeze(0), None


def page_tables(
    slots: Tensor, starts: Tensor, page_size: int, longest: int
) -> tuple[Tensor, Tensor]:
    """The pages and the length of each request.

    Args:
        slots: [total_tokens], int64: the place of every cached token, request after request.
        starts: [num_requests + 1], int32: where each request's begin in `slots`.
        page_size: places of a page; a request's pages are full but for its last one.
        longest: tokens of the longest request.

    Returns:
        tables: [num_requests, ceil(longest / page_size)], int32; -1 beyond a request's pages.
        lengths: [num_requests], int32.
    """
    lengths = starts.diff().to(torch.int32)
    first = torch.arange(0, max(longest, 1), page_size, device=slots.device)
    at = (starts[:-1, None] + first).clamp(max=slots.shape[0] - 1)
    tables = slots[at] // page_size
    return tables.masked_fill(first >= lengths[:, None], -1).to(torch.int32), lengths


def _decoding_layer(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The layer's part of the cache, if this batch gives each request one new token."""
    cache = kwargs.get("cache")
    if cache is None or kwargs.get("max_length_q") != 1 or kwargs.get("block_table") is not None:
        return None
    layer = cache.layer_to_allocator[module.layer_idx]
    read = kwargs["read_index"][layer.index]
    whole = layer.layer_type == "full_attention" and hasattr(layer, "get_cache_for_block_table")
    return layer if whole and read.numel() > 0 else None
