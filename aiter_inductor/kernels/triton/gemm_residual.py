"""Linear layers in fp8 with a residual in the epilogue of gemm_kernel.py."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.kernels.triton.gemm import scaled_gemm


def gemm_fp8_blockscale_add(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`residual` [*, N] + `x` [*, K] times `weight` [N, K] transposed; see the op of this name."""
    sizes = (group_size, block_n, block_k)
    operands = x, weight, x_scale, weight_scale, bias
    return scaled_gemm(*operands, "block", out_dtype, sizes=sizes, residual=residual)


def gemm_fp8_rowwise_add(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`residual` [*, N] + `x` [*, K] times `weight` [N, K] transposed; see the op of this name."""
    operands = x, weight, x_scale, weight_scale.reshape(-1), bias
    return scaled_gemm(*operands, "row", out_dtype, residual=residual)
