"""Attention over pages in transformers' continuous batching (`generate_batch` and its manager).

transformers keeps keys and values in pages, but its `paged|eager` attention gathers every cached
token of every request into new tensors, repeats them for the query heads and masks the product of
all requests with all tokens. `enable()` gives that name an implementation whose decoding batches
read the pages where they lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.lowerings.paged_attention import paged_attention

NAME = "paged|eager"
_FULL = "full_attention"
_BY_KWARGS, _BY_INDEX = {"layer_idx", "kwargs"}, {"layer_idx", "read_index", "write_index"}


class ContinuousBatchingError(AiterInductorError, ImportError):
    """A transformers whose paged cache this package does not know."""


def enable() -> None:
    """Let models of this process attend by `paged_attention` under `paged|eager`.

    Continuous batching takes that implementation for a model of
    `attn_implementation="paged|eager"` or `"eager"`. Batches in which a request has more than one
    new token, and layers with a sliding window, stay with transformers' own function.

    Raises:
        ContinuousBatchingError: if transformers is missing or its paged cache is none of 5.17's
            and 5.23's.
    """
    try:
        from transformers import AttentionInterface
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
    except ImportError as error:
        raise ContinuousBatchingError(
            f"no paged cache of transformers to attend to: {error}"
        ) from None
    update = getattr(PagedAttentionCache, "update", None)
    if update is None:
        raise ContinuousBatchingError("transformers' PagedAttentionCache has no update")
    taken = set(inspect.signature(update).parameters)
    if not (taken >= _BY_KWARGS or taken >= _BY_INDEX):
        raise ContinuousBatchingError(
            f"transformers' PagedAttentionCache.update takes {', '.join(sorted(taken))}"
        )
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
    layer.store(key, value)
    tables, lengths = page_tables(layer.slots, layer.starts, layer.keys.shape[1], layer.longest)
    sinks = getattr(module, "sinks", None)
    rows = query.squeeze(0).transpose(0, 1)
    out = paged_attention(
        rows, layer.keys, layer.values, tables, lengths, sinks=sinks, scale=float(scaling)
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


@dataclass(frozen=True)
class _Layer:
    """A layer's part of the cache in a batch that gives each request one new token.

    Attributes:
        keys, values: [num_pages, page_size, num_kv_heads, head_dim].
        slots, starts, longest: as `page_tables` takes them.
        store: writes the new keys and values, [1, num_kv_heads, num_tokens, head_dim].
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    starts: Tensor
    longest: int
    store: Callable[[Tensor, Tensor], object]


def _decoding_layer(module: nn.Module, kwargs: dict[str, Any]) -> _Layer | None:
    """The layer that `module` is, or None if this batch or layer is not for `paged_attention`."""
    cache = kwargs.get("cache")
    longest_query = kwargs.get("max_length_q", kwargs.get("max_seqlen_q"))
    if cache is None or longest_query != 1 or kwargs.get("block_table") is not None:
        return None
    found = _of_allocator(module, cache, kwargs) or _of_groups(module, cache, kwargs)
    return found if found is not None and found.slots.numel() > 0 else None


def _of_allocator(module: nn.Module, cache: Any, kwargs: dict[str, Any]) -> _Layer | None:
    """The cache of transformers 5.23, whose allocators know the pages of their layers."""
    if not hasattr(cache, "layer_to_allocator"):
        return None
    owner, number = cache.layer_to_allocator[module.layer_idx], module.layer_idx
    if owner.layer_type != _FULL or not hasattr(owner, "get_cache_for_block_table"):
        return None
    nothing = [index[:0] for index in kwargs["read_index"]]

    def store(key: Tensor, value: Tensor) -> object:
        stored = {**kwargs, "read_index": nothing}
        return cache.update(key_states=key, value_states=value, layer_idx=number, kwargs=stored)

    return _Layer(
        *owner.get_cache_for_block_table(number),
        kwargs["read_index"][owner.index],
        kwargs["cu_seq_lens_k"][_FULL],
        int(kwargs["max_length_k"][_FULL]),
        store,
    )


def _of_groups(module: nn.Module, cache: Any, kwargs: dict[str, Any]) -> _Layer | None:
    """The cache of transformers 5.17, which numbers groups of layers and layers of a group."""
    if not hasattr(cache, "layer_index_to_group_indices"):
        return None
    number = module.layer_idx
    group, in_group = cache.layer_index_to_group_indices[number]
    if cache.sliding_windows[number] != 1:
        return None
    nothing = [index[:0] for index in kwargs["read_index"]]

    def store(key: Tensor, value: Tensor) -> object:
        indices = {"read_index": nothing, "write_index": kwargs["write_index"]}
        return cache.update(key_states=key, value_states=value, layer_idx=number, **indices)

    caches = (cache.key_cache[in_group], cache.value_cache[in_group])
    keys, values = (rows.unflatten(0, (-1, cache.block_size)) for rows in caches)
    slots, starts = kwargs["read_index"][group], _of_type(kwargs["cu_seq_lens_k"])
    return _Layer(keys, values, slots, starts, int(_of_type(kwargs["max_seqlen_k"])), store)


def _of_type(value: Any) -> Any:
    """What full attention has of a value that models of several types have one of each."""
    return value[_FULL] if isinstance(value, dict) else value
