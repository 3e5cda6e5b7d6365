"""Batches of matrix products on dequantised operands: `torch.bmm(q * s, (w * t).mT)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aiter_inductor.core.dtypes import FP8_DTYPES
from aiter_inductor.core.graph import arg, dtype, dtype_name, kind, ndim, sizes
from aiter_inductor.core.match import Derived, Match, Miss, Output, recogniser
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.lowerings.bmm import bmm_fp8
from aiter_inductor.patterns.raising.gemm_axes import Axes, merged, reorder
from aiter_inductor.patterns.raising.gemm_operand import (
    Operand,
    Span,
    in_order,
    natural,
    read_operand,
    shaped,
    span,
)


@dataclass(frozen=True)
class BatchScale:
    """A scale of one operand, as the op takes it.

    Attributes:
        argument: [B or 1, rows or blocks of them or 1, blocks of K or 1].
        rows, columns: how it varies along the operand's last two dimensions.
    """

    argument: Any
    rows: Span
    columns: Span


@recogniser(bmm_fp8.name, "bmm", "matmul")
def dequantised_bmm(node: fx.Node) -> Match | Miss | None:
    """A product of batches of fp8 matrices."""
    left = arg(node, "input")
    right = arg(node, "mat2" if kind(node) == "bmm" else "other")
    if ndim(left) != 3 or ndim(right) != 3:
        return None
    x, turned = read_operand(left), read_operand(right)
    if not isinstance(x, Operand) or not isinstance(turned, Operand):
        return None
    if not x.scales or not turned.scales:
        return None
    weight = turned.seen_through(None, _turned)
    assert weight is not None
    made = _arguments(x, weight)
    if isinstance(made, str):
        return Miss(bmm_fp8.name, node, made)
    args, kwargs = made
    end, interior = node, {node}
    if len(node.users) == 1 and kind(user := next(iter(node.users))) == "cast":
        if dtype(node) == torch.float32 and dtype(user) in (torch.bfloat16, torch.float16):
            end = user
            interior.add(user)
    kwargs["out_dtype"] = dtype(end)
    kept = x.nodes | weight.nodes
    return Match(
        bmm_fp8.name, bmm_fp8, args, kwargs, (Output(end),), frozenset(interior), kept=kept
    )


def _arguments(x: Operand, weight: Operand) -> tuple[tuple[Any, ...], dict[str, Any]] | str:
    """The op's arguments, or why it does not compute this."""
    held: list[Any] = []
    for operand in (x, weight):
        stored = operand.values.node
        if dtype(stored) not in FP8_DTYPES:
            return f"{stored.name} is {dtype_name(stored)}, not float8_e4m3"
        made = _stored(operand)
        if made is None and operand is weight:
            turned = operand.seen_through(None, _turned)
            seen = None if turned is None else _stored(turned)
            made = None if seen is None else Derived(as_rows, (seen,))
        if made is None:
            return f"{stored.name} is no batch of matrices as it is stored"
        held.append(made)
    if not all(fixed(n) is not None for n in weight.values.axes.sizes[1:]):
        return f"the weight is {list(weight.values.axes.sizes)}, not known when compiling"
    scales = [_scale(operand) for operand in (x, weight)]
    of_x, of_weight = scales
    if isinstance(of_x, str):
        return of_x
    if isinstance(of_weight, str):
        return of_weight
    if of_x.rows.axes and of_x.rows.block != 1:
        return f"{x.scales[0].node.name} is shared by {of_x.rows.block} rows; kernels scale each"
    kwargs = {
        "group_size": _block(of_x.columns),
        "block_n": _block(of_weight.rows),
        "block_k": _block(of_weight.columns),
    }
    return (*held, of_x.argument, of_weight.argument), kwargs


def as_rows(columns: Tensor) -> Tensor:
    """A weight that is stored [B, K, N] as [B, N, K]."""
    return columns.mT


def _stored(operand: Operand) -> Any:
    """The operand's tensor in its shape, or None if its elements are in another order."""
    values = operand.values
    return shaped(values.node, values.axes.sizes) if in_order(values) else None


def _turned(axes: Axes) -> Axes:
    return reorder(axes, (0, 2, 1))


def _scale(operand: Operand) -> BatchScale | str:
    """The operand's one scale, or why no kernel takes it."""
    if len(operand.scales) != 1:
        names = " and ".join(scale.node.name for scale in operand.scales)
        return f"{operand.values.node.name} has {len(operand.scales)} scales, {names}"
    scale = operand.scales[0]
    found = [
        span(merged(digits), size)
        for digits, size in zip(scale.axes.digits, scale.axes.sizes, strict=True)
    ]
    spans = [each for each in found if each is not None]
    if len(spans) < 3 or (spans[0].axes and spans[0].block != 1):
        return f"{scale.node.name} is not repeated in blocks of neighbours"
    made: Any = _in_spans(scale.node, spans)
    if made is None:
        seen = _in_spans(scale.node, [spans[0], spans[2], spans[1]])
        made = None if seen is None else Derived(as_rows, (seen,))
    if made is None:
        return f"{scale.node.name} is rearranged while it is spread over blocks"
    if dtype(scale.node) != torch.float32:
        made = Derived(torch.Tensor.float, (made,))
    if scale.divides:
        made = Derived(torch.reciprocal, (made,))
    return BatchScale(made, spans[1], spans[2])


def _in_spans(node: fx.Node, spans: list[Span]) -> Any:
    """A scale with one element a span's value, if its elements are in that order."""
    digits = merged(digit for each in spans for digit in each.axes)
    if digits != natural(sizes(node) or ()):
        return None
    return shaped(node, tuple(each.count for each in spans))


def _block(along: Span) -> int:
    """Elements that share a scale; of no account where all of them do."""
    size: Dim = fixed(along.block)
    return 128 if along.count == 1 or size is None else int(size)
