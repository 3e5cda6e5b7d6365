"""Quantisation alone: per token and per group as rows, per tensor in two launches, and int4."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiter_inductor.core.dtypes import quant_max
from aiter_inductor.core.rows import MAX_LEVELS, num_loops, row_nest
from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.norm_kernel import norm_rows
from aiter_inductor.kernels.triton.quantise import (
    cast_to,
    clamp,
    inverse_of,
    larger,
    round_half_even,
    scale_of,
)
from aiter_inductor.kernels.triton.rows import RowConfig, row_offsets

AMAX_PROGRAMS = 512
"""Partial maxima of the per-tensor quantisation: four programs on each of 132 multiprocessors."""


def quant_static(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    qmin: float | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """`x` [*, N] quantised by `scale`; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    norm_rows(x, out, norm="none", quant="static", scale=scale, qmin=qmin, config=config)
    return out


def quant_per_token(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0, config: RowConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of `x` [*, N] quantised, each with its scale; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    norm_rows(x, out, norm="none", quant="token", scale=scale, amax_min=amax_min, config=config)
    return out, scale


def quant_per_group(
    x: Tensor,
    *,
    group_size: int,
    dtype: torch.dtype,
    amax_min: float = 0.0,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Groups of the rows of `x` [*, N] quantised; see the op of this name.

    Groups are rows of their own where that takes no third loop; `config` is for that case.
    """
    num_groups = x.shape[-1] // group_size
    groups = x.unflatten(-1, (num_groups, group_size))
    if num_loops(groups, row_major_output=True) <= MAX_LEVELS:
        q, scale = quant_per_token(groups, dtype=dtype, amax_min=amax_min, config=config)
        return q.flatten(-2), scale.squeeze(-1)
    out = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], num_groups), dtype=torch.float32)
    norm_rows(
        x,
        out,
        norm="none",
        quant="group",
        scale=scale,
        group_size=group_size,
        amax_min=amax_min,
    )
    return out, scale


@triton.jit
def locate(
    tile,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    N: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets [ROWS, BLOCK] of a tile, numbered along a row first, and which elements exist."""
    ACROSS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    rows = (tile // ACROSS) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (tile % ACROSS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    offsets = row_offsets(rows, inner, outer_stride, inner_stride, NESTED) + cols
    return offsets, (rows < num_rows) & (cols < N)


@triton.jit
def amax_kernel(
    x_ptr,
    partial_ptr,
    num_rows,
    inner,
    x_outer,
    x_inner,
    N: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program's largest magnitude, NaN where it met one."""
    num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(N, BLOCK)
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        offsets, mask = locate(tile, num_rows, inner, x_outer, x_inner, N, NESTED, ROWS, BLOCK)
        x = tl.load(x_ptr + offsets, mask, 0, eviction_policy="evict_last")
        largest = larger(largest, tl.abs(x.to(tl.float32)))
    flat = tl.reshape(largest, (ROWS * BLOCK,))
    tl.store(partial_ptr + tl.program_id(0), tl.reduce(flat, 0, larger))


@triton.jit
def quant_kernel(
    x_ptr,
    partial_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    inner,
    x_outer,
    x_inner,
    out_outer,
    out_inner,
    amax_min,
    N: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    QMAX: tl.constexpr,
):
    """One tile quantised by the scale that follows from all partial maxima."""
    tile = tl.program_id(0)
    offsets, mask = locate(tile, num_rows, inner, x_outer, x_inner, N, NESTED, ROWS, BLOCK)
    x = tl.load(x_ptr + offsets, mask, 0, eviction_policy="evict_first").to(tl.float32)
    partials = tl.load(partial_ptr + tl.arange(0, PARTIALS), eviction_policy="evict_last")
    scale = scale_of(tl.reduce(partials, 0, larger), amax_min, QMAX)
    if tile == 0:
        tl.store(scale_ptr, scale)
    q = cast_to(x * inverse_of(scale), out_ptr.dtype.element_ty)
    to, mask = locate(tile, num_rows, inner, out_outer, out_inner, N, NESTED, ROWS, BLOCK)
    tl.store(out_ptr + to, q, mask)


def quant_per_tensor(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`x` [*, N] quantised with one scale; see the op of this name.

    The first launch leaves each program's largest magnitude, the second reduces those in every
    program: no buffer to clear, no atomic, the same result every time.
    """
    N = x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((), dtype=torch.float32)
    programs = AMAX_PROGRAMS if x.is_cuda else 4
    partials = x.new_empty(programs, dtype=torch.float32)
    nest = row_nest(x, out)
    if nest is None:
        raise ValueError(f"rows of shape {tuple(x.shape)}, strides {x.stride()} need three loops")
    (x_outer, x_inner), (out_outer, out_inner) = nest.strides
    block = min(triton.next_power_of_2(N), 4096)
    rows = 4096 // block
    tiling = {
        "N": N,
        "NESTED": not (isinstance(nest.inner, int) and nest.inner == 1),
        "ROWS": rows,
        "BLOCK": block,
    }
    tiles = (nest.num_rows + rows - 1) // rows * triton.cdiv(N, block)
    warps = 4 if torch.version.hip else 8
    launchable(amax_kernel)[(programs,)](
        x, partials, nest.num_rows, nest.inner, x_outer, x_inner, **tiling, num_warps=warps
    )
    launchable(quant_kernel)[(tiles,)](
        x,
        partials,
        out,
        scale,
        nest.num_rows,
        nest.inner,
        x_outer,
        x_inner,
        out_outer,
        out_inner,
        amax_min,
        **tiling,
        PARTIALS=programs,
        QMAX=quant_max(dtype),
        num_warps=warps,
    )
    return out, scale


@triton.jit
def int4_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    num_groups,
    inner,
    x_outer,
    x_inner,
    packed_outer,
    packed_inner,
    scale_outer,
    scale_inner,
    amax_min,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of groups quantised to [-8, 7] and packed in pairs."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = rows < num_groups
    x_row = row_offsets(rows, inner, x_outer, x_inner, NESTED)
    x = tl.load(x_ptr + x_row + tl.arange(0, GROUP)[None, :], live, 0).to(tl.float32)
    scale = scale_of(tl.reduce(tl.abs(x), 1, larger, keep_dims=True), amax_min, 7.0)
    scale_row = row_offsets(rows, inner, scale_outer, scale_inner, NESTED)
    tl.store(scale_ptr + scale_row, scale, live)
    q = round_half_even(clamp(x * inverse_of(scale), 7.0)).to(tl.int32)
    low, high = tl.split(tl.reshape(q, (ROWS, GROUP // 2, 2)))
    packed_row = row_offsets(rows, inner, packed_outer, packed_inner, NESTED)
    packed = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
    tl.store(packed_ptr + packed_row + tl.arange(0, GROUP // 2)[None, :], packed, live)


def quant_int4_per_group(
    x: Tensor, *, group_size: int, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Groups of the rows of `x` [*, N] quantised to packed int4; see the op of this name."""
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    packed = groups.new_empty((*groups.shape[:-1], group_size // 2), dtype=torch.uint8)
    scale = groups.new_empty((*groups.shape[:-1], 1), dtype=torch.float32)
    nest = row_nest(groups, packed, scale)
    if nest is None:
        raise ValueError(f"rows of shape {tuple(x.shape)}, strides {x.stride()} need three loops")
    (x_outer, x_inner), (packed_outer, packed_inner), (scale_outer, scale_inner) = nest.strides
    rows = max(4096 // group_size, 1)
    launchable(int4_kernel)[((nest.num_rows + rows - 1) // rows,)](
        groups,
        packed,
        scale,
        nest.num_rows,
        nest.inner,
        x_outer,
        x_inner,
        packed_outer,
        packed_inner,
        scale_outer,
        scale_inner,
        amax_min,
        GROUP=group_size,
        NESTED=not (isinstance(nest.inner, int) and nest.inner == 1),
        ROWS=rows,
        num_warps=4 if torch.version.hip else 8,
    )
    return packed.flatten(-2), scale.squeeze(-1)
