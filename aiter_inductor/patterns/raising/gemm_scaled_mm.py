"""`torch._scaled_mm` and `torch.nn.functional.scaled_mm`: one scale, one a row, or by blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES
from aiter_inductor.core.graph import arg, dtype, dtype_name, kind, ndim, sizes, source
from aiter_inductor.core.match import Derived, Match, Miss, Output, recogniser
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
)
from aiter_inductor.patterns.raising.gemm import PATTERN
from aiter_inductor.patterns.raising.gemm_axes import TRANSPOSES, reorder, start, through

BLOCK = 128


@recogniser(PATTERN, "scaled_mm", "scaled_mm_recipes")
def library_call(node: fx.Node) -> Match | Miss | None:
    """A product of fp8 matrices [M, K] and [K, N] that torch scales."""
    x, matrix, bias = arg(node, "input"), arg(node, "mat2"), arg(node, "bias")
    scales = [_only(arg(node, name)) for name in ("scale_a", "scale_b")]
    if ndim(x) != 2 or ndim(matrix) != 2:
        return None
    if reason := _differs(node, x, matrix, scales):
        return Miss(PATTERN, node, reason)
    (M, K), (_, N) = sizes(x) or (0, 0), sizes(matrix) or (0, 0)
    shapes = [sizes(scale) for scale in scales]
    shown = " and ".join(str(list(shape or ())) for shape in shapes)
    weight = _stored_rows(matrix)
    if _by_blocks(node):
        blocks = (-(-K // BLOCK), -(-N // BLOCK))
        # torch pads the blocks of K to a multiple of 4.
        padded = -(-blocks[0] // 4) * 4
        if shapes != [(M, blocks[0]), (padded, blocks[1])]:
            return Miss(
                PATTERN,
                node,
                f"block scales are {shown}, not [{M}, {blocks[0]}] and [{padded}, {blocks[1]}]",
            )
        scales[1] = Derived(transposed_blocks, (scales[1], blocks[0]))
        op = gemm_fp8_blockscale
    elif all(all(n == 1 for n in shape or ()) for shape in shapes):
        op = gemm_fp8_per_tensor
    elif shapes == [(M, 1), (1, N)]:
        op = gemm_fp8_rowwise
    else:
        return Miss(PATTERN, node, f"scales are {shown}; kernels take [] or [{M}, 1] and [1, {N}]")
    kwargs = {"out_dtype": dtype(node)}
    args = (x, weight, *scales, bias)
    return Match(op.name, op, args, kwargs, (Output(node),), frozenset({node}))


def transposed_blocks(scale: torch.Tensor, number: int) -> torch.Tensor:
    """Scales [padded, N / 128] of a transposed weight as [N / 128, number]."""
    return scale.t()[:, :number]


def _stored_rows(matrix: fx.Node) -> fx.Node | Derived:
    """The matrix [K, N] as [N, K]: what it is the transpose of, if that is in the graph."""
    stored = source(matrix) if kind(matrix) in TRANSPOSES else None
    if isinstance(stored, fx.Node) and ndim(stored) == 2:
        axes = start(sizes(stored) or ())
        if through(matrix, axes) == reorder(axes, (1, 0)):
            return stored
    return Derived(torch.t, (matrix,))


def _by_blocks(node: fx.Node) -> bool:
    """Whether x is scaled by 1 x 128 and the weight by 128 x 128."""
    if kind(node) != "scaled_mm_recipes":
        return False
    recipes = [_only(arg(node, name)) for name in ("recipe_a", "recipe_b")]
    return recipes == [F.ScalingType.BlockWise1x128.value, F.ScalingType.BlockWise128x128.value]


def _only(scale: Any) -> Any:
    """The scale, out of the list that a call with recipes holds it in."""
    return scale[0] if isinstance(scale, list | tuple) and len(scale) == 1 else scale


def _differs(node: fx.Node, x: Any, matrix: Any, scales: list[Any]) -> str | None:
    """Why no kernel computes the call, or None."""
    for operand in (x, matrix):
        if dtype(operand) not in FP8_DTYPES:
            return f"{operand.name} is {dtype_name(operand)}, not float8_e4m3"
    if dtype(node) not in ROW_DTYPES:
        return f"the result is {dtype_name(node)}; kernels write 16 or 32 bits"
    if arg(node, "scale_result") is not None:
        return "the result is scaled too; kernels scale x and the weight"
    for scale in scales:
        if dtype(scale) != torch.float32:
            return f"scales are {dtype_name(scale)}; kernels take one float32"
    return None
