"""Latent attention with the projections absorbed, on Hopper; the Python side of mla.cu."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aiter_inductor.core import jit
from aiter_inductor.core.launch import (
    KernelSignature,
    Parameter,
    f32,
    i32,
    i64,
    pointer,
    tensor_map,
    tensor_map_of,
)
from aiter_inductor.kernels.cuda.loading import Variant, arch_name, cuda_module, load_kernel
from aiter_inductor.kernels.cuda.mla_few import FewLaunches
from aiter_inductor.kernels.cuda.mla_plan import (
    KEYS,
    ROWS,
    START_TILES,
    FewPlan,
    MlaPlan,
    best_plan,
    few_plan,
    parts_of_sequences,
    processors,
    share_of_cluster,
)
from aiter_inductor.kernels.prepared import Plans, facts_of, same_memory

RANK, ROPE = 512, 64
_THREADS, _PLACES = 384, 3
_ALIGN_BYTES = 16

_TILE_BYTES = KEYS * (RANK + ROPE) * 2
_QUERY_BYTES, _FACTOR_BYTES, _BARRIER_BYTES = ROWS * (64 + 16) * 2, 3 * ROWS * 4, 8 * 15
_LOADER_BYTES = 4 * (5 + 3 + 2 * 5 + 8)
_SHARED_BYTES = (
    _PLACES * _TILE_BYTES + _QUERY_BYTES + _FACTOR_BYTES + _BARRIER_BYTES + _LOADER_BYTES
)

_REDUCE_WARPS = 8
_REDUCE = 32 * _REDUCE_WARPS, 0
_SPREAD_PARTS = 12  # from which a block of mla_reduce takes half a row, and not a warp


@dataclass(frozen=True)
class AttendVariant:
    """`mla_attend` with these definitions.

    Attributes:
        blocks: as of a plan.
        fp8: whether rows are e4m3 numbers, else bf16.
        page: rows of a page; 0 where those of a sequence lie one after the other.
    """

    blocks: int
    fp8: bool = False
    page: int = 0

    def module(self) -> jit.Module:
        """mla.cu."""
        return cuda_module("mla", "mla.cu", BLOCKS=self.blocks, FP8=self.fp8, PAGE=self.page)

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        return KernelSignature(
            "mla_attend",
            (
                *map(tensor_map_of, ("q_latent", "q_rope", "latent", "rotated", "out")),
                pointer("pages", torch.int32, optional=True),
                i64("pages_sequence"),
                pointer("lengths", torch.int32, optional=True),
                *_SUMS,
                pointer("kv_scale", torch.float32, optional=True),
                f32("scale"),
                *map(i32, ("sequences", "rows", "kv_len", "start", "share", "cut_of_sequence")),
            ),
            waits=True,
        )


@dataclass(frozen=True)
class ReduceVariant:
    """`mla_reduce`, which adds what several clusters found of a row."""

    def module(self) -> jit.Module:
        """mla_reduce.cu."""
        return cuda_module("mla_reduce", "mla_reduce.cu")

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        rows = map(i32, ("rows", "group_rows", "slots", "spread"))
        sizes = map(i32, ("sequences", "kv_len", "start", "share", "cut_of_sequence"))
        return KernelSignature("mla_reduce", (*_SUMS, *_OUT, *rows, *sizes), waits=True)


_OUT: tuple[Parameter, ...] = (
    pointer("out", torch.bfloat16, align=_ALIGN_BYTES),
    i64("out_sequence"),
    i64("out_row"),
)
_SUMS: tuple[Parameter, ...] = (
    pointer("sums", torch.float16),
    pointer("lse", torch.float32),
    pointer("scales", torch.float32),
    pointer("cuts", torch.int32, optional=True),
)


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    mask: Tensor | None,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Attention over bf16 or e4m3 latent rows without a mask; see the op of this name."""
    num_heads, nope = q_nope.shape[1], q_nope.shape[-1]
    weight = kv_b_weight.unflatten(0, (num_heads, -1))
    q_latent = torch.einsum("bhsd,hdr->bhsr", q_nope, weight[:, :nope])
    out = attend(q_latent, q_rope, latent, k_rope, scale, kv_scale)
    return torch.einsum("bhsr,hdr->bhsd", out, weight[:, nope:]).contiguous()


