"""`x / sqrt(statistic + eps)`, the middle that RMSNorm and LayerNorm share, in its spellings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from aiter_inductor.core.graph import (
    TRANSPARENT,
    arg,
    commuted,
    kind,
    number,
    operands,
    size,
    sizes,
    source,
)
from aiter_inductor.patterns.raising.gemm_axes import is_view
from aiter_inductor.patterns.raising.tail import strip_widening, widenings

ROOTS = ("rsqrt", "sqrt", "pow")


def divides(root: fx.Node) -> bool | None:
    """True if x is to be divided by `root`, False if multiplied, None if it is no square root."""
    exponents = {"rsqrt": -0.5, "sqrt": 0.5}
    exponent = exponents.get(kind(root) or "") or number(arg(root, "exponent"))
    return {0.5: True, -0.5: False}.get(exponent) if exponent is not None else None


def radicands(root: fx.Node) -> Iterator[tuple[fx.Node, Any, set[fx.Node]]]:
    """Every reading of `root`'s operand as `(statistic, eps, nodes)`; eps is 0.0 if none is added.

    A statistic may carry the dimension it lost in its reduction back on at any point; `applied`
    checks the shape where it matters.
    """
    total, inside = _plain(source(root))
    if kind(total) != "add":
        if isinstance(total, fx.Node):
            yield total, 0.0, inside
        return
    for term, eps in commuted(total, "add"):
        statistic, between = _plain(term)
        if isinstance(statistic, fx.Node):
            yield statistic, eps, {total, *inside, *between}


def applied(
    root: fx.Node, is_numerator: Callable[[fx.Node], bool]
) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    """`(y, numerator, nodes)` for the user that divides a numerator by the root, however written.

    Args:
        root: a node for which `divides` is not None.
        is_numerator: whether a node, before any widening casts, is what is being normalised.
    """
    return _applied(root, bool(divides(root)), is_numerator)


def _applied(
    factor: fx.Node, dividing: bool, is_numerator: Callable[[fx.Node], bool]
) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    for user in factor.users:
        if _passes(user):
            found = _applied(user, dividing, is_numerator)
        elif dividing and _inverts(user, factor):
            found = _applied(user, False, is_numerator)
        else:
            found = _product(user, factor, dividing, is_numerator)
        if found:
            return found[0], found[1], {factor, *found[2]}
    return None


def _product(
    user: fx.Node, factor: fx.Node, dividing: bool, is_numerator: Callable[[fx.Node], bool]
) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    pairs = iter([operands(user, "div") or (None, None)]) if dividing else commuted(user, "mul")
    for numerator, other in pairs:
        if other is not factor or not isinstance(numerator, fx.Node):
            continue
        plain = strip_widening(numerator)
        rows = sizes(plain)
        if is_numerator(plain) and rows and sizes(factor) == (*rows[:-1], 1):
            return user, plain, {user, *widenings(numerator)}
    return None


def _inverts(user: fx.Node, factor: fx.Node) -> bool:
    if kind(user) == "reciprocal":
        return True
    if kind(user) == "pow":
        return number(arg(user, "exponent")) == -1
    pair = operands(user, "div")
    return pair is not None and pair[1] is factor and number(pair[0]) == 1


def _passes(node: fx.Node) -> bool:
    """Whether `node` holds its source's values: a cast, a copy, a restored dimension."""
    return kind(node) == "cast" or kind(node) in TRANSPARENT or restores_last_dim(node)


def restores_last_dim(node: object) -> bool:
    """Whether `node` is its source with a last dimension of 1 appended, however spelled."""
    if kind(node) not in ("unsqueeze", "getitem", "reshape") or not is_view(node):
        return False  # an index of numbers gathers, whatever its shape
    before, after = sizes(source(node)), sizes(node)
    return before is not None and after == (*before, 1) and size(node, -1) == 1


def _plain(node: Any) -> tuple[Any, set[fx.Node]]:
    """`node` before widening casts and restored dimensions, and those."""
    inside: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        if (plain := strip_widening(node)) is not node:
            inside |= widenings(node)
            node = plain
        elif restores_last_dim(node):
            inside.add(node)
            node = source(node)
        else:
            break
    return node, inside
