"""Linear layers on int4 weights in tiles; the host side of gemm_tile_packed_kernel.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.gemm import add_splits
from aiter_inductor.kernels.triton.gemm_config import GemmConfig
from aiter_inductor.kernels.triton.gemm_tile_packed_kernel import (
    dequantise_tiles_kernel,
    tile_packed_kernel,
)
from aiter_inductor.kernels.triton.launch import launchable

DEQUANTISED_ROWS = 32


def gemm_w4a16_tile_packed(
    x: Tensor,
    weight: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    tile_n: int = 8,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times a weight [out_features, K] in tiles; see the op of this name."""
    N, K = out_features, x.shape[-1]
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    x_rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    M = x_rows.shape[0]
    if config is None:
        amd = torch.version.hip is not None
        config = GemmConfig.default_weight_first(M, N, K, amd=amd, scale_k=group_size)
    split_k = config.split_k
    out = x.new_empty((*x.shape[:-1], N))
    target = out if split_k == 1 else x.new_empty((split_k, M, N), dtype=torch.float32)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    launchable(tile_packed_kernel)[(tiles, split_k)](
        x_rows,
        weight,
        scale_and_zero,
        bias if split_k == 1 else None,
        target,
        M,
        N,
        K,
        weight.shape[1],
        x_rows.stride(0),
        scale_and_zero.stride(0),
        scale_and_zero.stride(1),
        scale_and_zero.stride(2),
        triton.cdiv(K, config.block_k * split_k) * config.block_k,
        GROUP_SIZE=group_size,
        TILE_N=tile_n,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_K=K % config.block_k == 0,
        **config.launch(),
    )
    if split_k > 1:
        add_splits(target, bias, out)
    return out


def dequantised_tiles(
    weight: Tensor,
    scale_and_zero: Tensor,
    in_features: int,
    *,
    group_size: int,
    out_features: int,
    tile_n: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The weight [out_features, in_features] times its scales, plus its zeros, rounded once.

    Args:
        weight, scale_and_zero, group_size, tile_n: as of the product; groups are powers of two.
        in_features: columns that are used.
        dtype: of the result.
    """
    weight = weight.contiguous()
    out = weight.new_empty((out_features, in_features), dtype=dtype)
    grid = triton.cdiv(out_features, DEQUANTISED_ROWS), triton.cdiv(in_features, 128)
    launchable(dequantise_tiles_kernel)[grid](
        weight,
        scale_and_zero,
        out,
        out_features,
        in_features,
        weight.shape[1],
        scale_and_zero.stride(0),
        scale_and_zero.stride(1),
        scale_and_zero.stride(2),
        GROUP_SIZE=group_size,
        SPAN=min(group_size, 128),
        TILE_N=tile_n,
        ROWS=DEQUANTISED_ROWS,
        num_warps=4,
    )
    return out
