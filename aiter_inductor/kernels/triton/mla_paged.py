"""Latent attention over pages, and the tokens of a sequence split among programs."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.mla import MlaConfig, reduced
from aiter_inductor.kernels.triton.mla_kernel import mla_split_kernel


def mla_paged_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    rank: int = 512,
    config: MlaConfig | None = None,
) -> Tensor:
    """Attend to the latent rows of pages; see the op of this name."""
    num_seqs, num_heads, width = q.shape
    page_size, capacity = cache.shape[1], block_tables.shape[1] * cache.shape[1]
    q_latent, q_rope = q[..., :rank].contiguous(), q[..., rank:].contiguous()
    cache = cache if cache.stride(-1) == 1 else cache.contiguous()
    block_tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
    if config is None:
        config = MlaConfig.default(num_seqs, num_heads, capacity, q.element_size(), width)
    splits, num_rows = config.splits, num_seqs * num_heads
    partial = q.new_empty(splits, num_rows, rank, dtype=torch.float32)
    lse = q.new_empty(splits, num_rows, dtype=torch.float32)
    out = q.new_empty(num_seqs, num_heads, rank)
    if isinstance(num_rows, int) and num_rows == 0:
        return out
    latent, k_rope = cache[..., :rank], cache[..., rank:]
    launchable(mla_split_kernel)[(num_seqs, triton.cdiv(num_heads, config.block_h), splits)](
        q_latent,
        q_rope,
        latent,
        k_rope,
        block_tables,
        seq_lens.contiguous(),
        None,
        kv_scale,
        partial,
        lse,
        scale * math.log2(math.e),
        num_heads,
        1,
        capacity,
        num_rows,
        *latent.stride()[:2],
        *k_rope.stride()[:2],
        block_tables.stride(0),
        0,
        0,
        0,
        0,
        CAUSAL=False,
        PAGE=page_size,
        R=rank,
        ROPE=width - rank,
        BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_ROPE=max(triton.next_power_of_2(width - rank), 16),
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        **config.launch(),
    )
    return reduced(partial, lse, out)
