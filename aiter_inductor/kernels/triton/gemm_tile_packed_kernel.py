"""The product of rows with an int4 weight in the tiles of `lowerings/gemm_tile_packed.py`.

As `gemm_weight_kernel.py`, the weight is the left operand; a program loads the words of its rows as
they are stored, four bytes with eight elements of one row each, and puts their elements in order in
registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aiter_inductor.kernels.triton.gemm_kernel import tile_of


@triton.jit
def in_order(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_N: tl.constexpr):
    """Codes [ROWS, COLUMNS], -8 to 7, of words [ROWS, COLUMNS / 8], lanes before pairs of 16s."""
    shifts = 4 * tl.arange(0, 8)
    codes = (((words[:, :, None] >> shifts[None, None, :]) & 15) - 8).to(tl.int8)
    # [rows, lane, pair of 16s, odd, second 16, second pair of a lane]
    parts = codes.reshape(ROWS, 4, COLUMNS // 32, 2, 2, 2)
    if TILE_N == 8:
        parts = parts.permute(0, 2, 4, 5, 1, 3)
    else:
        parts = parts.permute(0, 2, 4, 1, 5, 3)
    return parts.reshape(ROWS, COLUMNS)


@triton.jit
def word_offsets(row, blocks_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_N: tl.constexpr):
    """Where the words [ROWS, COLUMNS / 8] of the first columns of rows lie, lanes before pairs.

    A block of 128 columns by TILE_N rows is 16 * TILE_N words; each of its lanes has four.
    """
    PAIRS: tl.constexpr = COLUMNS // 32
    word = tl.arange(0, COLUMNS // 8)
    lane, pair = word // PAIRS, word % PAIRS
    first = (row // TILE_N) * blocks_k * (16 * TILE_N)
    if TILE_N == 8:
        lanes = (row % 8)[:, None] * 16 + lane[None, :] * 4
    else:
        lanes = (row % 16)[:, None] * 4 + lane[None, :] * 64
    return first[:, None] + lanes + pair[None, :]


@triton.jit(do_not_specialize=["M"])
def tile_packed_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    blocks_k,
    x_stride,
    group_stride,
    feature_stride,
    zero_offset,
    k_per_split,
    GROUP_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of the product, or of a share of K as fp32; `blocks_k` are the weight's, of 128."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again: loads stay wide and unmasked, stores are masked.
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    x_columns = x_ptr + row[None, :] * x_stride + inner[:, None]
    words = weight_ptr + word_offsets(column, blocks_k, BLOCK_N, BLOCK_K, TILE_N)
    scales = scale_ptr + column * feature_stride
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    start = tl.program_id(1) * k_per_split
    for k in tl.range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        if EVEN_K:
            x = tl.load(x_columns + k)
        else:
            x = tl.load(x_columns + k, inner[:, None] < K - k, 0.0)
        weight = tl.load(words + (k // 128) * (16 * TILE_N) + (k % 128) // 32)
        codes = in_order(weight, BLOCK_N, BLOCK_K, TILE_N)
        part = tl.dot(codes.to(tl.float32).to(x.dtype), x, input_precision="ieee")
        group = scales + (k // GROUP_SIZE) * group_stride
        zero = tl.load(group + zero_offset).to(tl.float32)[:, None]
        total += part * tl.load(group).to(tl.float32)[:, None]
        total += zero * tl.sum(x.to(tl.float32), 0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column).to(tl.float32)[:, None]
    to = out_ptr + (tl.program_id(1).to(tl.int64) * M + row)[None, :] * N + n[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), (n < N)[:, None] & (m < M)[None, :])


@triton.jit
def dequantise_tiles_kernel(
    weight_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    blocks_k,
    group_stride,
    feature_stride,
    zero_offset,
    GROUP_SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows by 128 columns of the weight, of which SPAN share a scale, in full width."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, block = tl.minimum(n, N - 1).to(tl.int64), tl.program_id(1)
    words = weight_ptr + word_offsets(row, blocks_k, ROWS, 128, TILE_N)
    codes = in_order(tl.load(words + block * (16 * TILE_N)), ROWS, 128, TILE_N)
    group = block * 128 // GROUP_SIZE + tl.arange(0, 128 // SPAN)
    last = (blocks_k * 128 - 1) // GROUP_SIZE
    scales = scale_ptr + tl.minimum(group, last)[None, :] * group_stride
    scales += row[:, None] * feature_stride
    wide = codes.to(tl.float32).reshape(ROWS, 128 // SPAN, SPAN)
    wide *= tl.load(scales).to(tl.float32)[:, :, None]
    wide += tl.load(scales + zero_offset).to(tl.float32)[:, :, None]
    k = block * 128 + tl.arange(0, 128)
    to = out_ptr + row[:, None] * K + k[None, :]
    live = (n < N)[:, None] & (k < K)[None, :]
    tl.store(to, wide.reshape(ROWS, 128).to(out_ptr.dtype.element_ty), live)
