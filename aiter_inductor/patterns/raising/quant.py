"""Quantisation to fp8 and int8, written in plain PyTorch.

`q = cast(clamp(x / scale))`, with a scale that is given or comes from the largest magnitude of a
row, of a group of a row or of everything. Walks back from the cast. What the program does
differently from the kernels, to a constant, is a near miss: a scale that is off by one step gives
numbers that look right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import QUANT_DTYPES, quant_max, short_name
from aiter_inductor.core.graph import (
    commuted,
    dtype,
    dtype_name,
    kind,
    only_user,
    operands,
    size,
    sizes,
    source,
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.core.op import Op
from aiter_inductor.lowerings.quant import quant_per_group, quant_per_tensor, quant_per_token
from aiter_inductor.patterns.raising.gemm_axes import SPREADS
from aiter_inductor.patterns.raising.quant_cast import Rounding, read_rounding
from aiter_inductor.patterns.raising.quant_rows import (
    Adapt,
    adaptation,
    rows_line_up,
    rows_of,
    same_elements,
)
from aiter_inductor.patterns.raising.quant_scale import Scale, read_scale
from aiter_inductor.patterns.raising.quant_static import given_scale
from aiter_inductor.patterns.raising.tail import strip_widening, widenings

_BESIDE_DEPTH = 3
"""Steps from a node of the quotient's scale to one beside it: a bound, a division, a cast."""
_EXPANSIONS = ("expand", "expand_as", "repeat_interleave", "reshape", "flatten")


@dataclass(frozen=True)
class Quotient:
    """`values` divided by (power 1) or multiplied with (power -1) the scale at `factor`."""

    node: fx.Node
    values: fx.Node
    factor: fx.Node
    scale: Scale


@recogniser("quant", "cast")
def spelled_quant(node: fx.Node) -> Match | Miss | None:
    """A cast to fp8 or int8 of rows over their scale."""
    found = dtype(node)
    if found not in (*QUANT_DTYPES, torch.uint8) or found is None:
        return None
    rounding = read_rounding(node)
    if rounding is None:
        return None
    quotient = read_quotient(rounding.quotient)
    if isinstance(quotient, str):
        return Miss(quant_per_token.name, node, quotient)
    if quotient is None:
        return given_scale(node, rounding)
    return _dynamic(node, rounding, quotient)


def read_quotient(node: fx.Node) -> Quotient | str | None:
    """`node` as x over a scale computed here; a sentence if no kernel computes the scale so."""
    reason: str | None = None
    for values, factor in _readings(node):
        if not isinstance(values, fx.Node) or not _may_be_scale(factor, node):
            continue
        scale = read_scale(factor)
        if isinstance(scale, str):
            reason = scale
        elif scale is not None:
            return Quotient(node, values, factor, scale)
    return reason


def _readings(node: fx.Node) -> list[tuple[Any, Any]]:
    if kind(node) == "div":
        pair = operands(node, "div")
        return [pair] if pair else []
    return [(left, right) for left, right in commuted(node, "mul")]


def _may_be_scale(factor: Any, quotient: fx.Node) -> bool:
    return isinstance(factor, fx.Node) and (
        sizes(factor) != sizes(quotient) or kind(factor) in _EXPANSIONS or size(factor, -1) == 1
    )


def _dynamic(cast: fx.Node, rounding: Rounding, quotient: Quotient) -> Match | Miss | None:
    made = granularity(quotient)
    if isinstance(made, Miss):
        return replace(made, node=cast)
    op, x, kwargs = made
    qdtype = dtype(cast)
    if qdtype is None or not (dtype(x) or qdtype).is_floating_point:
        return None
    if reason := rounding.asymmetric(qdtype):
        return Miss(op.name, cast, reason)
    limit = quant_max(qdtype)
    if reason := formula_differs(quotient, rounding, qdtype, limit, short_name(qdtype)):
        return Miss(op.name, cast, reason)
    kwargs["dtype"] = qdtype
    if quotient.scale.amax_min > 0:
        kwargs["amax_min"] = quotient.scale.amax_min
    end, passed = _shaped_back(cast, x)
    shapes = sizes(x) or ()
    adapt = adaptation(shapes, sizes(end) or ())
    inside = {cast, *passed, quotient.node, *rounding.interior, *widenings(quotient.values)}
    scale = scale_output(quotient, limit, inside, _scale_shape(op, shapes, kwargs))
    if adapt is None or isinstance(scale, str):
        shown = scale if isinstance(scale, str) else f"{end.name} is shaped anew"
        return Miss(op.name, cast, shown)
    output, chain = scale
    interior = frozenset({*inside, *chain, *quotient.scale.amax.interior})
    return Match(op.name, op, (x,), kwargs, (Output(end, adapt), output), interior)


def granularity(quotient: Quotient) -> tuple[Op, fx.Node, dict[str, Any]] | Miss:
    """The op of the scale's granularity, its x and its keywords so far."""
    values, scale = strip_widening(quotient.values), quotient.scale
    whole = quant_per_tensor if scale.amax.whole else quant_per_token
    if not same_elements(values, scale.amax.x):
        reason = f"{values.name} is divided by a scale that comes from {scale.amax.x.name}"
        return Miss(whole.name, quotient.node, reason)
    if scale.amax.whole:
        return quant_per_tensor, values, {}
    rows = rows_of(scale.amax.x)
    if isinstance(rows, str):
        return Miss(quant_per_group.name, quotient.node, rows)
    op = quant_per_token if rows.group_size is None else quant_per_group
    if not _lines_up(quotient, values, rows.group_size):
        reason = f"scales of shape {_shown(quotient.factor)} do not line up with {_shown(values)}"
        return Miss(op.name, quotient.node, reason)
    return op, rows.x, {} if rows.group_size is None else {"group_size": rows.group_size}


