"""Rotate q and k in one kernel, and normalise their heads on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.graph import arg, kind, module_path, ndim, source
from aiter_inductor.core.match import Derived, Match, Matches, fusion, readers
from aiter_inductor.lowerings.norm import rms_norm
from aiter_inductor.lowerings.rope import qk_norm_rope, rope, rope_qk

_NORM_SETTINGS = ("weight_offset", "round_before_weight")


@fusion("rope_into_pair", rope)
def rope_into_pair(first: Match, matches: Matches) -> Match | str | None:
    """rope(q), rope(k) → rope_qk: one launch, and cos and sin are read once."""
    module = module_path(first.anchor)
    for second in matches.of(rope):
        if second is first or module_path(second.anchor) != module:
            continue
        if _tables(second) == _tables(first) and second.kwargs == first.kwargs:
            break
    else:
        return None
    x = first.argument("x"), second.argument("x")
    if x[0] is x[1]:
        return f"both rotations read {x[0]}"
    return Match(
        pattern="",
        op=rope_qk,
        args=(*x, *_tables(first)),
        kwargs=first.kwargs,
        outputs=(*first.outputs, *second.outputs),
        interior=first.interior | second.interior,
        parts=(first, second),
    )


@fusion("qk_norm_into_rope", rope_qk)
def qk_norm_into_rope(pair: Match, matches: Matches) -> Match | str | None:
    """rms_norm(q), rms_norm(k) → rope_qk: saves a write and a read of q and k."""
    found = [_normalised(pair.argument(name), matches) for name in ("q", "k")]
    if found[0] is None or found[1] is None:
        return None
    (q_norm, q, q_view), (k_norm, k, k_view) = found[0], found[1]
    if q_norm is k_norm:
        return f"q and k are both the heads of {q_norm.anchor.name}"
    for name in ("eps", *_NORM_SETTINGS):
        if q_norm.argument(name) != k_norm.argument(name):
            return (
                f"q is normalised with {name}={q_norm.argument(name)} "
                f"but k with {k_norm.argument(name)}"
            )
    if q_norm.argument("weight") is None or k_norm.argument("weight") is None:
        return "q and k are normalised without a weight"
    if (left_as := q_norm.argument("out_dtype")) is not None:
        return f"the heads leave the norm as {short_name(left_as)}"
    views = {view for view in (q_view, k_view) if view is not None}
    inside = pair.interior | views
    for node in (q_norm.anchor, k_norm.anchor, *views):
        if outside := readers(node, inside):
            return f"{node.name} is read by {outside[0].name} too"
    if pair.argument("transposed"):
        return "the rotation is a backward one"
    rotation = {k: v for k, v in pair.kwargs.items() if k != "transposed"}
    settings = {k: v for k, v in q_norm.kwargs.items() if k in _NORM_SETTINGS}
    weights = q_norm.argument("weight"), k_norm.argument("weight")
    tables = pair.argument("cos"), pair.argument("sin")
    return Match(
        pattern="",
        op=qk_norm_rope,
        args=(q, k, *weights, *tables, q_norm.argument("eps")),
        kwargs={**rotation, **settings},
        outputs=pair.outputs,
        interior=pair.interior | q_norm.interior | k_norm.interior | views,
        parts=(q_norm, k_norm, pair),
    )


def _tables(match: Match) -> tuple[Any, Any]:
    return match.argument("cos"), match.argument("sin")


def _normalised(x: Any, matches: Matches) -> tuple[Match, Any, fx.Node | None] | None:
    """`(norm, its input in x's layout, the transpose between)` if x holds normalised heads."""
    if not isinstance(x, fx.Node):
        return None
    direct = matches.producing(x)
    if direct is not None and direct.op is rms_norm:
        return direct, direct.argument("x"), None
    if kind(x) != "transpose":
        return None
    norm = matches.producing(source(x))
    if norm is None or norm.op is not rms_norm:
        return None
    dims = [d % ndim(x) for d in (arg(x, "dim0"), arg(x, "dim1"))]
    if ndim(x) - 1 in dims:
        return None
    return norm, Derived(torch.transpose, (norm.argument("x"), *dims)), x
