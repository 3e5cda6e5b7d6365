"""Latent attention over pages on Hopper: mla.cu, whose tiles come page by page."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aiter_inductor.core.launch import tensor_map
from aiter_inductor.kernels.cuda.mla import RANK, Pages, Rows, launch, mappable, row_box
from aiter_inductor.kernels.cuda.mla_plan import KEYS, MAX_CLUSTERS, ROWS, MlaPlan, processors

LEAST_TILES = 2  # of a cluster: one sequence of 4096 tokens takes an H100 17 us with 2, 19 with 1


def mla_paged_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    rank: int = 512,
    plan: MlaPlan | None = None,
) -> Tensor:
    """Attend to the bf16 or e4m3 latent rows of pages; see the op of this name."""
    num_seqs, num_heads, _ = q.shape
    out = q.new_empty(num_seqs, num_heads, rank)
    page_size, capacity = cache.shape[1], block_tables.shape[1] * cache.shape[1]
    if out.numel() == 0 or cache.shape[0] == 0 or capacity == 0:
        return out.zero_()
    if scale < 0:
        q, scale = -q, -scale
    q, cache = mappable(q), mappable(cache)
    block_tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
    if plan is None:
        plan = paged_plan(num_heads, processors(q.device))
    pages = Pages(block_tables, seq_lens.contiguous(), page_size)
    rows = tensor_map(cache, row_box(cache, min(page_size, KEYS // plan.blocks)))
    by_rows = q.unsqueeze(2)
    queries = by_rows[..., :RANK], by_rows[..., RANK:]
    fp8 = cache.dtype == torch.float8_e4m3fn
    described = Rows(capacity, fp8, kv_scale, pages)
    launch(plan, *queries, (rows, rows), out.unsqueeze(2), described, scale)
    return out


def paged_plan(num_heads: int, num_processors: int) -> MlaPlan:
    """A plan that fills the chip, whatever the lengths are, which lie on the device.

    64 clusters of 66 lose nothing on an H100 where lengths differ (160 us, 159), and cut none of
    128 sequences of one length (249 us, 266).
    """
    row_blocks = math.ceil(num_heads / ROWS)
    most = min(max(num_processors // row_blocks, 1), MAX_CLUSTERS)
    power = 1 << (most.bit_length() - 1)
    return MlaPlan(2 - row_blocks % 2, power if 16 * power >= 15 * most else most, LEAST_TILES)
