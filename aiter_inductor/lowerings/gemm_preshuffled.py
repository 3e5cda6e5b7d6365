"""Linear layers in fp8 whose weight was laid out in tiles of 16 x 16 before it is first used.

The layout is AITER's `shuffle_weight(layout=(16, 16))`: a band of 16 output features after the
other, in each a tile of 16 features by 16 bytes of K after the other. A wave of CDNA then loads
what its matrix instructions take in whole lines. A tensor so laid out is [N / 16, 16 K]: its shape
says what it is, so no kernel can take it for rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aiter_inductor.core.op import Use, op
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_rowwise,
    of_gemm_blockscale,
    of_gemm_rowwise,
)
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_providers import triton_unsupported
from aiter_inductor.lowerings.gemm_tiles import TILE, in_rows
from aiter_inductor.lowerings.providers import add_triton

CDNA = ("gfx942", "gfx950")


def of_blockscale(
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
    """The problem of `gemm_fp8_blockscale_preshuffled`."""
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    made = of_gemm_blockscale(
        x, in_rows(weight), x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype
    )
    return replace(made, layout="16x16")


def of_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> GemmProblem:
    """The problem of `gemm_fp8_rowwise_preshuffled`."""
    made = of_gemm_rowwise(x, in_rows(weight), x_scale, weight_scale, bias, out_dtype=out_dtype)
    return replace(made, layout="16x16")


@op(problem=of_blockscale)
def gemm_fp8_blockscale_preshuffled(
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
    """`gemm_fp8_blockscale` of a weight in tiles.

    Args:
        weight: [N / 16, 16 K], fp8: `in_tiles` of the weight [N, K].
        x, x_scale, weight_scale, bias, group_size, block_n, block_k, out_dtype: as there.

    Returns:
        [*, N], `out_dtype`.
    """
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    rows = in_rows(weight)
    out: Tensor = gemm_fp8_blockscale.reference(
        x, rows, x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype
    )
    return out


@op(problem=of_rowwise)
def gemm_fp8_rowwise_preshuffled(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_fp8_rowwise` of a weight in tiles.

    Args:
        weight: [N / 16, 16 K], fp8: `in_tiles` of the weight [N, K].
        x, x_scale, weight_scale, bias, out_dtype: as there.

    Returns:
        [*, N], `out_dtype`.
    """
    rows = in_rows(weight)
    out: Tensor = gemm_fp8_rowwise.reference(
        x, rows, x_scale, weight_scale, bias, out_dtype=out_dtype
    )
    return out


def tiles_unsupported(problem: GemmProblem, use: Use) -> str | None:
    """What the kernel does not take in tiles, beside what it does not take in rows."""
    if problem.K % (2 * TILE):
        return f"K={problem.K} is no multiple of {2 * TILE}, the two tiles that AITER pairs"
    return triton_unsupported(problem, use)


for made in (gemm_fp8_blockscale_preshuffled, gemm_fp8_rowwise_preshuffled):
    add_triton(made, "gemm_preshuffled", refuse=tiles_unsupported, archs=CDNA)