def _lines_up(quotient: Quotient, values: fx.Node, group_size: int | None) -> bool:
    scale, factor = quotient.scale, quotient.factor
    if scale.repeats > 1:
        spread = sizes(factor) == sizes(values)
        return spread and scale.repeats == (group_size or size(values, -1))
    while kind(factor) in ("expand", "expand_as"):
        factor = factor.all_input_nodes[0]
    return size(values, -1) == size(scale.amax.x, -1) and rows_line_up(factor, values)


def formula_differs(
    quotient: Quotient, rounding: Rounding, qdtype: torch.dtype, limit: float, written: str
) -> str | None:
    """Why a symmetric quantisation is not an op's, or None.

    Args:
        quotient, rounding: what the program does.
        qdtype: what it casts to.
        limit: what the op maps the largest magnitude to.
        written: name of the format that the op writes.
    """
    scale, held = quotient.scale, dtype(quotient.node)
    divides = kind(quotient.node) == "div"
    if scale.power != (1 if divides else -1):
        return f"x is {'divided' if divides else 'multiplied'} by {scale.formula()}"
    if not math.isclose(scale.factor**-scale.power, limit, rel_tol=1e-6):
        wanted = replace(scale, factor=limit**-scale.power).formula()
        return f"the scale is {scale.formula()}, kernels for {written} take {wanted}"
    if held is None or held.itemsize < 4:
        return f"x over its scale is rounded to {dtype_name(quotient.node)} before the cast"
    return rounding.differs(qdtype) or rounding.clips_below(limit)


def _shaped_back(cast: fx.Node, x: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
    """The cast, or the reshape that gives its result x's shape again, and the nodes passed."""
    end, passed = cast, {cast}
    wanted = sizes(x)
    while sizes(end) != wanted and (user := only_user(end)) is not None:
        if kind(user) not in ("reshape", "flatten"):
            break
        end = user
        passed.add(end)
    return (end, passed) if sizes(end) == wanted else (cast, {cast})


def _scale_shape(op: Op, x: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The shape of the op's scale for an x of this shape."""
    if op is quant_per_tensor:
        return ()
    return (*x[:-1], x[-1] // kwargs["group_size"] if op is quant_per_group else 1)


def scale_output(
    quotient: Quotient, limit: float, inside: set[fx.Node], shape: tuple[Any, ...]
) -> tuple[Output | None, list[fx.Node]] | str:
    """`(output, nodes behind it)`: the program's own scale, if anything but the quotient reads it.

    What lies between the scale and the quotient stays the program's, in case that is read too.
    """
    chain = list(quotient.scale.chain)
    found = _read_scale_in(chain, {*chain, *inside}, quotient.scale, limit)
    if found is None or found[1].power < 0:
        found = _read_beside(chain, {*chain, *inside}, quotient.scale, limit) or found
    if found is None:
        return None, chain
    node, scale, behind = found
    adapt = adaptation(shape, sizes(node) or ())
    # Repeated scales are more elements than the op's: no reshape makes them.
    repeated = any(kind(n) in SPREADS and sizes(n) != sizes(source(n)) for n in behind)
    if adapt is None or repeated:
        return f"the scale is shaped {_shown(node)}"
    invert: Adapt = () if scale.power > 0 else ((torch.reciprocal, ()),)
    return Output(node, (*invert, *adapt)), behind


def _read_scale_in(
    chain: list[fx.Node], own: set[fx.Node], wanted: Scale, limit: float
) -> tuple[fx.Node, Scale, list[fx.Node]] | None:
    """The node of the quotient's own chain that holds the scale and is read elsewhere.

    Nearest to the largest magnitude, and the scale rather than its inverse.
    """
    best: tuple[fx.Node, Scale, list[fx.Node]] | None = None
    for at, node in enumerate(chain):
        found = read_scale(node)
        if isinstance(found, Scale) and _equal(found, wanted, limit) and _read(node, own):
            if best is None or found.power > 0 or best[1].power < 0:
                best = node, found, chain[at:]
    return best


def _read_beside(
    chain: list[fx.Node], own: set[fx.Node], wanted: Scale, limit: float
) -> tuple[fx.Node, Scale, list[fx.Node]] | None:
    """A scale computed beside the quotient's own: `amax / 448` where x is times `448 / amax`."""
    front: list[tuple[fx.Node, list[fx.Node]]] = [(node, chain) for node in chain]
    for _ in range(_BESIDE_DEPTH):
        beyond = []
        for node, path in front:
            for user in node.users:
                found = None if user in chain else read_scale(user)
                if not isinstance(found, Scale):
                    continue
                if found.power > 0 and _equal(found, wanted, limit) and _read(user, own):
                    return user, found, [*path, user]
                beyond.append((user, [*path, user]))
        front = beyond
    return None


def _read(node: fx.Node, own: set[fx.Node]) -> bool:
    return any(user not in own for user in node.users)


def _equal(found: Scale, scale: Scale, limit: float) -> bool:
    """Whether both have one amax, and `found` is the whole formula of a dequantising factor."""
    return (
        found.amax.node is scale.amax.node
        and found.repeats == 1
        and math.isclose(found.factor**-found.power, limit, rel_tol=1e-6)
        and math.isclose(found.amax_min, scale.amax_min, rel_tol=1e-6)
    )


def _shown(node: fx.Node) -> str:
    return "[" + ", ".join(map(str, sizes(node) or ())) + "]"
