"""Linear layers on quantised weights whose number of rows is known when they are called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.kernels.triton import gemm_weight as by_triton
from aiter_inductor.kernels.triton.dequantise import dequantised

FEW_ROWS, FEW_INT8_ROWS = 256, 128
"""By 4096 x 4096 in fp8 on an H100 256 rows take 24.8 us by the Triton kernel and 36.9 dequantised
first, 512 rows 49.7 and 40.2. int8 widens slowly: 64 rows take 14.2 us on an H200 and Inductor's
code, which dequantises first, 23.1, 256 rows 33.5 and 29.1; by 12288 x 4096 34.3 and 69.6, 99.3 and
75.5."""
FEW_INT4_ROWS = 64
"""There 64 rows take 16.4 us by the Triton kernel and 23.6 dequantised first, 128 rows 34.2 and 29.
"""


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    """`x` [*, K], not quantised, times `weight` [N, K] transposed; see the op of this name.

    For many rows the weight is dequantised to x's dtype, which rounds it, and cuBLAS multiplies.
    """
    if _rows(x) <= (FEW_INT8_ROWS if weight.dtype == torch.int8 else FEW_ROWS):
        blocks = {"block_n": block_n, "block_k": block_k}
        return by_triton.gemm_w8a16(x, weight, weight_scale, bias, **blocks)
    blocks = (1, 0) if weight_scale.dim() == 1 else (block_n, block_k)
    return _linear(x, dequantised(weight, weight_scale, *blocks, dtype=x.dtype), bias)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    group_size: int,
    offset_binary: bool = False,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K / 2] of nibbles, transposed; see the op of this name."""
    if _rows(x) <= FEW_INT4_ROWS:
        return by_triton.gemm_w4a16(
            x,
            weight,
            weight_scale,
            bias,
            weight_zero,
            group_size=group_size,
            offset_binary=offset_binary,
        )
    codes = {"zero": weight_zero, "offset_binary": offset_binary}
    columns = dequantised(weight, weight_scale, 1, group_size, dtype=x.dtype, **codes)
    return _linear(x, columns, bias)


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _linear(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.contiguous(), columns, None if bias is None else bias.to(x.dtype))
