"""Linear layers on quantised weights; the host side of gemm_weight_kernel.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.gemm import add_splits
from aiter_inductor.kernels.triton.gemm_config import MOST_FEW, GemmConfig
from aiter_inductor.kernels.triton.gemm_weight_kernel import few_rows_kernel, weight_only_kernel
from aiter_inductor.kernels.triton.launch import launchable


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K], not quantised, times `weight` [N, K] transposed; see the op of this name."""
    blocks = (1, 0) if weight_scale.dim() == 1 else (block_n, block_k)
    return weight_only_gemm(x, weight, weight_scale, bias, blocks, config)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    group_size: int,
    offset_binary: bool = False,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K / 2] of nibbles, transposed; see the op of this name."""
    blocks, codes = (1, group_size), {"zero": weight_zero, "offset_binary": offset_binary}
    return weight_only_gemm(x, weight, weight_scale, bias, blocks, config, **codes)


def weight_only_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    blocks: tuple[int, int],
    config: GemmConfig | None = None,
    *,
    zero: Tensor | None = None,
    offset_binary: bool = False,
) -> Tensor:
    """The product, scaled and rounded once.

    Args:
        x: [*, K]. weight: [N, K], or [N, K / 2] of uint8 that hold two int4 each.
        weight_scale: [N], or a matrix of one scale a block, any float dtype.
        bias: [N], any float dtype, or None.
        blocks: rows and columns of the weight that share a scale; 0 columns for all of a row.
        config: None for the default.
        zero: what is added to a scaled element of the weight, as `weight_scale`, or None.
        offset_binary: of int4, whether 8 was added to what is stored.

    Returns:
        [*, N], x's dtype.
    """
    N, K, packed = weight.shape[0], x.shape[-1], weight.dtype == torch.uint8
    x, weight = x.contiguous(), weight.contiguous()
    weight_scale, zero = alike(weight_scale, zero)
    bias = None if bias is None else bias.contiguous()
    x_rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    M = x_rows.shape[0]
    if config is None:
        amd = torch.version.hip is not None
        config = GemmConfig.default_weight_only(M, N, K, amd=amd, scale_k=blocks[1])
    split_k = config.split_k
    out = x.new_empty((*x.shape[:-1], N))
    target = out if split_k == 1 else x.new_empty((split_k, M, N), dtype=torch.float32)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    few = config.block_m <= MOST_FEW
    rows: dict[str, Any] = {"ROWS": config.block_m}
    if not few:
        rows = {"BLOCK_M": config.block_m, "GROUP_M": config.group_m}
    launchable(few_rows_kernel if few else weight_only_kernel)[(tiles, split_k)](
        x_rows,
        weight,
        weight_scale,
        zero,
        bias if split_k == 1 else None,
        target,
        M,
        N,
        K,
        x_rows.stride(0),
        weight.stride(0),
        weight_scale.stride(0),
        weight_scale.stride(1) if weight_scale.dim() == 2 else 0,
        triton.cdiv(K, config.block_k * split_k) * config.block_k,
        SCALE_N=blocks[0],
        SCALE_K=blocks[1],
        PACKED=packed,
        OFFSET=offset_binary,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=K % config.block_k == 0,
        **rows,
        **config.launch(),
    )
    if split_k > 1:
        add_splits(target, bias, out)
    return out


def alike(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros with the same strides, which may be any."""
    if zero is None or zero.stride() == scale.stride():
        return scale, zero
    return scale.contiguous(), zero.contiguous()
