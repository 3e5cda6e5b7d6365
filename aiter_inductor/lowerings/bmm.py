"""Products of batches of fp8 matrices, scaled by tensor, row or block, alike in one op.

What has one scale is one block that covers everything: a scale a matrix is [B, 1, 1], one for all
matrices [1, 1, 1], one a row [B, M, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES, accumulate_dtype, short_name
from aiter_inductor.core.op import Use, op
from aiter_inductor.core.problem import Dim, dim, fixed, is_row_major
from aiter_inductor.lowerings.arguments import apart
from aiter_inductor.lowerings.gemm import spread_last
from aiter_inductor.lowerings.gemm_problem import ceil_div
from aiter_inductor.lowerings.gemm_providers import (
    fp8_unsupported,
    open_sizes,
    scales_too_fine,
)
from aiter_inductor.lowerings.providers import add_triton

MAX_BATCH = 65535


@dataclass(frozen=True)
class BmmProblem:
    """`out[B, M, N] = x[B, M, K] @ weight[B, N, K].mT`, both in fp8.

    Attributes:
        B, M, N, K: matrices, and the sizes of each product.
        dtype, weight_dtype, out_dtype: of x, weight and the result.
        x_scales: sizes of x's scale, [B or 1, M or 1, groups of K].
        weight_scales: sizes of the weight's scale, [B or 1, blocks of N, blocks of K].
        group_size: elements of K that share a scale of x, unless all do.
        block_n, block_k: rows and columns of the weight that share a scale, unless all do.
        mismatch: why the tensors do not belong together, or None.
        turned: whether the weight is a view of one that is stored [B, K, N].
    """

    B: Dim
    M: Dim
    N: Dim
    K: Dim
    dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    x_scales: tuple[Dim, ...] = (1, 1, 1)
    weight_scales: tuple[Dim, ...] = (1, 1, 1)
    group_size: int = 128
    block_n: int = 128
    block_k: int = 128
    mismatch: str | None = None
    turned: bool = False

    def bytes_moved(self) -> Dim:
        """Operands and scales read once, the result written once."""
        scales = 4 * (math.prod(self.x_scales) + math.prod(self.weight_scales))
        operands = self.B * self.K * (self.M + self.N)
        return operands + scales + self.B * self.M * self.N * self.out_dtype.itemsize

    def flops(self) -> Dim:
        """A multiplication and an addition for each of B·M·N·K."""
        return 2 * self.B * self.M * self.N * self.K

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Values that fill their dtype's range, scales that give a result of about one."""
        generator = torch.Generator(device).manual_seed(seed)

        def values(rows: Dim, dtype: torch.dtype) -> Tensor:
            shape = (self.B, rows, self.K)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def scales(shape: tuple[Dim, ...], unit: float) -> Tensor:
            return unit * (0.5 + torch.rand(shape, generator=generator, device=device))

        unit = 1 / max(1, self.K) ** 0.5
        x, weight = values(self.M, self.dtype), values(self.N, self.weight_dtype)
        operands = x, weight.mT.contiguous().mT if self.turned else weight
        made = scales(self.x_scales, 1), scales(self.weight_scales, unit)
        blocks = {"block_n": self.block_n, "block_k": self.block_k}
        return (*operands, *made), {
            "group_size": self.group_size,
            **blocks,
            "out_dtype": self.out_dtype,
        }


def of_bmm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> BmmProblem:
    """The problem of `bmm_fp8`."""
    shapes = [tuple(map(dim, t.shape)) for t in (x, weight, x_scale, weight_scale)]
    of_x, of_weight = (s if len(s) == 3 else (1, 1, 1) for s in shapes[:2])
    return BmmProblem(
        B=of_x[0],
        M=of_x[1],
        N=of_weight[1],
        K=of_x[2],
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        out_dtype=out_dtype,
        x_scales=shapes[2],
        weight_scales=shapes[3],
        group_size=group_size,
        block_n=block_n,
        block_k=block_k,
        mismatch=_mismatch(
            shapes, (group_size, block_n, block_k), (x, weight, x_scale, weight_scale)
        ),
        turned=weight.dim() == 3 and not is_row_major(weight) and is_row_major(weight.mT),
    )


