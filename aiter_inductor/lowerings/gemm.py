"""Linear layers on quantised operands: `x @ weight.T`, scaled, plus a bias, rounded once.

The weight is [N, K], as `nn.Linear` stores it; x may have any leading dimensions. A scale is the
dequantising factor: `x ≈ q * scale`. References compute in float32 and int8 products exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_providers import (
    cublas_is_faster,
    cuda_unsupported,
    decline_weight_only,
    dequantising_unpaid,
    dtypes_unsupported,
    int8_unsupported,
    onednn_is_faster,
    triton_is_faster,
    triton_unsupported,
    vendor_unsupported,
)
from aiter_inductor.lowerings.gemm_tuning import TUNINGS
from aiter_inductor.lowerings.providers import add_cpp, add_cuda, add_triton, add_vendor


def spread(scale: Tensor, sizes: tuple[int, int], blocks: tuple[int, int]) -> Tensor:
    """Per-block scales [ceil(R / r), ceil(C / c)] as one factor an element [R, C]."""
    row = torch.arange(sizes[0], device=scale.device) // blocks[0]
    return spread_last(scale.index_select(0, row), sizes[1], blocks[1])


def spread_last(scale: Tensor, size: int, group_size: int) -> Tensor:
    """Per-group scales [*, ceil(K / group_size)] as one factor an element [*, K].

    By index: Inductor (torch 2.13, CPU) reads beyond the end of a `repeat_interleave` that is cut
    to a size which is no multiple of the group.
    """
    return scale.index_select(-1, torch.arange(size, device=scale.device) // group_size)


def linear_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T * factor + bias` of wide operands, rounded once to `out_dtype`."""
    out = F.linear(x.contiguous(), weight)
    if factor is not None:
        out = out * factor
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(out_dtype)


def of_gemm_blockscale(
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
) -> GemmProblem:
    """The problem of `gemm_fp8_blockscale`."""
    return GemmProblem.of(
        "block",
        x,
        weight,
        x_scale,
        weight_scale,
        bias,
        out_dtype=out_dtype,
        group_size=group_size,
        block_n=block_n,
        block_k=block_k,
    )


def of_gemm_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> GemmProblem:
    """The problem of `gemm_fp8_rowwise` and `gemm_int8`."""
    return GemmProblem.of("row", x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype)


def of_gemm_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> GemmProblem:
    """The problem of `gemm_fp8_per_tensor`."""
    return GemmProblem.of("tensor", x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype)


def of_gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
) -> GemmProblem:
    """The problem of `gemm_w8a16`."""
    if weight_scale.dim() == 1:
        return GemmProblem.of("weight_row", x, weight, None, weight_scale, bias)
    return GemmProblem.of(
        "weight_block", x, weight, None, weight_scale, bias, block_n=block_n, block_k=block_k
    )


@op(problem=of_gemm_blockscale)
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
    """A linear layer in fp8, scaled by groups of x's rows and by blocks of the weight.

    Args:
        x: [*, K], fp8.
        weight: [N, K], fp8.
        x_scale: [*, ceil(K / group_size)], fp32.
        weight_scale: [ceil(N / block_n), ceil(K / block_k)], fp32; the last blocks may be partial.
        bias: [N], any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [*, N], `out_dtype`.
    """
    N, K = weight.shape
    wide = accumulate_dtype(x.dtype)
    rows = x.to(wide) * spread_last(x_scale, K, group_size)
    columns = weight.to(wide) * spread(weight_scale, (N, K), (block_n, block_k))
    return linear_of(rows, columns, bias, None, out_dtype)


@op(problem=of_gemm_rowwise)
def gemm_fp8_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear layer in fp8 with one scale a token and one an output feature.

    Args:
        x: [*, K], fp8.
        weight: [N, K], fp8.
        x_scale: [*, 1], fp32.
        weight_scale: [N], [N, 1] or [1, N], fp32.
        bias, out_dtype: as in `gemm_fp8_blockscale`.

    Returns:
        [*, N], `out_dtype`.
    """
    factor = x_scale * weight_scale.reshape(-1)
    wide = accumulate_dtype(x.dtype)
    return linear_of(x.to(wide), weight.to(wide), bias, factor, out_dtype)


@op(problem=of_gemm_per_tensor)
def gemm_fp8_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear layer in fp8 with one scale for x and one for the weight.

    Args:
        x: [*, K], fp8.
        weight: [N, K], fp8.
        x_scale, weight_scale: one fp32 element each, of any shape.
        bias, out_dtype: as in `gemm_fp8_blockscale`.

    Returns:
        [*, N], `out_dtype`.
    """
    factor = x_scale.reshape(()) * weight_scale.reshape(())
    wide = accumulate_dtype(x.dtype)
    return linear_of(x.to(wide), weight.to(wide), bias, factor, out_dtype)


