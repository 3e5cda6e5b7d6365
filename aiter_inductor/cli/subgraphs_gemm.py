"""Linears on quantised operands in plain PyTorch: dequantise to bf16, then multiply.

As `subgraphs.py`: every function takes the arguments of its op and returns what the op returns. A
product in half precision is what a program would ask for; the ops' references compute in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.lowerings.gemm_tile_packed import in_rows


def _spread(scale: Tensor, N: int, K: int, block_n: int, block_k: int) -> Tensor:
    return scale.repeat_interleave(block_n, 0)[:N].repeat_interleave(block_k, 1)[:, :K]


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
    """Scales spread over groups of 128 and blocks of 128 x 128."""
    N, K = weight.shape
    rows = x.float() * x_scale.repeat_interleave(group_size, -1)[..., :K]
    columns = weight.float() * _spread(weight_scale, N, K, block_n, block_k)
    return F.linear(rows.to(out_dtype), columns.to(out_dtype), bias)


def gemm_fp8_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A scale a token and a scale a feature."""
    columns = (weight.float() * weight_scale[:, None]).to(out_dtype)
    return F.linear((x.float() * x_scale).to(out_dtype), columns, bias)


def gemm_int8(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """As `gemm_fp8_rowwise`, of int8."""
    return gemm_fp8_rowwise(x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype)


def gemm_fp8_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """One scale for each operand."""
    columns = (weight.float() * weight_scale).to(out_dtype)
    return F.linear((x.float() * x_scale).to(out_dtype), columns, bias)


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    """A weight in eight bits, scaled by blocks or by rows."""
    factor = weight_scale[:, None]
    if weight_scale.dim() == 2:
        factor = _spread(weight_scale, weight.shape[0], weight.shape[1], block_n, block_k)
    return F.linear(x, (weight.float() * factor).to(x.dtype), bias)


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
    """A weight in four bits, scaled and perhaps shifted by groups."""
    low, high = (weight & 15).to(torch.int8), (weight >> 4).to(torch.int8)
    codes = torch.stack((low, high), -1).flatten(-2)
    codes = codes - 8 if offset_binary else torch.where(codes < 8, codes, codes - 16)
    columns = codes.float() * weight_scale.repeat_interleave(group_size, -1)[:, : x.shape[-1]]
    if weight_zero is not None:
        columns = columns + weight_zero.repeat_interleave(group_size, -1)[:, : x.shape[-1]]
    return F.linear(x, columns.to(x.dtype), bias)


def gemm_w4a16_tile_packed(
    x: Tensor,
    weight: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    tile_n: int = 8,
) -> Tensor:
    """torch's own kernel, of x padded as the weight is; a CPU has none for these tiles."""
    if x.device.type == "cpu":
        columns = in_rows(weight, scale_and_zero, group_size, tile_n, torch.float32)
        return F.linear(x, columns[:out_features, : x.shape[-1]].to(x.dtype), bias)
    rows = F.pad(x.flatten(0, -2), (0, 128 * weight.shape[1] - x.shape[-1]))
    out: Tensor = torch.ops.aten._weight_int4pack_mm(rows, weight, group_size, scale_and_zero)
    out = out[:, :out_features].reshape(*x.shape[:-1], out_features)
    return out if bias is None else out + bias


def bmm_fp8(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A batch, scaled by groups and blocks."""
    _, N, K = weight.shape
    rows = x.float() * x_scale.repeat_interleave(group_size, -1)[..., :K]
    spread = weight_scale.repeat_interleave(block_n, 1)[:, :N].repeat_interleave(block_k, 2)
    columns = weight.float() * spread[..., :K]
    return torch.bmm(rows.to(out_dtype), columns.to(out_dtype).mT)