@op(problem=of_bmm)
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
    """A product of two batches of matrices, the second transposed.

    Args:
        x: [B, M, K], fp8.
        weight: [B, N, K], fp8; kernels read a view of [B, K, N] without a copy, too.
        x_scale: [B or 1, M or 1, ceil(K / group_size) or 1], fp32.
        weight_scale: [B or 1, ceil(N / block_n) or 1, ceil(K / block_k) or 1], fp32.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [B, M, N], `out_dtype`.
    """
    (N, K), wide = weight.shape[1:], accumulate_dtype(x.dtype)
    blocks = weight_scale
    if blocks.shape[1] != 1:
        blocks = spread_last(blocks.mT, N, block_n).mT
    if blocks.shape[2] != 1:
        blocks = spread_last(blocks, K, block_k)
    groups = x_scale if x_scale.shape[2] == 1 else spread_last(x_scale, K, group_size)
    return torch.bmm(x.to(wide) * groups, (weight.to(wide) * blocks).mT).to(out_dtype)


def unsupported(problem: BmmProblem, use: Use) -> str | None:
    """What the kernel does not take."""
    if problem.mismatch:
        return problem.mismatch
    for name, dtype in (("x", problem.dtype), ("weight", problem.weight_dtype)):
        if dtype not in FP8_DTYPES:
            return f"{name} is {short_name(dtype)}, which no kernel of this op reads"
    if reason := fp8_unsupported(problem.dtype, problem.weight_dtype, use):
        return reason
    if problem.out_dtype not in ROW_DTYPES:
        return f"no kernel writes {short_name(problem.out_dtype)}"
    counts = (problem.x_scales[2], problem.weight_scales[2])
    steps = zip(counts, (problem.group_size, problem.block_k), strict=True)
    fine = scales_too_fine(size for count, size in steps if count != 1)
    if reason := open_sizes(problem.N, problem.K) or fine:
        return reason
    if fixed(problem.B) is not None and problem.B > MAX_BATCH:
        return f"B={problem.B} is more than {MAX_BATCH}, the grid's third dimension"
    return None


def _mismatch(
    shapes: list[tuple[Dim, ...]],
    sizes: tuple[int, int, int],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
) -> str | None:
    if any(len(shape) != 3 for shape in shapes):
        return f"the tensors have {[len(shape) for shape in shapes]} dimensions, not 3 each"
    (B, M, K), (batches, N, depth) = shapes[:2]
    if batches != B or depth != K:
        return f"x is {[B, M, K]} and weight {[batches, N, depth]}, not [B, M, K] and [B, N, K]"
    wanted = (
        (B, M, ceil_div(K, sizes[0])),
        (B, ceil_div(N, sizes[1]), ceil_div(K, sizes[2])),
    )
    for name, found, full in zip(("x_scale", "weight_scale"), shapes[2:], wanted, strict=True):
        if any(n not in (1, whole) for n, whole in zip(found, full, strict=True)):
            return f"{name} is {list(found)}, neither {list(full)} nor 1 in a place of that"
    for name, scale in zip(("x_scale", "weight_scale"), tensors[2:], strict=True):
        if scale.dtype != torch.float32:
            return f"{name} is {short_name(scale.dtype)}, not float32"
    return apart(*tensors) or None


def slow_along_n(problem: BmmProblem, use: Use) -> str | None:
    """Hopper's tensor cores read fp8 along K only; from rows along N Triton gathers byte by byte.

    16 of 512 x 2048 x 2048 on an H100: 1374 us, stored [B, N, K] 109, Inductor's code 189.
    """
    if use.arch.name != "sm_90" or not problem.turned:
        return None
    return "16 of 512 x 2048 x 2048 stored along N take 1374 us on sm_90, Inductor's code 189"


add_triton(bmm_fp8, "bmm", refuse=unsupported, decline=slow_along_n)
