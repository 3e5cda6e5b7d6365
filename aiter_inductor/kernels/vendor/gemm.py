"""Quantised linear layers by cuBLASLt and hipBLASLt, through torch's scaled_mm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4
"""Rows of x per 16 bytes of its transposed scales; a number of rows beside it is padded."""


def gemm_fp8_blockscale(
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
    """`x` [*, K] times `weight` [N, K] transposed, both fp8; see the op of this name.

    N and K are multiples of 128, blocks are 128, there is no bias.
    """
    N, K = weight.shape
    rows, of_rows = x.reshape(-1, K), x_scale.reshape(-1, K // block_k)
    M = rows.shape[0]
    if M == 0:
        return x.new_empty((*x.shape[:-1], N), dtype=out_dtype)
    if M % ROWS:
        padding = (0, 0, 0, ROWS - M % ROWS)
        rows = F.pad(rows.view(torch.uint8), padding).view(x.dtype)
        of_rows = F.pad(of_rows, padding)
    out = F.scaled_mm(
        rows.contiguous(),
        weight.contiguous().t(),
        scale_a=of_rows.t().contiguous().t(),
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=weight_scales(weight_scale),
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=out_dtype,
    )
    return out[:M].reshape(*x.shape[:-1], N)


def weight_scales(scale: Tensor) -> Tensor:
    """[N / 128, K / 128] as scaled_mm reads it: K first, padded to a multiple of 4, stride 1."""
    missing = -scale.shape[1] % 4
    return (F.pad(scale, (0, missing)) if missing else scale.contiguous()).t()


def gemm_fp8_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each row; see the op of this name."""
    of_x, of_weight = x_scale.reshape(-1, 1), weight_scale.reshape(1, -1)
    return _scaled_mm(x, weight, of_x.contiguous(), of_weight.contiguous(), out_dtype)


def gemm_fp8_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each; see the op of this name."""
    return _scaled_mm(x, weight, x_scale.reshape(()), weight_scale.reshape(()), out_dtype)


def _scaled_mm(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    N, K = weight.shape
    out_shape = (*x.shape[:-1], N)
    if x.numel() == 0:
        return x.new_empty(out_shape, dtype=out_dtype)
    out: Tensor = torch._scaled_mm(
        x.reshape(-1, K).contiguous(),
        weight.contiguous().t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        out_dtype=out_dtype,
        use_fast_accum=False,
    )
    return out.reshape(out_shape)
