"""What follows a normalisation: casts, one multiplication by a weight, casts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from aiter_inductor.core.graph import (
    TRANSPARENT,
    commuted,
    dtype,
    kind,
    ndim,
    number,
    only_user,
    size,
    source,
)


@dataclass(frozen=True)
class Scale:
    """The nodes between a normalised value and the end of the norm.

    Attributes:
        end: the node that holds the norm's result.
        unscaled: the node that the weight multiplies; `end` if there is no weight.
        weight: [N] as stored, or None.
        offset: what the program adds to the weight.
        interior: every node walked over, the weight's own casts included.
    """

    end: fx.Node
    unscaled: fx.Node
    weight: fx.Node | None
    offset: float
    interior: frozenset[fx.Node]


def walk_scale(y: fx.Node, x: fx.Node) -> Scale:
    """Follow `y` through casts and at most one multiplication by a weight of x's row length."""
    end, inside = y, {y}
    weight: fx.Node | None = None
    unscaled, offset = y, 0.0
    while (user := only_user(end)) is not None:
        if kind(user) == "cast" and source(user) is end:
            end = user
        elif weight is None and (found := _multiplied(user, end, x)):
            unscaled, (weight, offset, nodes) = end, found
            inside |= nodes
            end = user
        else:
            break
        inside.add(end)
    return Scale(end, unscaled if weight is not None else end, weight, offset, frozenset(inside))


def read_weight(operand: object, x: fx.Node) -> tuple[fx.Node, float, set[fx.Node]] | None:
    """`(weight, offset, nodes)` if `operand` is a row vector as long as x's rows, plus a number."""
    if not isinstance(operand, fx.Node):
        return None
    plain = strip_widening(operand)
    inside = _chain(operand, plain)
    for term, constant in commuted(plain, "add"):
        added = number(constant)
        if added is not None and isinstance(term, fx.Node):
            inner = strip_widening(term)
            if _is_row_vector(inner, x):
                return inner, added, {*inside, plain, *_chain(term, inner)}
    return (plain, 0.0, inside) if _is_row_vector(plain, x) else None


def strip_widening(node: fx.Node) -> fx.Node:
    """`node` before casts that lose nothing (bf16 → fp32) and copies."""
    while True:
        if kind(node) in TRANSPARENT:
            node = source(node)
        elif kind(node) == "cast" and _widens(node):
            node = source(node)
        else:
            return node


def _widens(cast: fx.Node) -> bool:
    before, after = dtype(source(cast)), dtype(cast)
    if before is None or after is None or not before.is_floating_point:
        return False
    return before == after or (before.itemsize < after.itemsize and after.itemsize >= 4)


def _multiplied(
    user: fx.Node, end: fx.Node, x: fx.Node
) -> tuple[fx.Node, float, set[fx.Node]] | None:
    for left, right in commuted(user, "mul"):
        if left is end and (found := read_weight(right, x)):
            return found
    return None


def _is_row_vector(node: fx.Node, x: fx.Node) -> bool:
    return ndim(node) == 1 and size(node, 0) == size(x, -1)


def _chain(node: fx.Node, until: fx.Node) -> set[fx.Node]:
    found = set()
    while node is not until:
        found.add(node)
        node = source(node)
    return found
