"""GELU written out by hand, recognised by its values.

`0.5 * x * (1 + tanh(√(2/π) * (x + 0.044715 * x**3)))` has dozens of spellings and one graph of
values. The expression around a tanh or an erf is evaluated at a few points and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    arg,
    kind,
    number,
    only_user,
    same_sizes,
    source,
    value,
    widens,
)

_POINTS = (-4.5, -2.9, -1.7, -0.9, -0.3, 0.0, 0.1, 0.7, 1.3, 2.2, 3.6)
_TOLERANCE = 1e-4
"""Programs round √(2/π) to as few as 4 digits; the two GELUs differ by 4.7e-4 at their most."""

_STEPS = 10


@dataclass(frozen=True)
class Spelled:
    """An expression that was found to be a GELU, or the nearest to one.

    Attributes:
        x: what it is a function of.
        end: the node that holds it.
        activation: `gelu` or `gelu_tanh`; None if it is neither.
        reason: where it differs, if it is neither.
        interior: every node it is made of.
    """

    x: fx.Node
    end: fx.Node
    activation: str | None
    reason: str
    interior: frozenset[fx.Node]


def spelled_gelu(root: fx.Node) -> Spelled | None:
    """The GELU around `root`, a tanh or an erf; None where it is not of one tensor alone."""
    activation = "gelu" if kind(root) == "erf" else "gelu_tanh"
    nearest: Spelled | None = None
    for end in _ends(root):
        for x in _inputs(root):
            if not same_sizes(x, end):
                continue
            interior: set[fx.Node] = set()
            reason = _difference(end, x, activation, interior)
            if reason is None:
                constants = {node for node in interior if _is_symbolic(node)}
                for node in constants:
                    number(node)  # specialises the graph on what was compared
                interior -= constants
                return Spelled(x, end, activation, "", frozenset(interior))
            if reason:
                nearest = Spelled(x, end, None, reason, frozenset(interior))
    return nearest


def exact(x: float, activation: str) -> float:
    """GELU of one number: by erf, or in its tanh form."""
    if activation == "gelu":
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _ends(root: fx.Node) -> Iterator[fx.Node]:
    """What may hold the whole expression: `root` and what is made of it alone, in order."""
    end: fx.Node | None = root
    for _ in range(_STEPS):
        end = only_user(end) if end is not None else None
        if end is None or kind(end) not in _FUNCTIONS:
            return
        yield end


def _inputs(root: fx.Node) -> list[fx.Node]:
    """The tensors that `root`'s operand is made of, nearest first."""
    found: dict[fx.Node, None] = {}
    pending = [source(root)]
    while pending and len(found) < _STEPS:
        node = pending.pop(0)
        if isinstance(node, fx.Node):
            found[node] = None
            if kind(node) in _FUNCTIONS:
                pending += _operands(node)
    return list(found)


def _difference(end: fx.Node, x: fx.Node, activation: str, interior: set[fx.Node]) -> str | None:
    """Where `end` as a function of `x` leaves GELU; empty if it is not a function of `x` alone."""
    for point in _POINTS:
        found = _at(end, x, point, interior)
        if found is None:
            return ""
        wanted = exact(point, activation)
        if abs(found - wanted) > _TOLERANCE:
            return f"{end.name} is {found:.4f} at {point}, where {activation} is {wanted:.4f}"
    return None


def _at(node: Any, x: fx.Node, point: float, interior: set[fx.Node]) -> float | None:
    if node is x:
        return point
    if isinstance(node, int | float) and not isinstance(node, bool):
        return float(node)
    found = kind(node)
    if _is_symbolic(node):
        interior.add(node)
        return _finite(float, [value(node).node.hint])
    if found not in _FUNCTIONS or (found == "cast" and not widens(node)):
        return None
    values = [_at(operand, x, point, interior) for operand in _operands(node)]
    if None in values:
        return None
    interior.add(node)
    return _finite(_FUNCTIONS[found], [v for v in values if v is not None])


def _is_symbolic(node: Any) -> bool:
    """Whether `node` is a float that `dynamic=True` left open; its hint can be read unguarded."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.SymFloat)


def _finite(function: Callable[..., float], values: list[float]) -> float | None:
    try:
        return function(*values)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError):
        return None


def _operands(node: fx.Node) -> list[Any]:
    second = "exponent" if kind(node) == "pow" else "other"
    found = [source(node), arg(node, second)]
    return found if kind(node) in _BINARY else found[:1]


_BINARY: dict[str | None, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
}
_FUNCTIONS: dict[str | None, Callable[..., float]] = {
    **_BINARY,
    "neg": lambda a: -a,
    "square": lambda a: a * a,
    "tanh": math.tanh,
    "erf": math.erf,
    "cast": lambda a: a,
}
