"""An operand of a matrix product as quantised values times their scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import QUANT_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.graph import RESHAPES, dtype, kind, operands, sizes
from aiter_inductor.core.match import Derived
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.patterns.raising.gemm_axes import (
    Axes,
    Digit,
    behind,
    broadcast,
    is_view,
    merged,
    reorder,
    start,
    through,
)
from aiter_inductor.patterns.raising.gemm_e2m1 import read_e2m1
from aiter_inductor.patterns.raising.gemm_int4 import read_nibbles
from aiter_inductor.patterns.raising.quant_rows import adaptation

SIGNED = (torch.int8, torch.int16, torch.int32)
_UNREAD_FP8 = (torch.float8_e5m2, torch.float8_e5m2fnuz)


@dataclass(frozen=True)
class Placed:
    """A tensor of the graph, and which of its elements each element of the operand uses.

    Attributes:
        node: the tensor.
        axes: where its elements go.
        divides: of a scale, whether the operand is divided by it.
        packed: of int4 or e2m1 values, the bytes that hold two each.
        e2m1: whether those are e2m1, the elements of MXFP4.
        offset_binary: of int4 values, whether the bytes hold them with 8 added.
    """

    node: fx.Node
    axes: Axes
    divides: bool = False
    packed: fx.Node | None = None
    e2m1: bool = False
    offset_binary: bool = False

    def through(self, change: Callable[[Axes], Axes | None]) -> Placed | None:
        """The same tensor behind one more view."""
        axes = change(self.axes)
        return None if axes is None else replace(self, axes=axes)


@dataclass(frozen=True)
class Zero:
    """What int4 values are shifted by.

    Attributes:
        placed: the tensor.
        added: to scaled values; else it is subtracted before they are scaled.
    """

    placed: Placed
    added: bool


@dataclass(frozen=True)
class Operand:
    """`values * scales`, as dequantised by the program.

    Attributes:
        values: the quantised tensor.
        scales: its factors.
        nodes: what the program computes from them, up to and with the operand.
        zero: of int4 values, what shifts them.
        lift: of int4 values, a number that is added before they are scaled.
    """

    values: Placed
    scales: tuple[Placed, ...] = ()
    nodes: frozenset[fx.Node] = frozenset()
    zero: Zero | None = None
    lift: float = 0

    def seen_through(
        self, node: fx.Node | None, change: Callable[[Axes], Axes | None]
    ) -> Operand | None:
        """Everything behind one more view."""
        values = self.values.through(change)
        scales = [scale.through(change) for scale in self.scales]
        if values is None or None in scales:
            return None
        kept = tuple(scale for scale in scales if scale is not None)
        zero = self.zero
        if zero is not None:
            moved = zero.placed.through(change)
            if moved is None:
                return None
            zero = replace(zero, placed=moved)
        nodes = self.nodes | ({node} if node else set())
        return replace(self, values=values, scales=kept, nodes=nodes, zero=zero)

    def transposed(self) -> Operand | None:
        """The operand of a product that reads it the other way round."""
        return self.seen_through(None, lambda axes: reorder(axes, (1, 0)))


@dataclass(frozen=True)
class Span:
    """How a scale varies along rows or columns: `count` values, each for `block` neighbours."""

    axes: tuple[Digit, ...]
    count: Dim
    block: Dim


def read_operand(node: Any) -> Operand | str | None:
    """`node` as dequantised values: a sentence if no kernel dequantises so, None if it is none."""
    if not isinstance(node, fx.Node):
        return None
    found = dtype(node)
    if nibbles := read_nibbles(node):
        axes, offset_binary = start(sizes(node) or ()), nibbles.offset_binary
        values = Placed(node, axes, packed=nibbles.packed, offset_binary=offset_binary)
        return Operand(values, nodes=nibbles.nodes, lift=nibbles.lift)
    if elements := read_e2m1(node):
        values = Placed(node, start(sizes(node) or ()), packed=elements.packed, e2m1=True)
        return Operand(values, nodes=elements.nodes)
    if found in SIGNED and isinstance(shifted := _shifted(node), Operand):
        return shifted
    if found in QUANT_DTYPES:
        return Operand(Placed(node, start(sizes(node) or ())))
    if found in _UNREAD_FP8:
        return f"{node.name} is {short_name(found)}; kernels read float8_e4m3fn and int8"
    if found not in (*ROW_DTYPES, torch.int32):
        return None
    if kind(node) == "cast":
        inner = read_operand(node.args[0])
        return replace(inner, nodes=inner.nodes | {node}) if isinstance(inner, Operand) else inner
    if is_view(node):
        inner = read_operand(behind(node))
        if not isinstance(inner, Operand):
            return inner
        return inner.seen_through(node, lambda axes: through(node, axes))
    if kind(node) in ("mul", "div"):
        return _scaled(node)
    return _shifted(node)


def read_scale(
    node: fx.Node, shape: tuple[Dim, ...], dtypes: tuple[torch.dtype, ...] = ROW_DTYPES
) -> Placed | None:
    """A factor of an operand of this shape, back to where its elements are first repeated."""
    chain = [node]
    while is_view(chain[-1]) or kind(chain[-1]) == "cast":
        before = behind(chain[-1])
        if not isinstance(before, fx.Node) or dtype(before) not in dtypes:
            break
        chain.append(before)
    elements = math.prod(sizes(chain[-1]) or ())
    at = next(i for i, found in enumerate(chain) if math.prod(sizes(found) or ()) == elements)
    axes: Axes | None = start(sizes(chain[at]) or ())
    for view in reversed(chain[:at]):
        axes = axes if kind(view) == "cast" or axes is None else through(view, axes)
    axes = None if axes is None else broadcast(axes, shape)
    return None if axes is None else Placed(chain[at], axes)


def in_order(placed: Placed) -> bool:
    """Whether the operand is a reshape of the tensor: the same elements in the same order."""
    axes = placed.axes
    if not all(map(axes.whole, range(len(axes.sizes)))):
        return False
    found = merged(digit for dim_ in axes.digits for digit in dim_)
    return found == natural(sizes(placed.node) or ())


def spans(scale: Placed) -> tuple[Span, Span] | str:
    """How a scale varies along all rows together and along the last dimension."""
    axes = scale.axes
    last = len(axes.sizes) - 1
    if last > 1 and not all(map(axes.whole, range(last))):
        return f"{scale.node.name} is cut short along several dimensions"
    rows = merged(digit for dim_ in axes.digits[:last] for digit in dim_)
    columns = merged(axes.digits[last])
    found = [span(digits, size) for digits, size in (
        (rows, math.prod(axes.sizes[:last])), (columns, axes.sizes[last]))]  # fmt: skip
    if found[0] is None or found[1] is None:
        return f"{scale.node.name} is not repeated in blocks of neighbours"
    return found[0], found[1]


def as_matrix(scale: Placed, rows: Span, columns: Span) -> tuple[fx.Node, bool] | None:
    """The scale's tensor, and whether its rows stand for the operand's columns."""
    shape = natural(sizes(scale.node) or ())
    if merged((*rows.axes, *columns.axes)) == shape:
        return scale.node, False
    return (scale.node, True) if merged((*columns.axes, *rows.axes)) == shape else None


def shaped(argument: fx.Node, shape: tuple[Dim, ...]) -> fx.Node | Derived | None:
    """`argument` with another shape, through a reshape in the graph if it is not there."""
    before: Any = argument
    while isinstance(before, fx.Node) and dtype(before) == dtype(argument):
        if sizes(before) == shape:
            return before
        if kind(before) not in RESHAPES:
            break
        before = behind(before)
    adapt = adaptation(sizes(argument) or (), shape)
    made: Any = argument
    for function, args in adapt or ():
        made = Derived(function, (made, *args))
    return None if adapt is None else made


def _scaled(node: fx.Node) -> Operand | str | None:
    left, right = operands(node, kind(node) or "") or (None, None)
    shape = sizes(node) or ()
    pairs = [(left, right)] if kind(node) == "div" else [(left, right), (right, left)]
    for inner, factor in pairs:
        found = read_operand(inner)
        if isinstance(found, str):
            return found
        if found is None or not isinstance(factor, fx.Node) or dtype(factor) not in ROW_DTYPES:
            continue
        scale = read_scale(factor, shape)
        values = found.seen_through(node, lambda axes: broadcast(axes, shape))
        if scale is None or values is None:
            return f"{factor.name} is spread over {node.name} in a way no kernel reads"
        scale = replace(scale, divides=kind(node) == "div")
        return replace(values, scales=(*values.scales, scale))
    return None


def _shifted(node: fx.Node) -> Operand | str | None:
    for name in ("sub", "add"):
        left, right = operands(node, name) or (None, None)
        for inner, other in ((left, right), (right, left)):
            found = read_operand(inner)
            if not isinstance(found, Operand):
                continue
            if found.values.packed and not found.values.e2m1 and (name == "add" or inner is left):
                return _with_zero(node, found, other)
            if dtype(found.values.node) == torch.int8:
                return f"{found.values.node.name} has a zero point; kernels take symmetric scales"
    return None


def _with_zero(node: fx.Node, found: Operand, other: Any) -> Operand | str:
    """int4 values less a zero point, or scaled ones and a zero."""
    name, adds = found.values.node.name, kind(node) == "add"
    if found.zero is not None:
        return f"{name} is shifted in {node.name} by a second zero point"
    if adds != bool(found.scales):
        when = "before it is scaled" if adds else "after it is scaled"
        way = "added to" if adds else "subtracted from"
        return f"{name} is {way} {when}; kernels subtract before and add after"
    if isinstance(other, int | float) and not adds:
        return replace(found, lift=found.lift - other, nodes=found.nodes | {node})
    shape = sizes(node) or ()
    moved = found.seen_through(node, lambda axes: broadcast(axes, shape))
    is_tensor = isinstance(other, fx.Node) and dtype(other) in (*ROW_DTYPES, *SIGNED, torch.uint8)
    zero = read_scale(other, shape, (*ROW_DTYPES, *SIGNED, torch.uint8)) if is_tensor else None
    if moved is None or zero is None:
        return f"{name} is shifted in {node.name} in a way no kernel does"
    return replace(moved, zero=Zero(zero, adds))


def natural(shape: Sequence[Dim]) -> tuple[Digit, ...]:
    """The digits of a tensor's elements in the order in which they are stored."""
    return tuple(Digit(axis, 1, n) for axis, n in enumerate(shape) if n != 1)


def span(digits: tuple[Digit, ...], size: Dim) -> Span | None:
    """How a scale varies along dimensions of `size` in all that have these digits, merged."""
    block: Dim = 1
    if digits and digits[-1].axis is None:
        block, digits = digits[-1].extent, digits[:-1]
    if any(digit.axis is None for digit in digits):
        return None
    count = math.prod(digit.extent for digit in digits)
    if not digits:
        return Span((), 1, size)
    if block != 1 and fixed(size) is None:
        return None
    covers = count == size if block == 1 else count == -(-size // block)
    return Span(digits, count, block) if covers else None
