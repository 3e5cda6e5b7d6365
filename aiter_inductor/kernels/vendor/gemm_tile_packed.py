"""Linear layers on int4 weights in tiles: who multiplies is chosen by the rows of a call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.kernels.triton import gemm_tile_packed as by_triton

FEW_ROWS, SOME_ROWS = 16, 64
"""Up to which torch's kernel and the Triton kernel are the fastest. By 4096 x 4096 on an H100, in
us: 1 row 6.9 and 24.7, 16 rows 21.4 and 24.4, 64 rows 77.9 and 30.8, 4096 rows 4570 and 1317."""
TILE_K = 128


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
    """`x` [*, K], bfloat16, times a weight [out_features, K] in tiles; see the op of this name.

    For many rows the weight is dequantised to bfloat16, which rounds it, and cuBLAS multiplies.
    """
    sizes = {"group_size": group_size, "out_features": out_features, "tile_n": tile_n}
    K = x.shape[-1]
    num_rows = x.numel() // max(K, 1)
    bias = None if bias is None else bias.to(x.dtype)
    if num_rows > SOME_ROWS:
        columns = by_triton.dequantised_tiles(weight, scale_and_zero, K, **sizes)
        return F.linear(x.contiguous(), columns, bias)
    if num_rows > FEW_ROWS or num_rows == 0:
        return by_triton.gemm_w4a16_tile_packed(x, weight, scale_and_zero, bias, **sizes)
    rows = F.pad(x.reshape(-1, K), (0, TILE_K * weight.shape[1] - K))
    scales = scale_and_zero.contiguous()
    out = torch.ops.aten._weight_int4pack_mm(rows, weight.contiguous(), group_size, scales)
    out = out[:, :out_features] if bias is None else out[:, :out_features] + bias
    return out.reshape(*x.shape[:-1], out_features)
