"""What follows a normalisation: casts, a weight, a bias, casts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from aiter_inductor.core.dtypes import accumulate_dtype, promoted
from aiter_inductor.core.graph import (
    TRANSPARENT,
    commuted,
    dtype,
    kind,
    number,
    only_user,
    size,
    sizes,
    source,
    widens,
)
from aiter_inductor.core.match import Derived

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Vector = fx.Node | Derived


@dataclass
class Tail:
    """The nodes between a normalised value and the end of the norm.

    Attributes:
        end: the node that holds the norm's result.
        weight: [N] as stored, or None.
        offset: what the program adds to the weight.
        bias: [N], or None.
        rounded: the half dtype the value had when the weight was applied, or None.
        interior: every node walked over, the vectors' own casts included.
    """

    end: fx.Node
    weight: Vector | None = None
    offset: float = 0.0
    bias: Vector | None = None
    rounded: torch.dtype | None = None
    interior: set[fx.Node] = field(default_factory=set)


def walk_tail(y: fx.Node, x: fx.Node, *, with_bias: bool = False, as_stored: bool = True) -> Tail:
    """Follow `y` through casts and at most one weight and one bias as long as x's rows.

    Never past a point where values of the result's precision would be lost: a cast that widens
    what was rounded before belongs to whoever reads the norm.

    Args:
        y: the normalised rows.
        x: the rows before.
        with_bias: whether an addition belongs to the norm too; offsets of the weight do not.
        as_stored: whether rows may be rounded to x's dtype before the weight.
    """
    tail = Tail(y, interior={y})
    narrow = _half(y)
    while (user := only_user(tail.end)) is not None:
        if _is_float_cast(user):
            if narrow is not None and dtype(user) != narrow:
                break
            narrow = _half(user)
        elif tail.weight is None and tail.bias is None and (found := _product(user, tail.end, x)):
            operand, mul_dtype = found
            read = _weight(operand, x, narrow, mul_dtype, offsets=not with_bias)
            if read is None or not (narrow is None or (as_stored and narrow == dtype(x))):
                break
            tail.weight, tail.offset, nodes = read
            tail.rounded = narrow
            tail.interior |= nodes
            narrow = _half(user)
        elif with_bias and tail.bias is None and (bias := _sum(user, tail.end, x)):
            if narrow is not None and not as_stored:
                break
            tail.bias, nodes = bias
            tail.interior |= nodes
            narrow = _half(user)
        else:
            break
        tail.end = user
        tail.interior.add(user)
    _trim(tail, y)
    return tail


def strip_widening(node: fx.Node) -> fx.Node:
    """`node` before casts that lose nothing (bf16 → fp32) and copies."""
    while True:
        if kind(node) in TRANSPARENT or (kind(node) == "cast" and widens(node)):
            node = source(node)
        else:
            return node


def widenings(node: fx.Node) -> set[fx.Node]:
    """The nodes that `strip_widening` removes."""
    return _between(node, strip_widening(node))


def _trim(tail: Tail, y: fx.Node) -> None:
    """Leave casts at the end that change nothing to the reader, who looks through them."""
    while tail.end is not y and kind(tail.end) == "cast" and _changes_nothing(tail.end):
        tail.interior.remove(tail.end)
        tail.end = source(tail.end)


def _changes_nothing(cast: fx.Node) -> bool:
    return dtype(cast) == dtype(source(cast))


def _is_float_cast(node: fx.Node) -> bool:
    return kind(node) == "cast" and dtype(node) in _FLOATS


def _half(node: fx.Node) -> torch.dtype | None:
    """The dtype of `node` if it holds fewer than 32 bits an element."""
    found = dtype(node)
    return found if found is not None and found.itemsize < 4 else None


def _product(user: fx.Node, end: fx.Node, x: fx.Node) -> tuple[fx.Node, torch.dtype | None] | None:
    for left, right in commuted(user, "mul"):
        if left is end and isinstance(right, fx.Node) and _is_row_vector(right, x):
            return right, dtype(user)
    return None


def _sum(user: fx.Node, end: fx.Node, x: fx.Node) -> tuple[Vector, set[fx.Node]] | None:
    for left, right in commuted(user, "add"):
        if left is end and isinstance(right, fx.Node) and _is_row_vector(right, x):
            plain = strip_widening(right)
            return _as_vector(plain), _between(right, plain)
    return None


def _weight(
    operand: fx.Node,
    x: fx.Node,
    rounded: torch.dtype | None,
    product: torch.dtype | None,
    *,
    offsets: bool,
) -> tuple[Vector, float, set[fx.Node]] | None:
    """`(weight, offset, nodes)` such that the op's arithmetic on them is the program's.

    Rows that are rounded first multiply the weight in the promoted dtype of both, so the weight
    has to come in the dtype it is used in; other rows multiply it in the accumulation dtype.
    """
    plain = operand if rounded else strip_widening(operand)
    if rounded and product != promoted(rounded, dtype(plain) or rounded):
        return None
    inside = _between(operand, plain)
    for term, constant in commuted(plain, "add") if offsets else ():
        added = number(constant)
        if added is None or not isinstance(term, fx.Node):
            continue
        inner = term if rounded else strip_widening(term)
        exact = dtype(inner) if rounded else accumulate_dtype(dtype(x) or torch.float32)
        if _is_row_vector(inner, x) and dtype(plain) == exact:
            return _as_vector(inner), added, {*inside, plain, *_between(term, inner)}
    return _as_vector(plain), 0.0, inside


def _is_row_vector(node: fx.Node, x: fx.Node) -> bool:
    """Whether `node` is [N] or [1, ..., 1, N] for rows x of N elements."""
    found, rows = sizes(node), sizes(x)
    if not found or rows is None or len(found) > len(rows) or found[-1] != rows[-1]:
        return False
    return all(n == 1 for n in found[:-1])


def _as_vector(node: fx.Node) -> Vector:
    """`node` as [N], without the views that made it [1, ..., 1, N]."""
    while len(sizes(node) or ()) > 1 and kind(node) in ("reshape", "unsqueeze"):
        before = sizes(source(node)) or ()
        if not before or size(source(node), -1) != size(node, -1):
            break
        node = source(node)
    return node if len(sizes(node) or ()) == 1 else Derived(torch.flatten, (node,))


def _between(node: fx.Node, until: fx.Node) -> set[fx.Node]:
    """The nodes from `node` back to `until`, without it."""
    found = set()
    while node is not until:
        found.add(node)
        node = source(node)
    return found
