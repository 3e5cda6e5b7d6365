"""Products of batches of fp8 matrices: gemm_kernel.py, a matrix for each third program index."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.gemm import add_splits, lacks_e4m3fn
from aiter_inductor.kernels.triton.gemm_config import GemmConfig, scale_step
from aiter_inductor.kernels.triton.gemm_kernel import gemm_kernel
from aiter_inductor.kernels.triton.launch import launchable


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
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [B, M, K] times `weight` [B, N, K] transposed; see the op of this name.

    A weight that is a view of [B, K, N] is read as it is stored.
    """
    B, N, K = weight.shape
    M, turned = x.shape[1], not weight.is_contiguous() and weight.mT.is_contiguous()
    x, weight = x.contiguous(), weight if turned else weight.contiguous()
    # One scale for all of K is one block that every tile lies in.
    whole = triton.cdiv(max(K, 1), 128) * 128
    sizes = (
        whole if x_scale.shape[2] == 1 else group_size,
        triton.cdiv(max(N, 1), 128) * 128 if weight_scale.shape[1] == 1 else block_n,
        whole if weight_scale.shape[2] == 1 else block_k,
    )
    of_x = x_scale.contiguous().expand(B, M, -1)
    of_weight = weight_scale.contiguous().expand(B, -1, -1)
    if config is None:
        amd, step = torch.version.hip is not None, scale_step("block", sizes)
        config = GemmConfig.default(M, N, K, amd=amd, block_k=step, batch=B)
    as_fnuz = x.dtype == torch.float8_e4m3fn and lacks_e4m3fn()
    if as_fnuz:
        x, weight = x.view(torch.uint8), weight.view(torch.uint8)
    out = x.new_empty((B, M, N), dtype=out_dtype)
    split_k = config.split_k
    target = out if split_k == 1 else x.new_empty((split_k, B * M, N), dtype=torch.float32)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    launchable(gemm_kernel)[(tiles, split_k, B)](
        x,
        weight,
        of_x,
        of_weight,
        None,
        None,
        target,
        M,
        N,
        K,
        K,
        N if turned else K,
        of_x.stride(1),
        of_weight.stride(1),
        triton.cdiv(K, config.block_k * split_k) * config.block_k,
        M * K,
        N * K,
        of_x.stride(0),
        of_weight.stride(0),
        SCALING="block",
        SCALE_X=sizes[0],
        SCALE_N=sizes[1],
        SCALE_K=sizes[2],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_K=K % config.block_k == 0,
        FN_AS_FNUZ=as_fnuz,
        SHUFFLED=False,
        BATCHED=True,
        TURNED=turned,
        **config.launch(),
    )
    if split_k > 1:
        add_splits(target, None, out)
    return out
