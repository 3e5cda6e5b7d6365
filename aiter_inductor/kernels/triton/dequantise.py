"""A quantised weight in full width, for products of many rows by a library."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiter_inductor.kernels.triton.gemm_weight import alike
from aiter_inductor.kernels.triton.gemm_weight_kernel import unpacked
from aiter_inductor.kernels.triton.launch import launchable

ROWS, COLUMNS = 4, 1024
"""A tile, by 4 warps: int4 of 4096 x 4096 by groups of 128 takes 14.5 us on an H100, as long as the
copy of its bytes. A scale an element, and not one a group of the tile, made that 50.6."""


@triton.jit
def spread_groups(
    ptr, n, N, K, row_stride, column_stride,
    SCALE_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What is kept for groups of SCALE_K columns, as [ROWS, groups of a tile, 1]."""
    GROUPS: tl.constexpr = COLUMNS // SCALE_K
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    live = (n < N) & (group * SCALE_K < K)
    found = tl.load(ptr + n * row_stride + group * column_stride, live, 0.0)
    return found.to(tl.float32)[:, :, None]


@triton.jit
def spread_columns(
    ptr, n, k, N, K, row_stride, column_stride, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr
):
    """One element a column, or one a row where SCALE_K is 0."""
    at = n // SCALE_N * row_stride
    if SCALE_K:
        at = at + k // SCALE_K * column_stride
    return tl.load(ptr + at, (n < N) & (k < K), 0.0).to(tl.float32)


@triton.jit
def dequantise_kernel(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    K,
    weight_stride,
    scale_row_stride,
    scale_column_stride,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    PACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of rows and columns of the weight; SCALE_K 0 means one scale a row."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    HELD: tl.constexpr = COLUMNS // 2 if PACKED else COLUMNS
    held = (tl.program_id(1) * HELD + tl.arange(0, HELD))[None, :]
    width = K // 2 if PACKED else K
    weight = tl.load(weight_ptr + n * weight_stride + held, (n < N) & (held < width), 0.0)
    if PACKED:
        weight = unpacked(weight, ROWS, COLUMNS, OFFSET)
    wide = weight.to(tl.float32)
    strides = scale_row_stride, scale_column_stride
    if SCALE_N == 1 and SCALE_K and COLUMNS % SCALE_K == 0 and SCALE_K & (SCALE_K - 1) == 0:
        wide = wide.reshape(ROWS, COLUMNS // SCALE_K, SCALE_K)
        wide *= spread_groups(scale_ptr, n, N, K, *strides, SCALE_K, ROWS, COLUMNS)
        if zero_ptr is not None:
            wide += spread_groups(zero_ptr, n, N, K, *strides, SCALE_K, ROWS, COLUMNS)
        wide = wide.reshape(ROWS, COLUMNS)
    else:
        wide *= spread_columns(scale_ptr, n, k, N, K, *strides, SCALE_N, SCALE_K)
        if zero_ptr is not None:
            wide += spread_columns(zero_ptr, n, k, N, K, *strides, SCALE_N, SCALE_K)
    tl.store(out_ptr + n * K + k, wide.to(out_ptr.dtype.element_ty), (n < N) & (k < K))


def dequantised(
    weight: Tensor,
    scale: Tensor,
    block_n: int,
    block_k: int,
    *,
    dtype: torch.dtype,
    zero: Tensor | None = None,
    offset_binary: bool = False,
) -> Tensor:
    """A weight times its scales, rounded once.

    Args:
        weight: [N, K], or [N, K / 2] of uint8 that hold two int4 each.
        scale: [N], or [ceil(N / block_n), ceil(K / block_k)], any float dtype.
        block_n, block_k: rows and columns that share a scale; `block_k` 0 for all of a row.
        dtype: of the result.
        zero: added to a scaled element; as `scale`.
        offset_binary: of int4, whether 8 was added to what is stored.

    Returns:
        [N, K].
    """
    packed = weight.dtype == torch.uint8
    weight = weight.contiguous()
    scale, zero = alike(scale, zero)
    N, K = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    out = weight.new_empty((N, K), dtype=dtype)
    if out.numel():
        launchable(dequantise_kernel)[(triton.cdiv(N, ROWS), triton.cdiv(K, COLUMNS))](
            weight,
            scale,
            zero,
            out,
            N,
            K,
            weight.stride(0),
            scale.stride(0),
            scale.stride(1) if scale.dim() == 2 else 0,
            SCALE_N=block_n,
            SCALE_K=block_k,
            PACKED=packed,
            OFFSET=offset_binary,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return out
