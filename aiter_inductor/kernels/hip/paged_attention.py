"""Attention over pages, in vLLM's and in AITER's layouts, by decode_attention.hip."""

from __future__ import annotations

from torch import Tensor

from aiter_inductor.kernels.hip.decode_attention import CacheView, DecodeConfig, DecodeStyle
from aiter_inductor.kernels.hip.decode_launch import (
    DecodeHow,
    DecodeTensors,
    Described,
    decode,
    readable_queries,
)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    layout: str = "paged",
    window: int | None = None,
    softcap: float = 0.0,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attend to the tokens of pages; see the op of this name.

    Raises:
        ValueError: for strides that the kernel does not take.
    """
    given = DecodeTensors(
        *(q, key_cache, value_cache, block_tables, seq_lens, key_scale, value_scale, sinks), None
    )
    how = DecodeHow(layout, window or 0, softcap != 0.0, config)
    return decode(given, how, _described, scale=scale, softcap=softcap)


def _described(given: DecodeTensors, how: DecodeHow) -> Described:
    q, keys, values = readable_queries(given.q), given.keys, given.values
    tables, lengths, sinks = given.tables, given.lengths, given.sinks
    assert tables is not None
    assert lengths is not None
    if tables.stride(-1) != 1:
        tables = tables.contiguous()
    taken = given._replace(
        q=q,
        tables=tables,
        lengths=lengths.contiguous(),
        sinks=None if sinks is None else sinks.to(q.dtype),
    )
    packed = how.layout != "paged"
    if packed:
        key_view = CacheView(keys, *(keys.stride(i) for i in (0, 3, 1, 2)))
        order = (0, 2, 1, 3)
        if how.layout == "transposed":
            values = values.unflatten(3, (-1, keys.shape[4]))
            order = (0, 3, 1, 2)
        value_view = CacheView(values, *(values.stride(i) for i in order))
        kv_heads, page_size = keys.shape[1], keys.shape[3]
    else:
        key_view = CacheView(keys, *keys.stride()[:3], 0)
        value_view = CacheView(values, *values.stride()[:3], 0)
        page_size, kv_heads = keys.shape[1:3]
    style = DecodeStyle(
        q.dtype,
        keys.dtype,
        q.shape[2],
        values.shape[2 if how.layout == "transposed" else 3],
        q.shape[1] // kv_heads,
        page_size,
        packed,
        how.softcap,
    )
    return Described(taken, style, kv_heads, key_view, value_view, 0)
