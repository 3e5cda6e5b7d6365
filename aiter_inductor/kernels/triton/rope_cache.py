"""Rotary embedding and the write of keys and values into a static cache, in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.rope import RopeConfig, rotated_like, rotation_style, stride_of
from aiter_inductor.kernels.triton.rope_cache_kernel import rope_cache_kernel

AXES = (0, 1, 2)


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
    config: RopeConfig | None = None,
) -> Tensor:
    """Rotate `q` and `k`, store `k` and `v`; see the op of this name."""
    style = rotation_style(q, cos, interleaved_in, interleaved_out, rotary_dim, False)
    out = rotated_like(q, cos, out_dtype, style)
    batch, num_heads, seq_len, head_dim = q.shape
    num_kv_heads, normed = k.shape[1], q_weight is not None
    config = config or RopeConfig.default(num_heads, head_dim, normed=normed)
    num_tokens, kv_blocks = batch * seq_len, triton.cdiv(num_kv_heads, config.block_h)
    grid = (
        triton.cdiv(num_tokens, config.block_t),
        triton.cdiv(num_heads, config.block_h) + 2 * kv_blocks,
    )
    if isinstance(num_tokens, int) and num_tokens == 0:
        return out
    rows = (q, k, v, out, key_cache, value_cache)
    launchable(rope_cache_kernel)[grid](
        *rows,
        # Without weights the kernel gets the heads' pointers and never reads through them.
        q if q_weight is None else q_weight,
        k if k_weight is None else k_weight,
        cos,
        sin,
        slots,
        num_tokens,
        seq_len,
        key_cache.shape[2],
        num_heads,
        num_kv_heads,
        *(stride_of(x, axis) for x in rows for axis in AXES),
        *(stride_of(table, axis) for table in (cos, sin) for axis in (0, 2, 3)),
        slots.stride(0),
        eps,
        weight_offset,
        **style,
        V_DIM=v.shape[-1],
        BLOCK_V=triton.next_power_of_2(v.shape[-1]),
        NORM=normed,
        ROUND_FIRST=round_before_weight,
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        **config.launch(),
    )
    return out