@op(problem=of_gemm_rowwise)
def gemm_int8(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear layer in int8 with one scale a token and one an output feature.

    Args:
        x: [*, K], int8.
        weight: [N, K], int8.
        x_scale, weight_scale, bias, out_dtype: as in `gemm_fp8_rowwise`.

    Returns:
        [*, N], `out_dtype`; products are summed exactly before they are scaled.
    """
    # float64 holds sums of int8 products exactly up to K = 5e11, and GPUs have no integer matmul.
    exact = F.linear(x.to(torch.float64).contiguous(), weight.to(torch.float64))
    out = exact.to(torch.float32) * (x_scale * weight_scale.reshape(-1))
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


@op(problem=of_gemm_w8a16)
def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    """A linear layer whose weight is stored in eight bits.

    Args:
        x: [*, K], bfloat16, float16 or float32.
        weight: [N, K], fp8 or int8.
        weight_scale: [N], or [ceil(N / block_n), ceil(K / block_k)], fp32.
        bias: [N], any float dtype, or None.

    Returns:
        [*, N], x's dtype.
    """
    wide = accumulate_dtype(x.dtype)
    if weight_scale.dim() == 1:
        return linear_of(x.to(wide), weight.to(wide), bias, weight_scale, x.dtype)
    columns = _dequantised(weight, weight_scale, block_n, block_k, wide)
    return linear_of(x.to(wide), columns, bias, None, x.dtype)


def _dequantised(
    weight: Tensor, scale: Tensor, block_n: int, block_k: int, dtype: torch.dtype
) -> Tensor:
    """A weight [N, K] of `gemm_w8a16`."""
    N, K = weight.shape
    factor = scale[:, None] if scale.dim() == 1 else spread(scale, (N, K), (block_n, block_k))
    return weight.to(dtype) * factor


@gemm_w8a16.backward("weight", "weight_scale", "bias")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    wide = accumulate_dtype(grad.dtype)
    blocks = saved["block_n"], saved["block_k"]
    columns = _dequantised(saved["weight"], saved["weight_scale"], *blocks, wide)
    return gradients_of_rows(grad, columns, saved["bias"])


def gradients_of_rows(
    grad: Tensor, columns: Tensor, bias: Tensor | None
) -> dict[str, Tensor | None]:
    """Gradients of x and of the bias; the weight, which is quantised, gets none."""
    of_bias = None if bias is None else grad.flatten(0, -2).sum(0).to(bias.dtype)
    return {"x": grad @ columns.to(grad.dtype), "bias": of_bias}


for made in (gemm_fp8_blockscale, gemm_fp8_rowwise, gemm_fp8_per_tensor, gemm_int8, gemm_w8a16):
    made.tuned(TUNINGS[made.name])
for made in (gemm_fp8_blockscale, gemm_fp8_rowwise, gemm_fp8_per_tensor, gemm_w8a16):
    add_cpp(made, "gemm", refuse=dtypes_unsupported, decline=onednn_is_faster)
CUDA_CONFIG = "cuda.gemm_config.GemmConfig"
for made in (gemm_fp8_blockscale, gemm_fp8_rowwise, gemm_fp8_per_tensor):
    add_cuda(made, "gemm", refuse=cuda_unsupported, cede=cublas_is_faster, config=CUDA_CONFIG)
add_vendor(
    gemm_fp8_blockscale,
    "gemm",
    refuse=vendor_unsupported,
    cede=triton_is_faster,
    archs=("sm_90",),
)
for made in (gemm_fp8_rowwise, gemm_fp8_per_tensor):
    add_vendor(made, "gemm", refuse=vendor_unsupported, cede=triton_is_faster)
CONFIG = "triton.gemm_config.GemmConfig"
for made in (gemm_fp8_blockscale, gemm_fp8_rowwise, gemm_fp8_per_tensor):
    add_triton(made, "gemm", refuse=triton_unsupported, config=CONFIG)
add_triton(gemm_int8, "gemm", refuse=int8_unsupported, config=CONFIG)
add_vendor(
    gemm_w8a16,
    "gemm_weight",
    refuse=triton_unsupported,
    decline=dequantising_unpaid,
    cede=dequantising_unpaid,
    archs=("sm_90",),
)
add_triton(
    gemm_w8a16, "gemm_weight", refuse=triton_unsupported, decline=decline_weight_only, config=CONFIG
)
