"""Attention over pages, in vLLM's and in AITER's layouts, by decode_attention.hip."""

from __future__ import annotations

from torch import Tensor

from aiter_inductor.kernels.hip.decode_attention import (
    CacheView,
    DecodeConfig,
    DecodeStyle,
    Tokens,
    decode,
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
    packed = layout != "paged"
    if block_tables.stride(-1) != 1:
        block_tables = block_tables.contiguous()
    if sinks is not None:
        sinks = sinks.to(q.dtype)
    if packed:
        keys = CacheView(key_cache, *(key_cache.stride(i) for i in (0, 3, 1, 2)))
        order = (0, 2, 1, 3)
        if layout == "transposed":
            value_cache = value_cache.unflatten(3, (-1, key_cache.shape[4]))
            order = (0, 3, 1, 2)
        values = CacheView(value_cache, *(value_cache.stride(i) for i in order))
        kv_heads, page_size = key_cache.shape[1], key_cache.shape[3]
    else:
        keys = CacheView(key_cache, *key_cache.stride()[:3], 0)
        values = CacheView(value_cache, *value_cache.stride()[:3], 0)
        page_size, kv_heads = key_cache.shape[1:3]
    style = DecodeStyle(
        q.dtype,
        key_cache.dtype,
        q.shape[2],
        value_cache.shape[2 if layout == "transposed" else 3],
        q.shape[1] // kv_heads,
        page_size,
        packed,
        softcap != 0.0,
    )
    return decode(
        q,
        keys,
        values,
        Tokens(block_tables, seq_lens.contiguous(), 0, window or 0),
        key_scale,
        value_scale,
        sinks,
        style=style,
        num_kv_heads=kv_heads,
        scale=scale,
        softcap=softcap,
        config=config,
    )
