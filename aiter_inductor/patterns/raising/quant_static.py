"""Quantisation with a scale that the program is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import FP8_DTYPES, quant_max, short_name
from aiter_inductor.core.graph import (
    commuted,
    dtype,
    dtype_name,
    kind,
    ndim,
    number,
    operands,
    sizes,
    source,
)
from aiter_inductor.core.match import Derived, Match, Miss, Output
from aiter_inductor.lowerings.quant import quant_static
from aiter_inductor.patterns.raising.quant_cast import Rounding
from aiter_inductor.patterns.raising.quant_rows import adaptation
from aiter_inductor.patterns.raising.tail import strip_widening, widenings

PATTERN = "quant_static"


def given_scale(cast: fx.Node, rounding: Rounding) -> Match | Miss | None:
    """`cast(clamp(x / scale))`, or times its reciprocal, for a scale of one element."""
    qdtype, held = dtype(cast), dtype(rounding.quotient)
    if qdtype is None or held is None or not held.is_floating_point:
        return None
    found = _division(rounding.quotient)
    if found is None or (rounding.plain and qdtype not in FP8_DTYPES):
        return None
    values, scale, shown = found
    if reason := _differs(rounding, qdtype, held, shown):
        return Miss(PATTERN, cast, reason)
    x = strip_widening(values)
    adapt = adaptation(sizes(x) or (), sizes(cast) or ())
    if scale is None or adapt is None:
        return None
    inside = {cast, rounding.quotient, *rounding.interior, *widenings(values)}
    kwargs: dict[str, Any] = {"dtype": qdtype}
    if rounding.low == -quant_max(qdtype) - 1:
        kwargs["qmin"] = rounding.low
    output = (Output(cast, adapt),)
    return Match(PATTERN, quant_static, (x, scale), kwargs, output, frozenset(inside))


def _differs(
    rounding: Rounding, qdtype: torch.dtype, held: torch.dtype, scale: str | None
) -> str | None:
    if reason := rounding.asymmetric(qdtype):
        return reason
    if scale is not None:
        return scale
    if held.itemsize < 4:
        return f"x over its scale is rounded to {short_name(held)} before the cast"
    limit = quant_max(qdtype)
    if reason := rounding.differs(qdtype):
        return reason
    lowest = -128.0 if qdtype == torch.int8 else -limit
    if rounding.low not in (-limit, lowest) or rounding.high != limit:
        return f"the clamp is to {rounding.bounds()}, kernels clamp to [{-limit:g}, {limit:g}]"
    return None


def _division(node: fx.Node) -> tuple[fx.Node, Any, str | None] | None:
    """`(values, scale, why the scale is none a kernel takes)`."""
    divides = kind(node) == "div"
    pairs = [operands(node, "div")] if divides else list(commuted(node, "mul"))
    for pair in pairs:
        values, factor = pair or (None, None)
        if not isinstance(values, fx.Node):
            continue
        if number(factor) is not None:
            return values, None, f"the scale is the number {factor}, kernels read it from a tensor"
        if not isinstance(factor, fx.Node):
            continue
        if all(n == 1 for n in sizes(factor) or ()) and ndim(factor) >= 0:
            scale = factor if divides else _inverse(factor)
            return values, _as_vector(scale), _unreadable(factor)
        if divides or sizes(factor) != sizes(node):
            shape = "[" + ", ".join(map(str, sizes(factor) or ())) + "]"
            return values, None, f"the given scale has shape {shape}, kernels take one element"
    return None


def _inverse(factor: fx.Node) -> Any:
    """The dequantising scale of what x is multiplied by."""
    if kind(factor) == "reciprocal":
        return source(factor)
    over = operands(factor, "div")
    if over is not None and number(over[0]) == 1 and isinstance(over[1], fx.Node):
        return over[1]
    return Derived(torch.reciprocal, (factor,))


def _as_vector(scale: Any) -> Any:
    if isinstance(scale, fx.Node) and ndim(scale) > 1:
        return Derived(torch.flatten, (scale,))
    return scale


def _unreadable(factor: fx.Node) -> str | None:
    if dtype(factor) == torch.float32:
        return None
    return f"the scale is {dtype_name(factor)}, kernels read float32"
