"""Gated activations: SwiGLU, GeGLU and GPT-OSS's clamped SwiGLU.

`act(gate) * up` in either order. Where gate and up come from, two projections, halves of one or
its even and odd columns, does not matter here: the op takes any strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from aiter_inductor.core.graph import (
    arg,
    commuted,
    dtype,
    kind,
    ndim,
    number,
    only_user,
    same_sizes,
    sizes,
    source,
    tensor,
    widens,
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.lowerings.activation import act_and_mul
from aiter_inductor.patterns.raising.act_and_mul_gelu import spelled_gelu

_CLAMPS = ("clamp", "clamp_min", "clamp_max", "minimum")


@dataclass(frozen=True)
class Activated:
    """An activation of one tensor: `y = act(gate)`, computed by `interior`."""

    gate: fx.Node
    y: fx.Node
    activation: str
    interior: frozenset[fx.Node]


@dataclass(frozen=True)
class Clamped:
    """A tensor clamped to numbers, None where it is open."""

    x: fx.Node
    low: float | None
    high: float | None


@recogniser("act_and_mul", "silu", "gelu", "sigmoid", "tanh", "erf")
def gated_activation(node: fx.Node) -> Match | Miss | None:
    """`act(gate) * up`, the activation a function or written out."""
    found = _activated(node)
    if found is None or isinstance(found, Miss):
        return found
    found = _with_casts(found)
    pattern = f"{found.activation}_and_mul"
    refused: Miss | None = None
    for product, up in _products(found.y):
        if reason := _not_gated(found, up):
            refused = refused or Miss(pattern, product, reason)
            continue
        return Match(
            pattern,
            act_and_mul,
            (found.gate, up),
            {"activation": found.activation},
            (Output(product),),
            found.interior | {found.y, product},
        )
    return refused


@recogniser("swiglu_and_mul", "sigmoid")
def clamped_swiglu(node: fx.Node) -> Match | Miss | None:
    """`(clamp(up) + 1) * gate * sigmoid(alpha * gate)` of a clamped gate, as GPT-OSS has it."""
    scaled = source(node)
    for gate, factor in commuted(scaled, "mul"):
        for glu, other in _products(node):
            if other is gate and (alpha := number(factor)) is not None:
                return _swiglu(gate, alpha, glu, {scaled, node, glu})
    return None


def _swiglu(gate: fx.Node, alpha: float, glu: fx.Node, inside: set[fx.Node]) -> Match | Miss | None:
    pattern = "swiglu_and_mul"
    refused: Miss | None = None
    for product, plus_one in _products(glu):
        up = next((t for t, one in commuted(plus_one, "add") if _is_number(one, 1.0)), None)
        limits, bounds = _clamped(gate), _clamped(up)
        if limits is not None and bounds is not None:
            reason = _bounds_differ(limits, bounds)
        elif limits is None and up is None:
            reason = f"{gate.name}·sigmoid({alpha}·{gate.name}) is quick GELU, which no kernel has"
        elif up is None:
            reason = f"{glu.name} is multiplied by {plus_one.name}, not up + 1"
        else:
            reason = f"{(gate if limits is None else up).name} is not clamped"
        if reason is not None or limits is None or bounds is None:
            refused = refused or Miss(pattern, product, reason or "")
            continue
        return Match(
            pattern,
            act_and_mul,
            (limits.x, bounds.x),
            {"activation": "swiglu", "alpha": alpha, "limit": limits.high},
            (Output(product),),
            frozenset({*inside, gate, plus_one, product, *(() if up is None else (up,))}),
        )
    return refused


def _bounds_differ(gate: Clamped, up: Clamped) -> str | None:
    """Why two clamps are not those of one limit."""
    if gate.low is not None or gate.high is None or (up.low, up.high) != (-gate.high, gate.high):
        return (
            f"gate is clamped to [{gate.low}, {gate.high}] and up to [{up.low}, {up.high}], "
            "not gate to [None, limit] and up to [-limit, limit]"
        )
    if not same_sizes(gate.x, up.x):
        return f"up is {_shape(up.x)} but gate is {_shape(gate.x)}"
    return None


def _activated(node: fx.Node) -> Activated | Miss | None:
    """What `node` activates, if it is an activation or the heart of one."""
    found, x = kind(node), source(node)
    if not isinstance(x, fx.Node) or ndim(x) < 1:
        return None
    if found == "silu":
        return Activated(x, node, "silu", frozenset({node}))
    if found == "gelu":
        approximate = arg(node, "approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
        return None if name is None else Activated(x, node, name, frozenset({node}))
    if found == "sigmoid":
        y = next((y for y, other in _products(node) if other is x), None)
        return None if y is None else Activated(x, y, "silu", frozenset({node, y}))
    spelled = spelled_gelu(node)
    if spelled is None:
        return None
    if spelled.activation is None:
        gated = any(same_sizes(up, spelled.end) for _, up in _products(spelled.end))
        name = "gelu_and_mul" if found == "erf" else "gelu_tanh_and_mul"
        return Miss(name, spelled.end, spelled.reason) if gated else None
    return Activated(spelled.x, spelled.end, spelled.activation, spelled.interior)


def _with_casts(found: Activated) -> Activated:
    """Take in the casts that the op makes itself.

    Those are `gate.float()` before with `.to(gate.dtype)` behind, and a widening before `up`.
    """
    gate, y = found.gate, only_user(found.y)
    if kind(y) != "cast" or y is None:
        return found
    if widens(y):
        return Activated(gate, y, found.activation, found.interior | {y})
    if kind(gate) == "cast" and widens(gate) and dtype(y) == dtype(source(gate)):
        return Activated(source(gate), y, found.activation, found.interior | {gate, y})
    return found


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """`(product, other factor)` of every multiplication of `node` by another tensor."""
    for user in node.users:
        for left, right in commuted(user, "mul"):
            if left is node and isinstance(right, fx.Node) and tensor(right) is not None:
                yield user, right
                break


def _not_gated(found: Activated, up: fx.Node) -> str | None:
    """Why `up` is not what the activation gates."""
    if up is found.y or up in found.interior:
        return f"{found.y.name} is multiplied by {up.name}, which is made of it"
    if up is found.gate:
        return f"gate and up are both {up.name}"
    if not same_sizes(up, found.gate):
        return f"up is {_shape(up)} but gate is {_shape(found.gate)}"
    return None


def _clamped(node: Any) -> Clamped | None:
    """What `node` clamps and to which numbers, if that is what it does."""
    found = kind(node)
    if found not in _CLAMPS or not isinstance(source(node), fx.Node):
        return None
    low, high = arg(node, "min"), arg(node, "max")
    if found == "minimum":
        high = arg(node, "other")
    bounds = [None if bound is None else number(bound) for bound in (low, high)]
    if any(n is None and b is not None for n, b in zip(bounds, (low, high), strict=True)):
        return None
    return Clamped(source(node), bounds[0], bounds[1])


def _is_number(operand: Any, wanted: float) -> bool:
    return isinstance(operand, int | float) and operand == wanted


def _shape(node: fx.Node) -> str:
    return f"{list(sizes(node) or ())}"
