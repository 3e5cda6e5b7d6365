"""The largest magnitude of some elements, in its spellings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    arg,
    commuted,
    is_last_dim,
    kind,
    ndim,
    number,
    source,
    value,
)
from aiter_inductor.patterns.raising.tail import strip_widening, widenings


@dataclass(frozen=True)
class Amax:
    """A node that holds max(|x|).

    Attributes:
        node: the reduction's result.
        x: the tensor whose magnitudes are taken, before casts that lose nothing.
        whole: over all elements; else over the last dimension.
        interior: from `node` back to, and without, `x`.
    """

    node: fx.Node
    x: fx.Node
    whole: bool
    interior: frozenset[fx.Node]


@dataclass(frozen=True)
class _Extreme:
    """A maximum or minimum over some dimensions, of x as it is or of its magnitudes."""

    which: str
    x: fx.Node
    dim: Any
    interior: frozenset[fx.Node]


def find_amax(node: fx.Node) -> Amax | str | None:
    """`node` as max(|x|): a sentence if over dimensions no kernel reduces, None if it is not."""
    found = _amax(node)
    if found is None:
        return None
    if is_last_dim(found.dim, found.x):
        whole = False
    elif _is_everything(found.dim, ndim(found.x)):
        whole = True
    else:
        return f"the largest magnitude is over dimensions {found.dim}, not the last or all"
    inside = found.interior | widenings(found.x)
    return Amax(node, strip_widening(found.x), whole, inside)


def _amax(node: fx.Node) -> _Extreme | None:
    if kind(node) == "vector_norm":
        order = number(arg(node, "p", arg(node, "ord")))
        x = source(node)
        if order == math.inf and isinstance(x, fx.Node):
            return _Extreme("max", x, arg(node, "dim"), frozenset({node}))
        return None
    if found := _of_two_ends(node):
        return found
    extreme = _extreme(node)
    if extreme is None or extreme.which != "max":
        return None
    magnitudes = strip_widening(extreme.x)
    if kind(magnitudes) != "abs":
        return None
    inside = {*extreme.interior, *widenings(extreme.x), magnitudes}
    return _Extreme("max", source(magnitudes), extreme.dim, frozenset(inside))


def _of_two_ends(node: fx.Node) -> _Extreme | None:
    """`max(x.amax(), -x.amin())`, which is max(|x|)."""
    for left, right in _pairs(node):
        upper, above, _ = _without(left, "abs")
        lower, below, mirrored = _without(right, "abs", "neg")
        top, bottom = _extreme(upper), _extreme(lower)
        if not mirrored or top is None or bottom is None:
            continue
        if (top.which, bottom.which) != ("max", "min"):
            continue
        if strip_widening(top.x) is strip_widening(bottom.x) and top.dim == bottom.dim:
            inside = {node, *above, *below, *top.interior, *bottom.interior}
            return _Extreme("max", top.x, top.dim, frozenset(inside))
    return None


def _pairs(node: fx.Node) -> Iterable[tuple[Any, Any]]:
    if kind(node) == "max":
        left, right = source(node), node.kwargs.get("other", arg(node, "dim"))
        return ((left, right), (right, left)) if isinstance(right, fx.Node) else ()
    return commuted(node, "maximum")


def _without(node: Any, *through: str) -> tuple[Any, set[fx.Node], bool]:
    """`(inner, nodes, whether any was of a kind in through)`, casts that lose nothing aside."""
    inside: set[fx.Node] = set()
    passed = False
    while isinstance(node, fx.Node):
        inner = strip_widening(node)
        inside |= widenings(node)
        if kind(inner) not in through:
            return inner, inside, passed
        inside.add(inner)
        passed = True
        node = source(inner)
    return node, inside, passed


def _extreme(node: Any) -> _Extreme | None:
    """`x.amax(dim)`, `x.max(dim).values`, `x.max()`, `aminmax(x)` and their mirror images."""
    if not isinstance(node, fx.Node):
        return None
    reduced, index = node, None
    if kind(node) == "getitem" and isinstance(source(node), fx.Node):
        reduced, index = source(node), arg(node, "index")
        if isinstance(value(reduced), torch.Tensor):
            return None
    which = {"amax": "max", "max": "max", "amin": "min"}.get(kind(reduced) or "")
    if kind(reduced) == "aminmax":
        which = {0: "min", 1: "max"}.get(index) if isinstance(index, int) else None
    elif index not in (None, 0) or isinstance(arg(reduced, "dim"), fx.Node):
        return None
    x = source(reduced) if which else None
    if which is None or not isinstance(x, fx.Node) or "other" in reduced.kwargs:
        return None
    return _Extreme(which, x, arg(reduced, "dim"), frozenset({node, reduced}))


def _is_everything(dim: Any, rank: int) -> bool:
    if dim is None:
        return True
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return False
    return not dims or {d % rank for d in dims} == set(range(rank))
