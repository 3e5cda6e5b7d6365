"""Linear layers in fp8 whose weight lies in tiles of 16 x 16: gemm_kernel.py reads it so."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.kernels.triton.gemm import scaled_gemm


def gemm_fp8_blockscale_preshuffled(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times a weight [N / 16, 16 K] of tiles, transposed; see the op of this name."""
    sizes = (group_size, block_n, block_k)
    return scaled_gemm(
        x, weight, x_scale, weight_scale, bias, "block", out_dtype, sizes=sizes, shuffled=True
    )


def gemm_fp8_rowwise_preshuffled(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times a weight [N / 16, 16 K] of tiles, transposed; see the op of this name."""
    of_rows = weight_scale.reshape(-1)
    return scaled_gemm(x, weight, x_scale, of_rows, bias, "row", out_dtype, shuffled=True)
