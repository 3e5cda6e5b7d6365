"""Linear layers on quantised operands; the host side of gemm_kernel.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from aiter_inductor.kernels.triton.gemm_config import GemmConfig, scale_step
from aiter_inductor.kernels.triton.gemm_kernel import add_splits_kernel, gemm_kernel
from aiter_inductor.kernels.triton.launch import launchable


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
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, both fp8; see the op of this name."""
    sizes = (group_size, block_n, block_k)
    return scaled_gemm(
        x, weight, x_scale, weight_scale, bias, "block", out_dtype, sizes=sizes, config=config
    )


def gemm_fp8_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each row; see the op of this name."""
    return scaled_gemm(
        x, weight, x_scale, weight_scale.reshape(-1), bias, "row", out_dtype, config=config
    )


def gemm_int8(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, both int8; see the op of this name."""
    return scaled_gemm(
        x, weight, x_scale, weight_scale.reshape(-1), bias, "row", out_dtype, config=config
    )


def gemm_fp8_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GemmConfig | None = None,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each; see the op of this name."""
    return scaled_gemm(x, weight, x_scale, weight_scale, bias, "tensor", out_dtype, config=config)


def scaled_gemm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scaling: str,
    out_dtype: torch.dtype,
    *,
    sizes: tuple[int, int, int] = (128, 128, 128),
    config: GemmConfig | None = None,
    shuffled: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The product, scaled and rounded once.

    Args:
        x: [*, K]. weight: [N, K], or [N / 16, 16 K] in tiles if `shuffled`.
        x_scale, weight_scale: as the op with this scaling takes them, fp32.
        bias: [N], any float dtype, or None.
        scaling: `block`, `row` or `tensor`.
        out_dtype: of the result.
        sizes: elements of K a scale of x is for, and rows and columns one of the weight is for.
        config: None for the default.
        shuffled: whether the weight is in tiles of 16 x 16.
        residual: [*, N], added before the result is rounded, or None.

    Returns:
        [*, N], `out_dtype`.
    """
    N, K = (weight.shape[0] * 16 if shuffled else weight.shape[0]), x.shape[-1]
    x, weight, weight_scale = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    x_rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    M = x_rows.shape[0]
    if config is None:
        amd, step = torch.version.hip is not None, scale_step(scaling, sizes)
        config = GemmConfig.default(M, N, K, amd=amd, block_k=step)
    split_k = 1 if x.dtype == torch.int8 else config.split_k
    as_fnuz = x.dtype == torch.float8_e4m3fn and lacks_e4m3fn()
    if as_fnuz:
        x_rows, weight = x_rows.view(torch.uint8), weight.view(torch.uint8)
    out = x.new_empty((*x.shape[:-1], N), dtype=out_dtype)
    target = out if split_k == 1 else x.new_empty((split_k, M, N), dtype=torch.float32)
    blocks = triton.cdiv(K, config.block_k * split_k)
    of_x = x_scale.contiguous()
    of_rows = None if scaling == "tensor" else of_x.reshape(M, of_x.shape[-1])
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    launchable(gemm_kernel)[(tiles, split_k)](
        x_rows,
        weight,
        of_x,
        weight_scale,
        bias if split_k == 1 else None,
        residual if split_k == 1 else None,
        target,
        M,
        N,
        K,
        x_rows.stride(0),
        weight.stride(0),
        0 if of_rows is None else of_rows.stride(0),
        weight_scale.stride(0) if weight_scale.dim() == 2 else 0,
        blocks * config.block_k,
        0,
        0,
        0,
        0,
        SCALING=scaling,
        SCALE_X=sizes[0],
        SCALE_N=sizes[1],
        SCALE_K=sizes[2],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_K=K % config.block_k == 0,
        FN_AS_FNUZ=as_fnuz,
        SHUFFLED=shuffled,
        BATCHED=False,
        TURNED=False,
        **config.launch(),
    )
    if split_k > 1:
        add_splits(target, bias, out, residual)
    return out


def lacks_e4m3fn() -> bool:
    """Whether the chip multiplies only the other fp8, e4m3fnuz."""
    if torch.version.hip is None:
        return False
    return bool(triton.runtime.driver.active.get_current_target().arch == "gfx942")


def add_splits(
    partial: Tensor, bias: Tensor | None, out: Tensor, residual: Tensor | None = None
) -> None:
    """`out` = the sum of `partial` [split_k, M, N], plus bias and residual."""
    split_k, M, N = partial.shape
    size, block = M * N, 1024
    launchable(add_splits_kernel)[((size + block - 1) // block,)](
        partial, bias, residual, out, size, N, SPLIT_K=split_k, BLOCK=block, num_warps=4
    )
