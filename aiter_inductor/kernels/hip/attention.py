"""Attention of one query a sequence over all keys of a cache, by decode_attention.hip."""

from __future__ import annotations

from torch import Tensor

from aiter_inductor.kernels.hip.decode_attention import (
    VECTOR_BYTES,
    CacheView,
    DecodeStyle,
    Tokens,
    decode,
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
    k, v = (x if _is_aligned(x) else x.contiguous() for x in (k, v))
    batch, kv_heads, num_keys, v_dim = v.shape
    rows = None if mask is None else mask.expand(batch, 1, 1, num_keys)[:, 0, 0]
    style = DecodeStyle(
        q.dtype,
        k.dtype,
        q.shape[3],
        v_dim,
        q.shape[1] // kv_heads,
        None,
        packed=False,
        softcap=softcap is not None,
        mask_dtype=None if mask is None else mask.dtype,
    )
    out = decode(
        q.squeeze(2),
        _rows(k),
        _rows(v),
        Tokens(None, None, num_keys, window or 0, rows),
        None,
        None,
        None if sinks is None else sinks.to(q.dtype),
        style=style,
        num_kv_heads=kv_heads,
        scale=scale,
        softcap=softcap or 0.0,
    )
    return out.unsqueeze(2)


def _rows(x: Tensor) -> CacheView:
    """[B, KVH, T, D], each sequence a page of its own."""
    return CacheView(x, x.stride(0), x.stride(2), x.stride(1), 0)


def _is_aligned(x: Tensor) -> bool:
    vec = VECTOR_BYTES // x.element_size()
    whole = all(stride % vec == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and whole and x.data_ptr() % VECTOR_BYTES == 0
