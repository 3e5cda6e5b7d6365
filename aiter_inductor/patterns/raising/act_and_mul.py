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

_CLAMPS = ("clamp", "clamp_min", "clamp_max", "minimum", "maximum")


@dataclass(frozen=True)
class Activated:
    """An activation of one tensor: `y = act(gate)`, computed by `interior`."""

    gate: fx.Node
    y: fx.Node
    activation: str
    interior: frozenset[fx.Node]


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
    for product, plus_one in _products(glu):
        if not same_sizes(plus_one, glu):
            continue
        up = next((t for t, one in commuted(plus_one, "add") if _is_number(one, 1.0)), None)
        limits = _clamped(gate)
        if limits is None and up is None:
            reason = f"{gate.name}·sigmoid({alpha}·{gate.name}) is quick GELU, which no kernel has"
            return Miss(pattern, product, reason)
        if up is None:
            return Miss(
                pattern, product, f"{glu.name} is multiplied by {plus_one.name}, not up + 1"
            )
        bounds = _clamped(up)
        if limits is None or bounds is None:
            return Miss(pattern, product, f"{(up if limits else gate).name} is not clamped")
        (plain_gate, low, high), (plain_up, up_low, up_high) = limits, bounds
        if low is not None or high is None or up_high != high or up_low != -high:
            return Miss(
                pattern,
                product,
                f"gate is clamped to [{low}, {high}] and up to [{up_low}, {up_high}], "
                "not gate to [None, limit] and up to [-limit, limit]",
            )
        if not same_sizes(plain_gate, plain_up):
            reason = f"up is {_shape(plain_up)} but gate is {_shape(plain_gate)}"
            return Miss(pattern, product, reason)
        inside = {*inside, gate, up, plus_one, product}
        return Match(
            pattern,
            act_and_mul,
            (plain_gate, plain_up),
            {"activation": "swiglu", "alpha": alpha, "limit": high},
            (Output(product),),
            frozenset(inside),
        )
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


def _clamped(node: Any) -> tuple[fx.Node, float | None, float | None] | None:
    """`(x, low, high)` if `node` clamps x to numbers."""
    found, x = kind(node), source(node) if kind(node) else None
    if found not in _CLAMPS or not isinstance(x, fx.Node):
        return None
    low, high = (None, None)
    if found in ("clamp", "clamp_min"):
        low = arg(node, "min")
    if found in ("clamp", "clamp_max"):
        high = arg(node, "max")
    if found in ("minimum", "maximum"):
        bound = arg(node, "other")
        low, high = (None, bound) if found == "minimum" else (bound, None)
    numbers = [None if bound is None else number(bound) for bound in (low, high)]
    if any(n is None and b is not None for n, b in zip(numbers, (low, high), strict=True)):
        return None
    return x, numbers[0], numbers[1]


def _is_number(operand: Any, wanted: float) -> bool:
    return isinstance(operand, int | float) and operand == wanted


def _shape(node: fx.Node) -> str:
    return f"{list(sizes(node) or ())}"
