"""Attention of one query a sequence over all keys of a cache, by decode_attention.hip."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.kernels.hip.decode_attention import VECTOR_BYTES, CacheView, DecodeStyle
from aiter_inductor.kernels.hip.decode_launch import (
    DecodeHow,
    DecodeTensors,
    Described,
    decode,
    readable_queries,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    first_keys: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
) -> Tensor:
    """`softmax(q k^T * scale) v` for q [B, H, 1, Dqk]; see the op of this name.

    The one query is the last of its sequence, whatever `causal` is; rows of one query lie in memory
    the same in either `layout`.

    Raises:
        ValueError: for `first_keys`, which the kernel does not read.
    """
    if first_keys is not None:
        raise ValueError("the kernel reads no first keys, and some are given")
    given = DecodeTensors(q, k, v, None, None, None, None, sinks, mask)
    how = DecodeHow("rows", window or 0, softcap is not None)
    return decode(given, how, _described, scale=scale, softcap=softcap or 0.0)


def _described(given: DecodeTensors, how: DecodeHow) -> Described:
    """Each sequence of [B, KVH, T, D] is a page of its own."""
    q, sinks, mask = readable_queries(given.q), given.sinks, given.mask
    k, v = _readable(given.keys), _readable(given.values)
    batch, kv_heads, num_keys, v_dim = v.shape
    style = DecodeStyle(
        q.dtype,
        k.dtype,
        q.shape[3],
        v_dim,
        q.shape[1] // kv_heads,
        None,
        packed=False,
        softcap=how.softcap,
        mask_dtype=None if mask is None else mask.dtype,
    )
    rows = None if mask is None else mask.expand(batch, 1, 1, num_keys)[:, 0, 0]
    return Described(
        given._replace(q=q, keys=k, values=v, sinks=None if sinks is None else sinks.to(q.dtype)),
        style,
        kv_heads,
        _rows(k),
        _rows(v),
        num_keys,
        (0, 0) if rows is None else (rows.stride(0), rows.stride(1)),
    )


def _rows(x: Tensor) -> CacheView:
    return CacheView(x, x.stride(0), x.stride(2), x.stride(1), 0)


def _readable(x: Tensor) -> Tensor:
    """Copied where 16 bytes of a head cannot be loaded at once."""
    vec = VECTOR_BYTES // x.element_size()
    whole = all(stride % vec == 0 for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and whole and x.data_ptr() % VECTOR_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
