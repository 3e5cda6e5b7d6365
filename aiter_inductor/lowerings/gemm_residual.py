"""Linear layers in fp8 that add a residual before they round: `residual + linear(x)`.

On an H100 the addition costs 2.0 µs beside 64 x 4096 x 4096 and 34.5 beside 4096 x 4096 x 4096,
in the Triton kernel's epilogue 0.4 and 13.5. There the wgmma kernel with an addition behind it is
ahead all the same (136.6 against 202.6 µs; 13.1 against 13.0), so this is for chips where Triton
multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import ROW_DTYPES, short_name
from aiter_inductor.core.op import Use, op
from aiter_inductor.core.problem import Dim, dim
from aiter_inductor.lowerings.arguments import apart
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_rowwise,
    of_gemm_blockscale,
    of_gemm_rowwise,
)
from aiter_inductor.lowerings.gemm_preshuffled import CDNA
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_providers import triton_unsupported
from aiter_inductor.lowerings.providers import add_triton


@dataclass(frozen=True)
class ResidualGemmProblem(GemmProblem):
    """A GemmProblem with a residual [*, N] of `residual_dtype`."""

    residual_dtype: torch.dtype = torch.bfloat16

    def bytes_moved(self) -> Dim:
        """As the product's, and the residual read once."""
        return super().bytes_moved() + self.M * self.N * self.residual_dtype.itemsize

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the product's, with a residual of about one before the bias."""
        (*operands, bias), kwargs = super().sample(seed=seed, device=device)
        generator = torch.Generator(device).manual_seed(seed + 1)
        made = torch.randn((self.M, self.N), generator=generator, device=device)
        return (*operands, made.to(self.residual_dtype), bias), kwargs


def _with_residual(made: GemmProblem, x: Tensor, residual: Tensor) -> ResidualGemmProblem:
    problem = ResidualGemmProblem(**vars(made), residual_dtype=residual.dtype)
    wanted = (*map(dim, x.shape[:-1]), made.N)
    found = tuple(map(dim, residual.shape))
    if problem.mismatch is None and found != wanted:
        return replace(problem, mismatch=f"residual is {list(found)}, the result {list(wanted)}")
    if wrong := apart(x, residual):
        return replace(problem, mismatch=problem.mismatch or wrong)
    return problem


def of_blockscale(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> ResidualGemmProblem:
    """The problem of `gemm_fp8_blockscale_add`."""
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    made = of_gemm_blockscale(x, weight, x_scale, weight_scale, bias, **blocks, out_dtype=out_dtype)
    return _with_residual(made, x, residual)


def of_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> ResidualGemmProblem:
    """The problem of `gemm_fp8_rowwise_add`."""
    made = of_gemm_rowwise(x, weight, x_scale, weight_scale, bias, out_dtype=out_dtype)
    return _with_residual(made, x, residual)


@op(problem=of_blockscale)
def gemm_fp8_blockscale_add(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_fp8_blockscale` plus a residual, rounded once.

    Args:
        x, weight, x_scale, weight_scale, bias: as there.
        residual: [*, N], bfloat16, float16 or float32.
        group_size, block_n, block_k, out_dtype: as there.

    Returns:
        [*, N], `out_dtype`.
    """
    blocks = {"group_size": group_size, "block_n": block_n, "block_k": block_k}
    out = gemm_fp8_blockscale.reference(
        x, weight, x_scale, weight_scale, bias, **blocks, out_dtype=torch.float32
    )
    return torch.add(out, residual).to(out_dtype)


@op(problem=of_rowwise)
def gemm_fp8_rowwise_add(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_fp8_rowwise` plus a residual, rounded once.

    Args:
        x, weight, x_scale, weight_scale, bias: as there.
        residual: [*, N], bfloat16, float16 or float32.
        out_dtype: as there.

    Returns:
        [*, N], `out_dtype`.
    """
    out = gemm_fp8_rowwise.reference(
        x, weight, x_scale, weight_scale, bias, out_dtype=torch.float32
    )
    return torch.add(out, residual).to(out_dtype)


def residual_unsupported(problem: ResidualGemmProblem, use: Use) -> str | None:
    """What the kernel does not add, beside what it does not multiply."""
    if problem.residual_dtype not in ROW_DTYPES:
        return f"residual is {short_name(problem.residual_dtype)}, which no kernel adds"
    return triton_unsupported(problem, use)


for made in (gemm_fp8_blockscale_add, gemm_fp8_rowwise_add):
    add_triton(made, "gemm_residual", refuse=residual_unsupported, archs=CDNA)
