"""What a program does between dividing by a scale and casting: rounding and clamping."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
    kind,
    number,
    source,
)


@dataclass
class Rounding:
    """The way from a quotient to its cast.

    Attributes:
        quotient: the division or multiplication by a scale.
        low, high: the bounds it is clamped to, infinite without a clamp.
        rounds: whether it is rounded to integers.
        narrowed: a half dtype it is rounded to on the way, or None.
        shift: what is added to it, a zero point, or None.
        interior: the nodes passed, cast and quotient not among them.
    """

    quotient: fx.Node
    low: float = -math.inf
    high: float = math.inf
    rounds: bool = False
    narrowed: torch.dtype | None = None
    shift: str | None = None
    interior: set[fx.Node] = field(default_factory=set)

    @property
    def plain(self) -> bool:
        """Whether nothing was done, so that the cast may have nothing to do with quantisation."""
        return not self.rounds and math.isinf(self.low) and math.isinf(self.high)

    def asymmetric(self, qdtype: torch.dtype) -> str | None:
        """Why it has a zero point, or None."""
        if self.shift is not None:
            return f"asymmetric: the zero point {self.shift} is added, kernels have none"
        if qdtype == torch.uint8:
            return "asymmetric: uint8 has a zero point, kernels write int8 around zero"
        return None

    def differs(self, qdtype: torch.dtype) -> str | None:
        """Why the cast of the clamped quotient is not the op's, or None."""
        if self.narrowed is not None:
            return f"x over its scale is rounded to {short_name(self.narrowed)} before the cast"
        if qdtype == torch.int8 and not self.rounds:
            return "the cast to int8 truncates; kernels round to the nearest integer"
        if qdtype != torch.int8 and self.rounds:
            return (
                f"x over its scale is rounded to integers before the cast to {short_name(qdtype)}"
            )
        return None

    def clips_below(self, limit: float) -> str | None:
        """Why the clamp cuts off what the kernel keeps, or None."""
        if self.high >= limit and self.low <= -limit:
            return None
        return f"the clamp is to {self.bounds()}, kernels keep ±{limit:g}"

    def bounds(self) -> str:
        """`[-448, 448]`."""
        return f"[{self.low:g}, {self.high:g}]"


def read_rounding(cast: fx.Node) -> Rounding | None:
    """Walk back from a cast to a division or multiplication; None if there is none."""
    found = Rounding(cast)
    node: Any = source(cast)
    while isinstance(node, fx.Node):
        name = kind(node)
        if name in ("div", "mul"):
            found.quotient = node
            return found
        if name in ("add", "sub"):
            node = _shifted(node, found)
            continue
        if not _notes(node, name, found):
            return None
        found.interior.add(node)
        node = _inner(node)
    return None


def _notes(node: fx.Node, name: str | None, found: Rounding) -> bool:
    """Take note of one step; False if it is none of a quantisation's."""
    if name in ("clamp", "clamp_min", "clamp_max", "maximum", "minimum"):
        low, high = _bounds(node, name)
        if low is None or high is None:
            return False
        found.low, found.high = max(found.low, low), min(found.high, high)
    elif name == "round":
        if node.kwargs.get("decimals", 0) != 0:
            return False
        found.rounds = True
    elif name == "cast":
        held = dtype(node)
        if held is None or not held.is_floating_point:
            return False
        if held.itemsize < 4:
            found.narrowed = held
    elif name not in RESHAPES and name not in TRANSPARENT:
        return False
    return True


def _bounds(node: fx.Node, name: str) -> tuple[float | None, float | None]:
    """Both bounds of a clamp, infinite where it has none, None where one is no number."""
    given = {
        "clamp": (arg(node, "min"), arg(node, "max")),
        "clamp_min": (arg(node, "min"), None),
        "clamp_max": (None, arg(node, "max")),
    }.get(name)
    if given is None:
        bound = next((b for _, b in commuted(node, name) if number(b) is not None), math.nan)
        given = (bound, None) if name == "maximum" else (None, bound)
    low, high = given
    low = -math.inf if low is None else number(low)
    high = math.inf if high is None else number(high)
    bad = any(b is not None and math.isnan(b) for b in (low, high))
    return (None, None) if bad else (low, high)


def _inner(node: fx.Node) -> Any:
    if kind(node) in ("maximum", "minimum"):
        for inner, bound in commuted(node, kind(node) or ""):
            if number(bound) is not None:
                return inner
    return source(node)


def _shifted(node: fx.Node, found: Rounding) -> Any:
    """The operand of an addition that leads on, with the other noted as zero point."""
    inner, other = source(node), arg(node, "other")
    if not isinstance(inner, fx.Node):
        inner, other = other, inner
    found.shift = f"{getattr(other, 'name', other)}"
    found.interior.add(node)
    return inner
