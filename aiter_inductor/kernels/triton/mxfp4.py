"""Linear layers in MXFP4 and their quantisation; the host side of mxfp4_kernel.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.gemm import add_splits
from aiter_inductor.kernels.triton.gemm_config import GemmConfig
from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.mxfp4_kernel import gemm_mxfp4_kernel, quant_mxfp4_kernel

GROUP = 32
GROUPS_AT_ONCE = 64
BLOCK_K = 128
"""Elements of K that one `v_mfma_scale_f32_16x16x128_f8f6f4` multiplies."""


def quant_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [*, K] in groups of 32; see the op of this name."""
    x = x.contiguous()
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // GROUP), dtype=torch.uint8)
    count = x.numel() // GROUP
    launchable(quant_mxfp4_kernel)[(triton.cdiv(count, GROUPS_AT_ONCE),)](
        x, packed, scale, count, BLOCK=GROUPS_AT_ONCE, num_warps=4
    )
    return packed, scale


def gemm_mxfp4(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K / 2] times `weight` [N, K / 2] transposed; see the op of this name."""
    operands = (x, weight, x_scale, weight_scale)
    x, weight, x_scale, weight_scale = (t.contiguous().view(torch.uint8) for t in operands)
    bias = None if bias is None else bias.contiguous()
    N, K = weight.shape[0], 2 * weight.shape[1]
    x_rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    M = x_rows.shape[0]
    config = GemmConfig.default(M, N, K, amd=True, block_k=BLOCK_K)
    split_k = config.split_k
    out = x.new_empty((*x.shape[:-1], N), dtype=out_dtype)
    target = out if split_k == 1 else x.new_empty((split_k, M, N), dtype=torch.float32)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    launchable(gemm_mxfp4_kernel)[(tiles, split_k)](
        x_rows,
        weight,
        x_scale,
        weight_scale,
        bias if split_k == 1 else None,
        target,
        M,
        N,
        K,
        triton.cdiv(K, config.block_k * split_k) * config.block_k,
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
