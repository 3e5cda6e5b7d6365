"""Latent attention over pages on Hopper: mla_clusters.cu, whose tiles come page by page."""

from __future__ import annotations

import math

from torch import Tensor

from aiter_inductor.core.launch import tensor_map
from aiter_inductor.kernels.cuda.mla_clusters import (
    KEYS,
    MAX_CLUSTERS,
    RANK,
    ClusterPlan,
    Pages,
    best_plan,
    clusters_that_fit,
    launch,
    mappable,
)


def mla_paged_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    rank: int = 512,
    plan: ClusterPlan | None = None,
) -> Tensor:
    """Attend to the bf16 latent rows of pages; see the op of this name."""
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
        plan = paged_plan(num_seqs, num_heads, capacity, clusters_that_fit(q.device))
    pages = Pages(block_tables, seq_lens.contiguous(), page_size)
    rows = tensor_map(cache, (1, min(page_size, KEYS // plan.blocks), 64))
    by_rows = q.unsqueeze(2)
    queries = by_rows[..., :RANK], by_rows[..., RANK:]
    launch(plan, *queries, (rows, rows), out.unsqueeze(2), scale, capacity, pages)
    return out


def paged_plan(
    num_seqs: int, num_heads: int, capacity: int, fitting: tuple[int, ...]
) -> ClusterPlan:
    """The plan for sequences of any length up to `capacity`.

    The lengths lie on the device. Where sequences would not fill the chip twice, they are cut, so
    that short and long ones together do.

    Args:
        num_seqs: sequences.
        num_heads: query heads.
        capacity: keys that a sequence may have.
        fitting: `clusters_that_fit`.
    """
    plan = best_plan(num_seqs, num_heads, capacity, fitting)
    items = num_seqs * math.ceil(num_heads / 64) // plan.blocks
    side_by_side = fitting[plan.blocks * plan.parts - 1]
    clusters = min(2 * side_by_side // items, math.ceil(capacity / KEYS / 8), MAX_CLUSTERS)
    return ClusterPlan(plan.blocks, plan.parts, max(plan.clusters, clusters))
