"""Latent attention with the projections absorbed, on Hopper; the Python side of mla.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from aiter_inductor.kernels.cuda.loading import arch_name, cuda_module, load_kernel
from aiter_inductor.kernels.cuda.mla_plan import (
    KEYS,
    ROWS,
    START_TILES,
    MlaPlan,
    best_plan,
    parts_of_sequences,
    processors,
    share_of_cluster,
)

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


@dataclass(frozen=True)
class Rows:
    """Latent rows of all sequences.

    Attributes:
        kv_len: of each sequence; in pages, the most that one has.
        fp8: whether they are e4m3 numbers, else bf16.
        kv_scale: one number by which those of e4m3 are multiplied; None is 1.
        pages: None where the rows of a sequence lie one after the other.
    """

    kv_len: int
    fp8: bool
    kv_scale: Tensor | None = None
    pages: Pages | None = None


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    scale: float,
    kv_scale: Tensor | None = None,
    plan: MlaPlan | None = None,
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
    q_latent, q_rope = _with_rows(q_latent), _with_rows(q_rope)
    latent, k_rope = mappable(latent), mappable(k_rope)
    batch_size, num_heads, q_len, _ = q_latent.shape
    kv_len, rows = latent.shape[1], num_heads * q_len
    out = torch.empty_like(q_latent)
    if batch_size * rows == 0 or kv_len == 0:
        return out.zero_()
    if scale < 0:
        q_latent, q_rope, scale = -q_latent, -q_rope, -scale
    if plan is None:
        tiles = math.ceil(kv_len / KEYS)
        plan = best_plan(batch_size, rows, tiles, processors(q_latent.device))
    maps = tuple(tensor_map(x, row_box(x, KEYS // plan.blocks)) for x in (latent, k_rope))
    fp8 = latent.dtype == torch.float8_e4m3fn
    launch(plan, q_latent, q_rope, maps, out, Rows(kv_len, fp8, kv_scale), scale)
    return out


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


def launch(
    plan: MlaPlan,
    q_latent: Tensor,
    q_rope: Tensor,
    maps: tuple[bytes, ...],
    out: Tensor,
    cache: Rows,
    scale: float,
) -> None:
    """Launch `mla_attend`, and `mla_reduce` where a sequence may be cut.

    Args:
        plan: how rows and caches are cut.
        q_latent: [batch, heads, q_len, 512], heads and tokens being rows of one stride.
        q_rope: [batch, heads, q_len, 64], the same.
        maps: of latent and rotated columns; a box is a block's share of a tile, or a page of it.
        out: as `q_latent`.
        cache: what the maps address.
        scale: factor on the scores, not negative.
    """
    batch_size, num_heads, q_len, _ = q_latent.shape
    rows, tiles, pages = num_heads * q_len, math.ceil(cache.kv_len / KEYS), cache.pages
    count = plan.clusters if pages else parts_of_sequences(batch_size, tiles, plan)
    groups = math.ceil(rows / (plan.blocks * ROWS))
    tables, lengths, page = (pages.tables, pages.lengths, pages.size) if pages else (None, None, 0)
    parts = Parts.of(lengths, q_latent, groups if count > 1 else 0, plan)
    arch, device_type = arch_name(q_latent.device), q_latent.device.type
    load_kernel(AttendVariant(plan.blocks, cache.fp8, page), arch, device_type).launch(
        (plan.blocks * plan.clusters, groups, 1),
        _THREADS,
        _SHARED_BYTES,
        tensor_map(_as_rows(q_latent), (1, ROWS, 64)),
        tensor_map(_as_rows(q_rope), (1, ROWS, ROPE)),
        *maps,
        tensor_map(_as_rows(out), (1, ROWS, 64)),
        tables,
        0 if tables is None else tables.stride(0),
        lengths,
        *parts.tensors(),
        cache.kv_scale,
        scale * math.log2(math.e),
        batch_size,
        rows,
        cache.kv_len,
        START_TILES,
        plan.least,
        int(parts.of_sequences),
    )
    if count > 1:
        expected = plan.clusters // batch_size if pages else count
        share = share_of_cluster(batch_size, tiles, plan)
        _reduce(parts, out, cache.kv_len, share, spread=expected > _SPREAD_PARTS)


def _reduce(parts: Parts, out: Tensor, kv_len: int, share: int, *, spread: bool) -> None:
    """Launch `mla_reduce`; `spread` where sequences are expected to have many parts."""
    _, slots, group_rows, _ = parts.sums.shape
    sequences, rows = out.shape[0], out.shape[1] * out.shape[2]
    items = 2 * rows if spread else math.ceil(2 * rows / _REDUCE_WARPS)
    load_kernel(ReduceVariant(), arch_name(out.device), out.device.type).launch(
        (items, min(sequences, slots // 2), 1),
        32 * _REDUCE_WARPS,
        0,
        *parts.tensors(),
        *_by_rows(out),
        rows,
        group_rows,
        slots,
        int(spread),
        sequences,
        kv_len,
        START_TILES,
        share,
        int(parts.of_sequences),
    )


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
