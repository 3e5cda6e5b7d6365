"""The product of quantised operands: `x [M, K] @ weight [N, K].T`, scaled as it is summed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile row and column; GROUP_M rows of tiles advance together, so that L2 keeps weights."""
    across = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * across)
    first = group * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    within = program % (GROUP_M * across)
    return first + within % height, within // height


@triton.jit
def weight_scales(
    ptr,
    n,
    tile_n,
    k,
    row_stride,
    BLOCK_N: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
):
    """Scales [1, BLOCK_N] of the weight's blocks at `k`; [1, 1] where a tile lies in one block."""
    if SCALE_N % BLOCK_N == 0:
        row = tl.full([1, 1], tile_n * BLOCK_N // SCALE_N, tl.int32)
    else:
        row = n[None, :] // SCALE_N
    return tl.load(ptr + row.to(tl.int64) * row_stride + k // SCALE_K)


@triton.jit
def half_as_fnuz(code):
    """Bytes of e4m3fn as the e4m3fnuz numbers of half their value, which have the same bits.

    Two codes differ: e4m3fn has a NaN of either sign where e4m3fnuz has its largest numbers, and a
    negative zero where that has its NaN.
    """
    magnitude = code & 127
    code = tl.where(magnitude == 127, 128, tl.where(magnitude == 0, 0, code))
    return code.to(tl.uint8).to(tl.float8e4b8, bitcast=True)


@triton.jit
def as_columns(tiles, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of 16 x 16 [BLOCK_N / 16, BLOCK_K * 16] as the weight transposed [BLOCK_K, BLOCK_N]."""
    split = tiles.reshape(BLOCK_N // 16, BLOCK_K // 16, 16, 16)
    return split.permute(0, 2, 1, 3).reshape(BLOCK_N, BLOCK_K).trans()


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    x_scale_stride,
    weight_scale_stride,
    k_per_split,
    x_batch,
    weight_batch,
    x_scale_batch,
    weight_scale_batch,
    SCALING: tl.constexpr,
    SCALE_X: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    FN_AS_FNUZ: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BATCHED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """One tile of the product, or of its share of K as fp32.

    SHUFFLED weights are tiles of 16 x 16, TURNED ones are stored [K, N] and not [N, K].
    """
    if BATCHED:
        batch = tl.program_id(2).to(tl.int64)
        x_ptr += batch * x_batch
        weight_ptr += batch * weight_batch
        x_scale_ptr += batch * x_scale_batch
        weight_scale_ptr += batch * weight_scale_batch
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again: loads stay wide and unmasked, stores are masked.
    row, column = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    inner = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    DEEP: tl.constexpr = 16 if SHUFFLED else 1
    if SHUFFLED:
        band = tl.minimum(tile_n * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16), N // 16 - 1)
        across = tl.arange(0, BLOCK_K * 16)[None, :]
        weight_rows = weight_ptr + band.to(tl.int64)[:, None] * weight_stride + across
    elif TURNED:
        across = inner[:, None]
        weight_rows = weight_ptr + column[None, :] + across.to(tl.int64) * weight_stride
    else:
        across = inner[:, None]
        weight_rows = weight_ptr + column.to(tl.int64)[None, :] * weight_stride + across
    x_scale_rows = x_scale_ptr
    if SCALING == "block" or SCALING == "row":
        x_scale_rows = x_scale_ptr + row.to(tl.int64)[:, None] * x_scale_stride
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if WHOLE else tl.float32)
    start = tl.program_id(1) * k_per_split
    for k in tl.range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        behind = k.to(tl.int64) * weight_stride if TURNED else k * DEEP
        if EVEN_K:
            x, weight = tl.load(x_rows + k), tl.load(weight_rows + behind)
        else:
            x = tl.load(x_rows + k, inner[None, :] < K - k, 0.0)
            weight = tl.load(weight_rows + behind, across < (K - k) * DEEP, 0.0)
        if SHUFFLED:
            weight = as_columns(weight, BLOCK_N, BLOCK_K)
        if FN_AS_FNUZ:
            x, weight = half_as_fnuz(x), half_as_fnuz(weight)
        if SCALING == "block":
            part = tl.dot(x, weight)
            scale = weight_scales(
                weight_scale_ptr, column, tile_n, k, weight_scale_stride, BLOCK_N, SCALE_N, SCALE_K
            )
            total += part * (tl.load(x_scale_rows + k // SCALE_X) * scale)
        elif WHOLE:
            total = tl.dot(x, weight, total, out_dtype=tl.int32)
        else:
            # Hopper adds fp8 products with 14 bits unless told to flush into fp32 this often.
            total = tl.dot(x, weight, total, max_num_imprecise_acc=BLOCK_K)
    out = total.to(tl.float32)
    if FN_AS_FNUZ:
        out *= 4.0
    if SCALING == "row":
        out *= tl.load(x_scale_rows) * tl.load(weight_scale_ptr + column)[None, :]
    elif SCALING == "tensor":
        out *= tl.load(x_scale_ptr) * tl.load(weight_scale_ptr)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    if residual_ptr is not None:
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        out += tl.load(residual_ptr + at).to(tl.float32)
    split = tl.program_id(1).to(tl.int64) * M
    if BATCHED:
        split = split * tl.num_programs(2) + batch * M
    to = out_ptr + (split + row.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def add_splits_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    size,
    N,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of partial products [SPLIT_K, M, N], plus bias and residual, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial_ptr + split * size.to(tl.int64) + at, live, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, live, 0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, live, 0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), live)
