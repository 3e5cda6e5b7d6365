"""The product of rows that are not quantised with a weight that is: int4, int8 or fp8.

The weight is the left operand, `out.T = weight [N, K] @ x.T`: what is dequantised in registers
stays there, since matrix instructions read their left operand from registers on Hopper as on CDNA,
and few rows of x make a narrow tile and not a mostly empty one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aiter_inductor.kernels.triton.gemm_kernel import tile_of


@triton.jit
def unpacked(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSET: tl.constexpr):
    """int4 elements [ROWS, COLUMNS] of bytes [ROWS, COLUMNS / 2], the even one in the low half.

    OFFSET: they are stored with 8 added, which is two's complement with the highest bit flipped.
    """
    if OFFSET:
        packed = packed ^ 0x88
    pairs = packed.to(tl.int8, bitcast=True)
    return tl.join((pairs << 4) >> 4, pairs >> 4).reshape(ROWS, COLUMNS)


@triton.jit
def as_floats(codes, ZERO: tl.constexpr):
    """Bytes less ZERO in float32, by a sum: conversions of integers run at a quarter of its rate.

    2^23 has the bits 0x4B000000, and a byte in its last places is added to it. By 4096 x 4096 on an
    H100 that takes 64 rows of int4 from 16.3 us to 13.8 and one row of int8 from 14.2 to 9.7; one
    row of int4 and 64 of int8 are no faster.
    """
    raised = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return raised - (8388608.0 + ZERO)


@triton.jit
def nibbles_as_floats(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSET: tl.constexpr):
    """`unpacked` in float32."""
    if not OFFSET:
        packed = packed ^ 0x88
    pairs = packed.to(tl.int32)
    return as_floats(tl.join(pairs & 15, pairs >> 4).reshape(ROWS, COLUMNS), 8)


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    scale_row_stride,
    scale_column_stride,
    k_per_split,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    PACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of the product, or of a share of K as fp32; SCALE_K 0 means one scale a row."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again: loads stay wide and unmasked, stores are masked.
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    HELD: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    inner, held = tl.arange(0, BLOCK_K), tl.arange(0, HELD)
    x_columns = x_ptr + row[None, :] * x_stride + inner[:, None]
    weight_rows = weight_ptr + column[:, None] * weight_stride + held[None, :]
    block = (column // SCALE_N) * scale_row_stride
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    start = tl.program_id(1) * k_per_split
    for k in tl.range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        at = k // 2 if PACKED else k
        if EVEN_K:
            x, weight = tl.load(x_columns + k), tl.load(weight_rows + at)
        else:
            x = tl.load(x_columns + k, inner[:, None] < K - k, 0.0)
            left = (K - k) // 2 if PACKED else K - k
            weight = tl.load(weight_rows + at, held[None, :] < left, 0.0)
        if PACKED:
            wide = nibbles_as_floats(weight, BLOCK_N, BLOCK_K, OFFSET).to(x.dtype)
        else:
            wide = weight.to(tl.float32).to(x.dtype)
        if SCALE_K:
            part = tl.dot(wide, x, input_precision="ieee")
            group = block + (k // SCALE_K) * scale_column_stride
            total += part * tl.load(weight_scale_ptr + group).to(tl.float32)[:, None]
            if weight_zero_ptr is not None:
                zero = tl.load(weight_zero_ptr + group).to(tl.float32)
                total += zero[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
        else:
            total = tl.dot(wide, x, total, input_precision="ieee")
    if not SCALE_K:
        total *= tl.load(weight_scale_ptr + block)[:, None]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column).to(tl.float32)[:, None]
    to = out_ptr + (tl.program_id(1).to(tl.int64) * M + row)[None, :] * N + n[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), (n < N)[:, None] & (m < M)[None, :])


@triton.jit
def grouped(
    ptr,
    column,
    k,
    K,
    row_stride,
    column_stride,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What is kept for GROUPS groups of SCALE_K columns from `k` on, as [rows, GROUPS, 1]."""
    group = tl.minimum(k // SCALE_K + tl.arange(0, GROUPS), (K - 1) // SCALE_K)
    at = (column // SCALE_N)[:, None] * row_stride + group[None, :] * column_stride
    return tl.load(ptr + at).to(tl.float32)[:, :, None]


@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    scale_row_stride,
    scale_column_stride,
    k_per_split,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    PACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """BLOCK_N columns of ROWS rows of the product, without matrix instructions.

    Every element of the weight is read once and multiplied in float32, so that long stretches of
    rows are on their way at once; the sums along K are added up at the end.
    """
    across = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    HELD: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    inner, held = tl.arange(0, BLOCK_K), tl.arange(0, HELD)
    x_rows = x_ptr + row[:, None] * x_stride + inner[None, :]
    weight_rows = weight_ptr + column[:, None] * weight_stride + held[None, :]
    strides = scale_row_stride, scale_column_stride
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    start = tl.program_id(1) * k_per_split
    for k in tl.range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        at = k // 2 if PACKED else k
        if EVEN_K:
            x, weight = tl.load(x_rows + k), tl.load(weight_rows + at)
        else:
            x = tl.load(x_rows + k, inner[None, :] < K - k, 0.0)
            left = (K - k) // 2 if PACKED else K - k
            weight = tl.load(weight_rows + at, held[None, :] < left, 0.0)
        if PACKED:
            wide = unpacked(weight, BLOCK_N, BLOCK_K, OFFSET).to(tl.float32)
        elif weight.dtype == tl.int8:
            wide = as_floats(weight.to(tl.uint8, bitcast=True) ^ 0x80, 128)
        else:
            wide = weight.to(tl.float32)
        if SCALE_K:
            SPAN: tl.constexpr = SCALE_K if SCALE_K < BLOCK_K else BLOCK_K  # noqa: FURB136
            GROUPS: tl.constexpr = BLOCK_K // SPAN
            wide = wide.reshape(BLOCK_N, GROUPS, SPAN)
            wide *= grouped(weight_scale_ptr, column, k, K, *strides, SCALE_N, SCALE_K, GROUPS)
            if weight_zero_ptr is not None:
                wide += grouped(weight_zero_ptr, column, k, K, *strides, SCALE_N, SCALE_K, GROUPS)
            wide = wide.reshape(BLOCK_N, BLOCK_K)
        total += wide[None, :, :] * x.to(tl.float32)[:, None, :]
    out = tl.sum(total, 2)
    if not SCALE_K:
        block = (column // SCALE_N) * scale_row_stride
        out *= tl.load(weight_scale_ptr + block).to(tl.float32)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    to = out_ptr + (tl.program_id(1).to(tl.int64) * M + row)[:, None] * N + n[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])