class Operands(NamedTuple):
    """What the kernels read.

    Attributes:
        q_latent: [batch, heads, q_len, 512], heads and tokens being rows of one stride.
        q_rope: [batch, heads, q_len, 64], the same.
        latent, rotated: columns of the cache: [batch, kv_len, 512] and [batch, kv_len, 64], or
            pages of rows that hold both.
        tables: [batch, max_pages], int32; None where the rows of a sequence lie one after the
            other.
        lengths: [batch], int32; None as `tables`.
        kv_scale: one number by which rows of e4m3 are multiplied; None is 1.
    """

    q_latent: Tensor
    q_rope: Tensor
    latent: Tensor
    rotated: Tensor
    tables: Tensor | None
    lengths: Tensor | None
    kv_scale: Tensor | None


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    scale: float,
    kv_scale: Tensor | None = None,
    plan: MlaPlan | FewPlan | None = None,
) -> Tensor:
    """Attention of absorbed queries [batch, heads, q_len, 512]: sums of latent rows, same shape.

    Args:
        q_latent: bf16, as the result.
        q_rope: [batch, heads, q_len, 64], bf16.
        latent: [batch, kv_len, 512], bf16 or e4m3fn.
        k_rope: [batch, kv_len, 64], dtype of `latent`.
        scale: factor on the scores.
        kv_scale: one number by which rows of e4m3 are multiplied; None is 1.
        plan: how rows and cache are cut; None chooses.
    """
    if q_latent.numel() == 0 or latent.numel() == 0:
        return torch.zeros_like(q_latent)
    scale, q_latent, q_rope = with_positive_scale(scale, q_latent, q_rope)
    given = Operands(q_latent, q_rope, latent, k_rope, None, None, kv_scale)
    key = plan, facts_of(*given)
    launches = _PLANS.get(key) or _PLANS.keep(key, _launches(given, plan))
    if launches.copies:
        given = _taken(given)
    out = torch.empty_like(given.q_latent)
    if isinstance(launches, FewLaunches):
        launches.run(*given[:4], out, scale)
    else:
        launches.run(given, out, scale)
    return out


def with_positive_scale(scale: float, *queries: Tensor) -> tuple[Any, ...]:
    """A scale above 0 and queries of the same scaled scores.

    Kernels compare raw scores, and hide keys by minus infinity, which 0 times would make NaN.
    """
    if scale > 0:
        return scale, *queries
    sign = -1.0 if scale < 0 else 0.0
    return -scale or 1.0, *(q * sign for q in queries)


def _taken(given: Operands) -> Operands:
    """As the kernel reads them: the same tensors, or copies."""
    return given._replace(
        q_latent=_with_rows(given.q_latent),
        q_rope=_with_rows(given.q_rope),
        latent=mappable(given.latent),
        rotated=mappable(given.rotated),
    )


