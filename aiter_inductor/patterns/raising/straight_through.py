"""`x + (rows - x).detach()`: the numbers of `rows` with the gradient of `x`."""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import commuted, kind, operands, same_sizes, source


def straight_through(node: fx.Node) -> tuple[fx.Node, fx.Node, frozenset[fx.Node]] | None:
    """`(x, rows, nodes)` of the trick by which programs train through a rounding, or None.

    The sum is `rows` again, exactly so where `rows` is x rounded: 0 or within a factor of two.
    """
    for x, moved in commuted(node, "add"):
        if not isinstance(x, fx.Node) or kind(moved) != "detach":
            continue
        pair = operands(source(moved), "sub")
        if pair and pair[1] is x and isinstance(pair[0], fx.Node) and same_sizes(pair[0], x):
            return x, pair[0], frozenset({node, moved, source(moved)})
    return None
