"""Attention over pages in transformers' continuous batching (`generate_batch` and its manager).

    aiter_inductor.continuous_batching.enable(model)
    model.generate_batch(prompts, generation_config=...)

transformers keeps keys and values in pages, but its `sdpa` and `paged|eager` attentions gather
every cached token of every request into new tensors, repeat them for the query heads, and mask the
product of all requests with all tokens. An attention whose name holds "flash" gets no masks, its
batches are captured in CUDA graphs by default, and the next is prepared while one runs.
`aiter_flash` is such a one: decoding batches read the pages where they lie, and batches that hold
prompts attend within each request.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.lowerings.attention_varlen import attention_varlen
from aiter_inductor.lowerings.kv_cache import kv_cache_write
from aiter_inductor.lowerings.paged_attention import paged_attention

NAME = "aiter_flash"
MOST_DECODED = 256
"""Tokens that are attended to one by one where a padded batch may hold prompts as well.

On an H100, a layer with 32 and 8 heads of 128: 256 requests of 850 tokens that decode take 322 us
one by one and 1478 with all keys gathered, 64 requests 90 and 378; 256 tokens of one prompt of 1024
take 150 and 24, of 8192 1156 and 126.
"""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BY_KWARGS, _BY_INDEX = {"layer_idx", "kwargs"}, {"layer_idx", "read_index", "write_index"}


class ContinuousBatchingError(AiterInductorError, ImportError):
    """A transformers whose paged cache this package does not know."""


def enable(model: nn.Module) -> None:
    """Let a model of transformers attend by this package in continuous batching.

    `model.set_attn_implementation` takes another attention again, as other calls of the model need.

    Args:
        model: a `PreTrainedModel`. Its config's attention is set as it is: where a name holds
            "flash", `set_attn_implementation` would load a package of that name.

    Raises:
        ContinuousBatchingError: if transformers is missing or its paged cache is none of 5.17's
            and 5.23's.
    """
    try:
        from transformers import AttentionInterface, PreTrainedModel
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
    name = f"paged|{NAME}" if taken >= _BY_INDEX else NAME  # 5.17 puts it before a flash's name
    AttentionInterface.register(name, paged_attention_forward)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation = name


def hand_over_tables(manager: Any, longest: int) -> None:
    """Let a manager, before it starts, tell decoding batches pages instead of all tokens' places.

    transformers does so by itself for its own flash attention only. For 64 requests of 850 tokens
    the host writes 3400 numbers a step then, not 54400.

    Args:
        manager: of a model that was given to `enable`, as `init_continuous_batching` makes it.
        longest: tokens of a request, the generated included; batches with longer ones, and models
            with windows, go on as before.
    """
    config = manager.continuous_batching_config
    page_size = getattr(config, "page_size", None) or config.block_size
    config.max_blocks_per_request = -(-longest // page_size)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Store the new keys and values, then attend to the tokens of each request.

    Args:
        module: the attention layer.
        query: [1, num_heads, num_tokens, head_dim], the new tokens of all requests.
        key: [1, num_kv_heads, num_tokens, head_dim].
        value: the same for values.
        attention_mask: None, as such an attention gets it.
        scaling: factor on the scores; None for `head_dim ** -0.5`.
        softcap: c in `c * tanh(scores / c)`, or None.
        s_aux: [num_heads], the sinks, or None.
        **kwargs: what continuous batching passes, `transformers` "PagedAttentionArgs".

    Returns:
        [1, num_tokens, num_heads, head_dim], and no weights. Rows of padding hold anything.

    Raises:
        ValueError: outside continuous batching.
    """
    if kwargs.get("cache") is None:
        raise ValueError(
            f"{NAME!r} attends to the pages of continuous batching and got none; for other calls "
            "choose attn_implementation='aiter'"
        )
    layer = _Layer.of(module, kwargs)
    queries, keys, values = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if layer.decodes(queries.shape[0]):
        found = layer.sequences(queries.shape[0])
        kv_cache_write(keys, values, layer.keys, layer.values, found.slots)
        out = paged_attention(
            *(queries, layer.keys, layer.values, found.tables, found.lengths),
            sinks=s_aux,
            scale=scale,
            softcap=softcap or 0.0,
        )
        return out.unsqueeze(0), None
    out = attention_varlen(
        *(queries, *layer.stored(key, value), layer.query_starts, layer.key_starts, s_aux),
        max_seqlen_q=layer.longest_query,
        scale=scale,
        causal="bottom_right",
        window=layer.window,
        softcap=softcap,
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


def tables_of_tokens(
    tables: Tensor, lengths: Tensor, query_starts: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Each token as a sequence of its own that ends with it.

    Args:
        tables: [num_requests, max_pages], int32: the pages of each request.
        lengths: [num_requests], int32: its tokens, the new ones included.
        query_starts: [num_requests + 1], int32: where the new tokens of each start; those beyond
            the last are padding.
        num_tokens: new tokens and padding.

    Returns:
        tables: [num_tokens, max_pages], int32.
        lengths: [num_tokens], int32; 0 for padding.
    """
    token = torch.arange(num_tokens, device=tables.device, dtype=torch.int32)
    ends = query_starts[1:]
    request = torch.searchsorted(ends, token, right=True).clamp(max=ends.shape[0] - 1)
    length = lengths[request] - (ends[request] - 1 - token)
    return tables[request], length.masked_fill(token >= ends[-1], 0).to(torch.int32)


@dataclass(frozen=True)
class Sequences:
    """New tokens, each the last of a sequence.

    Attributes:
        tables: [num_tokens, max_pages], int32.
        lengths: [num_tokens], int32; 0 for padding.
        slots: [num_tokens], int64: where they are stored; -1 nowhere.
    """

    tables: Tensor
    lengths: Tensor
    slots: Tensor

    @classmethod
    def of_requests(cls, tables: Tensor, starts: Tensor, page_size: int) -> Sequences:
        """Of requests with one new token; `starts` [num_requests + 1]: where their tokens begin."""
        lengths = starts.diff().to(torch.int32)
        last = (lengths - 1).clamp(min=0).long()
        page = tables.gather(1, (last // page_size).unsqueeze(1)).squeeze(1).long()
        slots = page * page_size + last % page_size
        return cls(tables, lengths, slots.masked_fill(lengths == 0, -1))


@dataclass(frozen=True)
class _Layer:
    """A layer's part of the cache, and of a batch.

    Attributes:
        module: the attention layer.
        keys, values: [num_pages, page_size, num_kv_heads, head_dim].
        read: [total_tokens], int64: the place of every token, request after request; empty where
            no request has cached tokens.
        written: [num_tokens], int64: the places of the new ones.
        query_starts, key_starts: [num_requests + 1], int32.
        longest_query, longest_key: tokens of the request with most.
        window: tokens that a query sees, its own included, or None.
        group: of layers that store tokens at the same places.
        tables: [num_requests, max_pages], int32, or None: where each request has one new token,
            its pages; `read` and `written` hold nothing then.
        kwargs: what continuous batching passes.
    """

    module: Any
    keys: Tensor
    values: Tensor
    read: Tensor
    written: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    window: int | None
    group: int
    tables: Tensor | None
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, module: Any, kwargs: dict[str, Any]) -> _Layer:
        """From the layer, and what it is called with."""
        cache, number = kwargs["cache"], module.layer_idx
        if hasattr(cache, "layer_to_allocator"):  # transformers 5.23
            owner = cache.layer_to_allocator[number]
            group, kind = owner.index, owner.layer_type
            caches = owner.get_cache_for_block_table(number) if kind == _FULL else (None, None)
        else:
            group, in_group = cache.layer_index_to_group_indices[number]
            kind = _FULL if cache.sliding_windows[number] == 1 else _SLIDING
            rows = cache.key_cache[in_group], cache.value_cache[in_group]
            caches = tuple(x.unflatten(0, (-1, cache.block_size)) for x in rows)
        tables = kwargs.get("block_table")
        most = "max_seqlen" if "max_seqlen_q" in kwargs else "max_length"
        return cls(
            module=module,
            keys=caches[0],
            values=caches[1],
            read=kwargs["read_index"][group],
            written=kwargs["write_index"][group],
            query_starts=kwargs["cu_seq_lens_q"],
            key_starts=_of_kind(kwargs["cu_seq_lens_k"], kind),
            longest_query=int(kwargs[f"{most}_q"]),
            longest_key=int(_of_kind(kwargs[f"{most}_k"], kind)),
            window=module.sliding_window if kind == _SLIDING else None,
            group=group,
            tables=None if tables is None else tables[group],
            kwargs=kwargs,
        )

    def decodes(self, num_tokens: int) -> bool:
        """Whether each request has one new token, or may have, and no more than a few have more.

        A batch that is padded for CUDA graphs tells no more than how many requests it may hold.
        """
        if self.tables is not None:
            return True
        if self.window is not None or self.read.numel() == 0:
            return False
        one_each = self.query_starts.shape[0] - 1 == num_tokens
        return one_each and (self.longest_query == 1 or num_tokens <= MOST_DECODED)

    def stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [1, num_kv_heads, num_tokens, head_dim]; all tokens of the batch, cached and new.

        Returns:
            keys: [total_tokens, num_kv_heads, head_dim], and the values.
        """
        if self.window is not None:  # what is overwritten may still be seen
            return self._updated(key, value)
        keys, values = (x.squeeze(0).transpose(0, 1) for x in (key, value))
        kv_cache_write(keys, values, self.keys, self.values, self.written)
        if self.read.numel() == 0:
            return keys, values
        places = (x.flatten(0, 1) for x in (self.keys, self.values))
        keys, values = (x.index_select(0, self.read) for x in places)
        return keys, values

    def _updated(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        update = self.kwargs["cache"].update
        if "max_seqlen_q" in self.kwargs:  # transformers 5.17
            indices = {name: self.kwargs[name] for name in ("read_index", "write_index")}
            keys, values = update(key, value, self.module.layer_idx, **indices)
            return keys, values
        found = update(key, value, self.module.layer_idx, dict(self.kwargs))
        keys, values = (x.squeeze(0).transpose(0, 1) for x in found)
        return keys, values

    def sequences(self, num_tokens: int) -> Sequences:
        """The new tokens, as a pass's first layer found them."""
        if torch.compiler.is_compiling():
            return self._sequences(num_tokens)
        # The same object for all layers of a pass, and another for the next.
        kept = _KEPT.get(self.kwargs["write_index"][0])
        number = self.module.layer_idx
        if kept is None or kept.layer >= number or kept.group != self.group:
            kept = _Kept(number, self.group, self._sequences(num_tokens))
            _KEPT[self.kwargs["write_index"][0]] = kept
        return kept.sequences

    def _sequences(self, num_tokens: int) -> Sequences:
        page_size = self.keys.shape[1]
        if self.tables is not None:
            return Sequences.of_requests(self.tables, self.key_starts, page_size)
        tables, lengths = page_tables(self.read, self.key_starts, page_size, self.longest_key)
        if self.longest_query > 1:
            tables, lengths = tables_of_tokens(tables, lengths, self.query_starts, num_tokens)
        return Sequences(tables, lengths, self.written)


@dataclass(frozen=True)
class _Kept:
    """What the layer of this number found; a layer before it begins another pass."""

    layer: int
    group: int
    sequences: Sequences


_KEPT = WeakIdKeyDictionary()


def _of_kind(value: Any, kind: str) -> Any:
    """What a kind of layer has of a value that models of several kinds have one each of."""
    return value[kind] if isinstance(value, dict) else value