def _launches(given: Operands, plan: MlaPlan | FewPlan | None) -> Launches | FewLaunches:
    taken, fp8 = _taken(given), given.latent.dtype == torch.float8_e4m3fn
    (batch_size, num_heads, q_len, _), kv_len = taken.q_latent.shape, taken.latent.shape[1]
    if plan is None:
        tiles, rows = math.ceil(kv_len / KEYS), num_heads * q_len
        sizes = batch_size, rows, tiles, processors(taken.q_latent.device)
        plan = (None if fp8 else few_plan(*sizes)) or best_plan(*sizes)
    out, copies = torch.empty_like(taken.q_latent), not same_memory(given, taken)
    if isinstance(plan, FewPlan):
        queries = _as_rows(taken.q_latent), _as_rows(taken.q_rope)
        caches = taken.latent, taken.rotated
        return FewLaunches.of(*queries, *caches, _as_rows(out), plan, copies=copies)
    return Launches.of(taken, out, plan, kv_len, KEYS // plan.blocks, copies=copies)


def row_box(cache: Tensor, rows: int) -> tuple[int, int, int]:
    """What one copy takes of a cache: 128 bytes of so many rows."""
    return 1, rows, 128 // cache.element_size()


@dataclass(frozen=True)
class Parts:
    """What clusters leave of rows of cut sequences; two slots each.

    Attributes:
        sums: [groups, slots, group_rows, 512], fp16: half rows over a power of 2.
        lse: [groups, slots, group_rows], fp32: log2-sum-exp2.
        scales: [groups, slots, group_rows, 2], fp32: these powers.
        cuts: [entries, 4], int32: sequence, first cluster and number of clusters; None where all
            sequences are as long.
        of_sequences: whether there is an entry for each sequence, else one for each cluster.
    """

    sums: Tensor
    lse: Tensor
    scales: Tensor
    cuts: Tensor | None
    of_sequences: bool

    @classmethod
    def of(cls, lengths: Tensor | None, like: Tensor, groups: int, plan: MlaPlan) -> Parts:
        """Room on the device of `like`; `groups` is 0 where no sequence is cut."""
        shape, sequences = (groups, 2 * plan.clusters, plan.blocks * ROWS), len(like)
        cuts = like.new_empty(min(sequences, plan.clusters), 4, dtype=torch.int32)
        return cls(
            like.new_empty(*shape, RANK, dtype=torch.float16),
            like.new_empty(*shape, dtype=torch.float32),
            like.new_empty(*shape, 2, dtype=torch.float32),
            None if lengths is None else cuts,
            sequences < plan.clusters,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As the kernels take them."""
        return self.sums, self.lse, self.scales, self.cuts


@dataclass(frozen=True)
class Launches:
    """`mla_attend`, and `mla_reduce` where a sequence may be cut, but for addresses and the scale.

    Attributes:
        plan: how rows and caches are cut.
        copies: whether the kernels take copies of some operands.
        groups: of rows, whose sequences may be cut; 0 where none is.
        maps: of both parts of queries, both of the cache, and the result.
        rope_bytes: from the address of `q_rope` to where its map starts.
        attend, reduce: the kernels; no reduction where no sequence is cut.
        table_stride: between sequences.
        attend_numbers, reduce_numbers: last arguments but one.
    """

    plan: MlaPlan
    copies: bool
    groups: int
    maps: tuple[bytes, bytes, bytes, bytes, bytes]
    rope_bytes: int
    attend: Callable[..., None]
    reduce: Callable[..., None] | None
    table_stride: int
    attend_numbers: tuple[int, ...]
    reduce_numbers: tuple[int, ...]

    @classmethod
    def of(
        cls,
        taken: Operands,
        out: Tensor,
        plan: MlaPlan,
        kv_len: int,
        box_rows: int,
        *,
        copies: bool,
        page: int = 0,
        rope_bytes: int = 0,
    ) -> Launches:
        """Of all calls whose operands and result have these facts.

        Args:
            kv_len: of each sequence; in pages, the most that one has.
            box_rows: rows of the cache that one copy takes: a block's share of a tile, or a page.
            page: rows of a page, or 0.
        """
        (sequences, num_heads, q_len, _), tables = taken.q_latent.shape, taken.tables
        rows, tiles = num_heads * q_len, math.ceil(kv_len / KEYS)
        count = plan.clusters if page else parts_of_sequences(sequences, tiles, plan)
        groups = math.ceil(rows / (plan.blocks * ROWS))
        variant = AttendVariant(plan.blocks, taken.latent.dtype == torch.float8_e4m3fn, page)
        grid = plan.blocks * plan.clusters, groups, 1
        expected = plan.clusters // sequences if page else count
        share, spread = share_of_cluster(sequences, tiles, plan), expected > _SPREAD_PARTS
        items = 2 * rows if spread else math.ceil(2 * rows / _REDUCE_WARPS)
        reduce = None
        if count > 1:
            each = items, min(sequences, plan.clusters), 1
            reduce = _launch(ReduceVariant(), out, each, _REDUCE)
        queries = (_as_rows(taken.q_latent), (1, ROWS, 64)), (_as_rows(taken.q_rope), (1, ROWS, 64))
        caches = ((x, row_box(x, box_rows)) for x in (taken.latent, taken.rotated))
        of_q, of_rope, latent, rotated, of_out = (
            tensor_map(x, box) for x, box in (*queries, *caches, (_as_rows(out), (1, ROWS, 64)))
        )
        cut, slots = (kv_len, START_TILES), (plan.blocks * ROWS, 2 * plan.clusters)
        return cls(
            plan,
            copies,
            groups if count > 1 else 0,
            (of_q, of_rope, latent, rotated, of_out),
            rope_bytes,
            _launch(variant, out, grid, (_THREADS, _SHARED_BYTES)),
            reduce,
            0 if tables is None else tables.stride(0),
            (sequences, rows, *cut, plan.least),
            (*_by_rows(out)[1:], rows, *slots, int(spread), sequences, *cut, share),
        )

    def run(self, taken: Operands, out: Tensor, scale: float) -> None:
        """Fill `out`; `scale` is positive."""
        q_latent, q_rope, latent, rotated, tables, lengths, kv_scale = taken
        parts = Parts.of(lengths, q_latent, self.groups, self.plan)
        of_q, of_rope, of_latent, of_rotated, of_out = self.maps
        self.attend(
            *((of_q, q_latent, 0), (of_rope, q_rope, self.rope_bytes)),
            *((of_latent, latent, 0), (of_rotated, rotated, 0), (of_out, out, 0)),
            *(tables, self.table_stride, lengths, *parts.tensors(), kv_scale),
            *(scale * math.log2(math.e), *self.attend_numbers, int(parts.of_sequences)),
        )
        if self.reduce is not None:
            last = int(parts.of_sequences)
            self.reduce(*parts.tensors(), out, *self.reduce_numbers, last)


_PLANS = Plans[Launches | FewLaunches]()


def _launch(
    variant: Variant, like: Tensor, grid: tuple[int, int, int], block: tuple[int, int]
) -> Callable[..., None]:
    """`block`: threads, and bytes of shared memory."""
    kernel = load_kernel(variant, arch_name(like.device), like.device.type)
    return partial(kernel.launch, grid, *block)


def _by_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """A tensor of rows, the stride of sequences and that of rows."""
    return x, x.stride(0), x.stride(1 if x.shape[2] == 1 else 2)


def _as_rows(x: Tensor) -> Tensor:
    """[batch, heads * q_len, D] of heads and tokens that are rows of one stride."""
    _, sequence, row = _by_rows(x)
    batch_size, num_heads, q_len, columns = x.shape
    return x.as_strided((batch_size, num_heads * q_len, columns), (sequence, row, 1))


def _with_rows(x: Tensor) -> Tensor:
    """[batch, heads, q_len, D], copied where heads and tokens are not rows of one stride."""
    batch, head, token, last = x.stride()
    aligned = all(s > 0 and 2 * s % _ALIGN_BYTES == 0 for s in (batch, head, token))
    one_stride = x.shape[2] == 1 or head == x.shape[2] * token
    if last == 1 and aligned and one_stride and x.data_ptr() % _ALIGN_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def mappable(x: Tensor) -> Tensor:
    """`x`, copied where TMA cannot address it."""
    strides = (stride * x.element_size() for stride in x.stride()[:-1])
    aligned = all(stride > 0 and stride % _ALIGN_BYTES == 0 for stride in strides)
    if x.stride(-1) == 1 and aligned and x.data_ptr() % _ALIGN_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
