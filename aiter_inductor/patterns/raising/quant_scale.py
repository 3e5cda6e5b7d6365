"""A quantisation's scale as a formula: `factor * max(amax, amax_min)` or its inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.graph import (
    RESHAPES,
    TRANSPARENT,
    arg,
    commuted,
    dtype,
    is_last_dim,
    kind,
    number,
    operands,
    source,
)
from aiter_inductor.patterns.raising.quant_amax import Amax, find_amax

_VIEWS = RESHAPES | {"expand", "expand_as"}
_ROUNDING = frozenset({"div", "mul", "add", "reciprocal", "pow", "cast"})
_SEARCH_DEPTH = 5
"""Steps behind an unknown node in which a largest magnitude makes it a near miss."""


@dataclass(frozen=True)
class Scale:
    """A node that holds `factor * max(amax, amax_min) ** power`, power 1 or -1.

    Attributes:
        amax: the largest magnitude it comes from.
        factor, power, amax_min: see above.
        repeats: how often each value is repeated along the last dimension.
        chain: the nodes from the scale back to the largest magnitude, both included.
    """

    amax: Amax
    factor: float = 1.0
    power: int = 1
    amax_min: float = 0.0
    repeats: int = 1
    chain: tuple[fx.Node, ...] = ()

    def formula(self) -> str:
        """`amax / 448` or `448 / amax`."""
        return f"amax / {1 / self.factor:.7g}" if self.power > 0 else f"{self.factor:.7g} / amax"


def read_scale(node: Any) -> Scale | str | None:
    """`node` as a scale: a sentence if no kernel computes its formula, None if it is no scale."""
    if not isinstance(node, fx.Node):
        return None
    amax = find_amax(node)
    if amax is not None:
        return amax if isinstance(amax, str) else Scale(amax, chain=(node,))
    if (name := kind(node)) in _ARITHMETIC:
        for inner, change in _ARITHMETIC[name](node):
            found = read_scale(inner)
            if isinstance(found, Scale):
                found = _narrowed(node) or change(found)
            if isinstance(found, Scale):
                return replace(found, chain=(node, *found.chain))
            if found is not None:
                return found
        return None
    if _is_view(node):
        found = read_scale(source(node))
        return replace(found, chain=(node, *found.chain)) if isinstance(found, Scale) else found
    if _reaches_amax(node, _SEARCH_DEPTH):
        shown = getattr(node.target, "__name__", str(node.target))
        return f"the scale passes through {shown}, which no kernel computes"
    return None


def _is_view(node: fx.Node) -> bool:
    """Whether `node` holds the values of its source, in their order."""
    name = kind(node)
    if name == "getitem":
        index = arg(node, "index")
        parts = index if isinstance(index, tuple) else (index,)
        return all(p is None or p is Ellipsis or p == slice(None) for p in parts)
    return name in _VIEWS or name in TRANSPARENT


def _narrowed(node: fx.Node) -> str | None:
    """Why the arithmetic of `node` is not the kernel's, if it is in half precision."""
    found = dtype(node)
    if found is None or found.itemsize >= 4 or kind(node) not in _ROUNDING:
        return None
    if kind(node) == "cast" and dtype(source(node)) == found:
        return None
    return f"the scale is computed in {short_name(found)}; kernels compute it in float32"


Change = Callable[[Scale], "Scale | str"]
"""What one step makes of the formula of what it is applied to; a sentence if no kernel does it."""
Readings = Iterable[tuple[Any, Change]]


def _scaled(factor: float) -> Change:
    return lambda s: replace(s, factor=s.factor * factor)


def _inverted(factor: float) -> Change:
    return lambda s: replace(s, factor=factor / s.factor, power=-s.power)


def _bounded(node: fx.Node, low: Any, high: Any) -> Change:
    """What a clamp to [low, high] makes: a lower bound of amax, or nothing a kernel has."""

    def change(s: Scale) -> Scale | str:
        least, most = (None if b is None else _stored(node, b) for b in (low, high))
        which = "scale" if s.power > 0 else "inverse scale"
        if (low is not None and least is None) or (high is not None and most is None):
            return f"the {which} is clamped by a tensor, not by a number known when compiling"
        if s.power < 0:
            least, most = most, least
        if most is not None:
            return f"the {which} is clamped to keep amax below {_bound(s, most):.7g}"
        bound = 0.0 if least is None else _bound(s, least)
        return replace(s, amax_min=max(s.amax_min, bound))

    return change


def _bound(s: Scale, at: float) -> float:
    """The amax at which the scale's value is `at`."""
    if s.power > 0:
        return at / s.factor
    return s.factor / at if at else float("inf")


def _stored(node: fx.Node, bound: Any) -> float | None:
    """A bound as the program's dtype holds it: 1e-12 is 0 in float16."""
    found, held = number(bound), dtype(node)
    if found is None or held is None or held.itemsize >= 4:
        return found
    return float(torch.tensor(found).to(held))


def _of_division(node: fx.Node) -> Readings:
    left, right = operands(node, "div") or (None, None)
    if (by := number(right)) is not None and by != 0:
        yield left, _scaled(1 / by)
    elif (over := number(left)) is not None:
        yield right, _inverted(over)


def _of_product(node: fx.Node) -> Readings:
    for inner, factor in commuted(node, "mul"):
        if (by := number(factor)) is not None and by != 0:
            yield inner, _scaled(by)


def _of_sum(node: fx.Node) -> Readings:
    for inner, added in commuted(node, "add"):
        if (by := number(added)) is not None:
            yield (
                inner,
                lambda s: f"{by:g} is added to the scale; kernels take a lower bound of amax",
            )


def _of_maximum(node: fx.Node) -> Readings:
    for inner, bound in commuted(node, "maximum"):
        if number(bound) is not None:
            yield inner, _bounded(node, bound, None)


def _of_minimum(node: fx.Node) -> Readings:
    for inner, bound in commuted(node, "minimum"):
        if number(bound) is not None:
            yield inner, _bounded(node, None, bound)


def _of_clamp(node: fx.Node) -> Readings:
    yield source(node), _bounded(node, arg(node, "min"), arg(node, "max"))


def _of_repeat(node: fx.Node) -> Readings:
    times = arg(node, "repeats")
    if isinstance(times, int) and is_last_dim(arg(node, "dim"), node):
        yield source(node), lambda s: replace(s, repeats=s.repeats * times)


def _of_power(node: fx.Node) -> Readings:
    if number(arg(node, "exponent")) == -1:
        yield source(node), _inverted(1.0)


def _of_cast(node: fx.Node) -> Readings:
    yield source(node), lambda s: s


_ARITHMETIC: Mapping[str | None, Callable[[fx.Node], Readings]] = {
    "div": _of_division,
    "mul": _of_product,
    "add": _of_sum,
    "reciprocal": lambda node: [(source(node), _inverted(1.0))],
    "pow": _of_power,
    "clamp": _of_clamp,
    "clamp_min": _of_clamp,
    "clamp_max": _of_clamp,
    "maximum": _of_maximum,
    "minimum": _of_minimum,
    "repeat_interleave": _of_repeat,
    "cast": _of_cast,
}
"""Per kind, the readings of a node as `(inner scale, change of its formula)`."""


def _reaches_amax(node: fx.Node, depth: int) -> bool:
    """Whether something of the size of a scale leads back to a largest magnitude."""
    if isinstance(find_amax(node), Amax):
        return True
    return depth > 0 and any(_reaches_amax(n, depth - 1) for n in node.all_input_nodes)
