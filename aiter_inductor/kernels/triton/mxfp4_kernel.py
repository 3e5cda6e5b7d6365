"""Products of MXFP4 operands on the matrix cores of CDNA 4, and the quantisation that makes them.

Two e2m1 elements a byte, the even one in the low half; one e8m0 scale for 32 elements of K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aiter_inductor.kernels.triton.gemm_kernel import tile_of


@triton.jit(do_not_specialize=["M"])
def gemm_mxfp4_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    k_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of the product, or of its share of K as fp32."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again: loads stay wide and unmasked, stores are masked.
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    held, group = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 32)
    x_rows = x_ptr + row[:, None] * (K // 2) + held[None, :]
    weight_rows = weight_ptr + column[None, :] * (K // 2) + held[:, None]
    x_scales = x_scale_ptr + row[:, None] * (K // 32) + group[None, :]
    weight_scales = weight_scale_ptr + column[:, None] * (K // 32) + group[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = tl.program_id(1) * k_per_split
    for k in tl.range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_rows + k // 2), tl.load(weight_rows + k // 2)
            of_x, of_weight = tl.load(x_scales + k // 32), tl.load(weight_scales + k // 32)
        else:
            left, groups = (K - k) // 2, (K - k) // 32
            x = tl.load(x_rows + k // 2, held[None, :] < left, 0)
            weight = tl.load(weight_rows + k // 2, held[:, None] < left, 0)
            of_x = tl.load(x_scales + k // 32, group[None, :] < groups, 127)
            of_weight = tl.load(weight_scales + k // 32, group[None, :] < groups, 127)
        total = tl.dot_scaled(x, of_x, "e2m1", weight, of_weight, "e2m1", total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    split = tl.program_id(1).to(tl.int64) * M
    to = out_ptr + (split + row)[:, None] * N + n[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["count"])
def quant_mxfp4_kernel(x_ptr, packed_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    """BLOCK groups of 32 elements."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = group < count
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + at, live[:, None], 0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    # As integers, magnitudes are in order, and NaN is the largest.
    exponent = tl.max(bits & 0x7FFFFFFF, 1) >> 23
    code = tl.where(exponent == 255, 255, tl.maximum(exponent - 2, 0))
    inverse = (tl.maximum(254 - code, 0) << 23).to(tl.float32, bitcast=True)
    magnitude = tl.abs(x * inverse[:, None])
    # Code by code past the middles between neighbours; of a tie the even code.
    element = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32)
    element += (magnitude > 1.25).to(tl.int32) + (magnitude >= 1.75).to(tl.int32)
    element += (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    element += (magnitude > 5.0).to(tl.int32)
    spoiled = (exponent == 255)[:, None]
    element = tl.where(spoiled, element, element + ((bits >> 28) & 8))
    even, odd = tl.split(element.reshape(BLOCK, 16, 2))
    to = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(packed_ptr + to, (even | (odd << 4)).to(tl.uint8), live[:, None])
    tl.store(scale_ptr + group, code.to(tl.uint8), live)
