"""Latent attention on Hopper for many rows; the Python side of mla_clusters.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from aiter_inductor.core import jit
from aiter_inductor.core.launch import (
    KernelSignature,
    f32,
    i32,
    i64,
    pointer,
    tensor_map,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel

RANK, ROPE, ROWS = 512, 64, 64
KEYS, MAX_CLUSTERS = 64, 64
_THREADS, _REDUCE_THREADS, _PLACES, _MAX_PARTS = 384, 512, 3, 4

_TILE_BYTES = KEYS * (RANK + ROPE) * 2
_QUERY_BYTES, _DECAY_BYTES, _BARRIER_BYTES = ROWS * (64 + 16) * 2, 2 * ROWS * 4, 8 * (2 * 3 + 4)
_SHARED_BYTES = _PLACES * _TILE_BYTES + _QUERY_BYTES + _DECAY_BYTES + _BARRIER_BYTES
_REDUCE_BYTES = 8448  # of shared memory that mla_reduce declares itself

_TILE_US, _START_US, _ADD_US, _REDUCE_US, _PARTIAL_BYTES_PER_US = 1.4, 4.0, 2.0, 3.0, 4e6


@dataclass(frozen=True)
class ClusterPlan:
    """How the rows and the cache of a sequence are cut.

    Attributes:
        blocks: of 64 rows that share the tiles of keys in one cluster, 1 or 2.
        parts: of the cache that a cluster works on side by side, and adds, up to 4.
        clusters: that work on further parts of a sequence; `mla_reduce` adds theirs.
    """

    blocks: int
    parts: int
    clusters: int


@dataclass(frozen=True)
class ClusterVariant:
    """`mla_attend_clusters` with these definitions.

    Attributes:
        blocks, parts: as of a plan.
        page: rows of a page; 0 where those of a sequence lie one after the other.
    """

    blocks: int
    parts: int
    page: int = 0

    def module(self) -> jit.Module:
        """mla_clusters.cu."""
        defines = {"BLOCKS": self.blocks, "PARTS": self.parts, "PAGE": self.page}
        return cuda_module("mla_clusters", "mla_clusters.cu", **defines)

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        return KernelSignature(
            "mla_attend_clusters",
            (
                *map(tensor_map_of, ("q_latent", "q_rope", "latent", "rotated")),
                pointer("pages", torch.int32, optional=True),
                i64("pages_sequence"),
                pointer("lengths", torch.int32, optional=True),
                pointer("out", torch.bfloat16, align=16),
                i64("out_sequence"),
                i64("out_row"),
                pointer("partial", torch.float32),
                pointer("lse", torch.float32),
                f32("scale"),
                *map(i32, ("rows", "kv_len", "chunk")),
            ),
            waits=True,
        )


@dataclass(frozen=True)
class ReduceVariant:
    """`mla_reduce`, which adds the parts of other kernels."""

    def module(self) -> jit.Module:
        """mla_reduce.cu."""
        return cuda_module("mla_reduce", "mla_reduce.cu")

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        return KernelSignature(
            "mla_reduce",
            (
                pointer("partial", torch.float32),
                pointer("lse", torch.float32),
                pointer("lengths", torch.int32, optional=True),
                pointer("out", torch.bfloat16, align=16),
                i64("out_sequence"),
                i64("out_row"),
                *map(i32, ("num_rows", "rows", "kv_len", "chunk")),
            ),
            waits=True,
        )


@lru_cache
def clusters_that_fit(device: torch.device) -> tuple[int, ...]:
    """How many clusters of 1 to 8 blocks run side by side.

    That depends on how many multiprocessors work in each of the chip's groups, which differs from
    card to card: one H100 holds 30 clusters of 4 blocks, not 33.
    """
    kernel, sizes = load_kernel(ReduceVariant(), arch_name(device), device.type), range(1, 9)
    with torch.cuda.device(device):
        return kernel.clusters_side_by_side(sizes, _THREADS, _SHARED_BYTES - _REDUCE_BYTES)


@lru_cache(maxsize=4096)
def best_plan(batch_size: int, rows: int, kv_len: int, fitting: tuple[int, ...]) -> ClusterPlan:
    """The plan that is estimated to finish first.

    Args:
        batch_size: sequences.
        rows: heads times new tokens, of each sequence.
        kv_len: keys of each sequence.
        fitting: `clusters_that_fit`.
    """
    tiles, row_blocks = math.ceil(kv_len / KEYS), math.ceil(rows / ROWS)
    blocks = 2 - row_blocks % 2

    def estimate_us(plan: ClusterPlan) -> float:
        side_by_side = fitting[plan.blocks * plan.parts - 1]
        waves = math.ceil(batch_size * row_blocks // blocks * plan.clusters / side_by_side)
        longest = math.ceil(math.ceil(tiles / plan.clusters) / plan.parts)
        attend = waves * (_START_US + longest * _TILE_US + (plan.parts > 1) * _ADD_US)
        partial_bytes = 2 * batch_size * rows * plan.clusters * RANK * 4
        reduce = _REDUCE_US + partial_bytes / _PARTIAL_BYTES_PER_US
        return attend + (plan.clusters > 1) * reduce

    plans = [
        ClusterPlan(blocks, parts, clusters)
        for parts in range(1, _MAX_PARTS + 1)
        for clusters in range(1, MAX_CLUSTERS + 1)
        if parts * clusters <= max(tiles, 1) and fitting[blocks * parts - 1]
    ]
    return min(plans, key=estimate_us)


@dataclass(frozen=True)
class Pages:
    """Where the rows of each sequence lie.

    Attributes:
        tables: [batch, max_pages], int32.
        lengths: [batch], int32.
        size: rows of a page.
    """

    tables: Tensor
    lengths: Tensor
    size: int


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    out: Tensor,
    scale: float,
    plan: ClusterPlan | None = None,
) -> None:
    """Attention of absorbed queries, of one row stride, over rows that TMA can address.

    Args:
        q_latent: [batch, heads, q_len, 512], bf16, as all tensors; some.
        q_rope: [batch, heads, q_len, 64].
        latent: [batch, kv_len, 512]; some.
        k_rope: [batch, kv_len, 64].
        out: as `q_latent`.
        scale: factor on the scores, not negative.
        plan: how rows and cache are cut; None chooses.
    """
    batch_size, num_heads, q_len, _ = q_latent.shape
    kv_len = latent.shape[1]
    if plan is None:
        fitting = clusters_that_fit(q_latent.device)
        plan = best_plan(batch_size, num_heads * q_len, kv_len, fitting)
    box = 1, KEYS // plan.blocks, 64
    launch(
        plan,
        q_latent,
        q_rope,
        (tensor_map(latent, box), tensor_map(k_rope, box)),
        out,
        scale,
        kv_len,
    )


def launch(
    plan: ClusterPlan,
    q_latent: Tensor,
    q_rope: Tensor,
    maps: tuple[bytes, bytes],
    out: Tensor,
    scale: float,
    kv_len: int,
    pages: Pages | None = None,
) -> None:
    """Launch `mla_attend_clusters`, and `mla_reduce` where the plan has several clusters.

    Args:
        plan: how rows and cache are cut.
        q_latent: [batch, heads, q_len, 512], heads and tokens being rows of one stride.
        q_rope: [batch, heads, q_len, 64], the same.
        maps: of latent and rotated columns; a box is a block's share of a tile, or a page of it.
        out: as `q_latent`.
        scale: factor on the scores, not negative.
        kv_len: keys of each sequence; of pages, the most that a sequence has.
        pages: None where the rows of a sequence lie one after the other.
    """
    batch_size, num_heads, q_len, _ = q_latent.shape
    rows, tiles = num_heads * q_len, math.ceil(kv_len / KEYS)
    num_rows, chunk = batch_size * rows, math.ceil(tiles / plan.clusters)
    clusters = math.ceil(tiles / chunk)
    splits = clusters if clusters > 1 else 0
    partial = q_latent.new_empty(splits, num_rows, RANK, dtype=torch.float32)
    lse = q_latent.new_empty(splits, num_rows, dtype=torch.float32)
    tables, lengths, page = (pages.tables, pages.lengths, pages.size) if pages else (None, None, 0)
    arch, device_type = arch_name(q_latent.device), q_latent.device.type
    load_kernel(ClusterVariant(plan.blocks, plan.parts, page), arch, device_type).launch(
        (math.ceil(rows / ROWS), plan.parts * clusters, batch_size),
        _THREADS,
        _SHARED_BYTES,
        tensor_map(_as_rows(q_latent), (1, ROWS, 64)),
        tensor_map(_as_rows(q_rope), (1, ROWS, ROPE)),
        *maps,
        tables,
        0 if tables is None else tables.stride(0),
        lengths,
        *by_rows(out),
        partial,
        lse,
        scale * math.log2(math.e),
        rows,
        kv_len,
        chunk,
    )
    if splits:
        reduce(partial, lse, lengths, out, kv_len, chunk * KEYS)


def reduce(
    partial: Tensor, lse: Tensor, lengths: Tensor | None, out: Tensor, kv_len: int, chunk: int
) -> None:
    """Launch `mla_reduce`: the parts of each row, of `chunk` keys, into `out`.

    Args:
        partial: [splits, num_rows, 512], fp32.
        lse: [splits, num_rows], their log2-sum-exp2.
        lengths: [batch], int32: keys of each sequence; None takes `kv_len`.
        out: [batch, heads, q_len, 512], bf16.
        kv_len: keys of each sequence.
        chunk: keys of a part.
    """
    num_rows, rows = partial.shape[1], out.shape[1] * out.shape[2]
    load_kernel(ReduceVariant(), arch_name(out.device), out.device.type).launch(
        num_rows,
        _REDUCE_THREADS,
        0,
        partial,
        lse,
        lengths,
        *by_rows(out),
        num_rows,
        rows,
        kv_len,
        chunk,
    )


def by_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """A tensor of rows, the stride of sequences and that of rows."""
    return x, x.stride(0), x.stride(1 if x.shape[2] == 1 else 2)


def _as_rows(x: Tensor) -> Tensor:
    """[batch, heads * q_len, D] of heads and tokens that are rows of one stride."""
    _, sequence, row = by_rows(x)
    batch_size, num_heads, q_len, columns = x.shape
    return x.as_strided((batch_size, num_heads * q_len, columns), (sequence, row, 1))


def mappable(x: Tensor) -> Tensor:
    """`x`, copied where TMA cannot address it."""
    aligned = all(stride > 0 and 2 * stride % 16 == 0 for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
