"""The scale of an operand as the ops take it: one, a vector, or a matrix of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import dtype
from aiter_inductor.core.match import Derived
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.patterns.raising.gemm_operand import (
    Operand,
    Placed,
    Span,
    as_matrix,
    shaped,
    spans,
)

_BLOCK = 128


@dataclass(frozen=True)
class Scaling:
    """One operand's scale.

    Attributes:
        node: the tensor that holds it, before it is spread.
        rows, columns: how it varies along rows (all leading dimensions) and the last one.
        turned: whether the tensor has columns first.
        divides: whether the program divides by it.
        shape: the operand's.
    """

    node: fx.Node
    rows: Span
    columns: Span
    turned: bool
    divides: bool
    shape: tuple[Dim, ...]

    @property
    def name(self) -> str:
        """Of the scale's node."""
        return self.node.name

    @property
    def constant(self) -> bool:
        """One scale for all."""
        return not self.rows.axes and not self.columns.axes

    @property
    def tokens(self) -> bool:
        """Whether every row has scales of its own; a single row always has."""
        one = math.prod(self.shape[:-1]) == 1
        return one or (bool(self.rows.axes) and self.rows.block == 1)

    @property
    def by_row(self) -> bool:
        """One scale a row."""
        return bool(self.rows.axes) and self.rows.block == 1 and not self.columns.axes

    @property
    def per_row(self) -> bool:
        """One scale a row or for all."""
        return not self.columns.axes and (self.by_row or not self.rows.axes)

    @property
    def block_n(self) -> int:
        """Rows that share a scale."""
        return _block(self.rows)

    @property
    def block_k(self) -> int:
        """Elements of a row that share a scale."""
        return _block(self.columns)

    def shown(self) -> str:
        """`weight_scale in blocks of 128 x 128`."""
        return f"{self.name} in blocks of {self.block_n} x {self.block_k}"

    def one(self) -> Any:
        """As []."""
        return self._finished(shaped(self.node, ()))

    def as_vector(self) -> Any:
        """As [rows]."""
        return self._finished(shaped(self.node, (self.rows.count,)))

    def as_blocks(self) -> Any:
        """As [rows / block_n, columns / block_k]."""
        shape = (self.rows.count, self.columns.count)
        if not self.turned:
            return self._finished(shaped(self.node, shape))
        stored = shaped(self.node, shape[::-1])
        return self._finished(None if stored is None else Derived(torch.t, (stored,)))

    def as_groups(self) -> Any:
        """As [*, columns / block_k] beside an operand [*, columns]."""
        if not self.tokens:
            return self.one()
        return self._finished(shaped(self.node, (*self.shape[:-1], self.columns.count)))

    def _finished(self, made: Any) -> Any:
        """In float32, as a factor."""
        if made is None:
            return None
        if dtype(self.node) != torch.float32:
            made = Derived(torch.Tensor.float, (made,))
        return Derived(torch.reciprocal, (made,)) if self.divides else made


def read_scaling(operand: Operand) -> Scaling | str:
    """The operand's one scale, or why no kernel takes it."""
    if len(operand.scales) != 1:
        names = " and ".join(scale.node.name for scale in operand.scales)
        return f"{operand.values.node.name} has {len(operand.scales)} scales, {names}"
    made = scaling_of(operand.scales[0])
    if isinstance(made, Scaling) and made.rows.axes and made.columns.axes:
        if made.rows.block == made.columns.block == 1:
            return f"{made.name} scales every element of {operand.values.node.name} on its own"
    return made


def scaling_of(scale: Placed) -> Scaling | str:
    """How a tensor that is spread over an operand varies, or why no kernel takes it."""
    found = spans(scale)
    if isinstance(found, str):
        return found
    rows, columns = found
    matrix = as_matrix(scale, rows, columns)
    if matrix is None:
        return f"{scale.node.name} is rearranged while it is spread over blocks"
    if rows.axes and rows.block > 1 and len(scale.axes.sizes) > 2:
        return f"{scale.node.name} is shared by {rows.block} tokens; kernels scale each"
    shape = scale.axes.sizes
    return Scaling(scale.node, rows, columns, matrix[1], scale.divides, shape)


def every_row(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One scale [] as a scale a row [N] of the weight [N, K]."""
    return scale.expand(weight.shape[0])


def _block(span: Span) -> int:
    """The block's size; where one block covers everything, at least the usual 128."""
    found = fixed(span.block)
    assert found is not None
    return max(found, _BLOCK) if span.count == 1 else found
