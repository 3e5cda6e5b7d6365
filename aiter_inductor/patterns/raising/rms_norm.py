"""RMSNorm, in the spellings of transformers, torch and hand-written models.

`y = x * rsqrt(mean(x²) + eps)`, then an optional weight. What differs between models, and becomes
an argument of the op: whether y is rounded to x's dtype before the weight (Llama) or after it
(Gemma, GPT-OSS, F.rms_norm), whether the weight is stored around zero (Gemma: 1 + w), its dtype,
and where eps comes from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.graph import (
    arg,
    commuted,
    dtype,
    is_last_dim,
    kind,
    number,
    operands,
    size,
    source,
    strip_casts,
    tensor,
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.lowerings.norm import rms_norm
from aiter_inductor.patterns.raising.tail import strip_widening, walk_scale

PATTERN = "rms_norm"


@recogniser(PATTERN, "rms_norm")
def functional_rms_norm(node: fx.Node) -> Match | Miss | None:
    """`F.rms_norm(x, [N], weight, eps)`."""
    x, weight, eps = source(node), arg(node, "weight"), arg(node, "eps")
    shape = arg(node, "normalized_shape")
    x_dtype = dtype(x)
    if x_dtype is None:
        return None
    if len(shape) != 1:
        return Miss(PATTERN, node, f"normalises over {len(shape)} dimensions {tuple(shape)}, not 1")
    epsilon = torch.finfo(accumulate_dtype(x_dtype)).eps if eps is None else number(eps)
    if epsilon is None:
        return Miss(PATTERN, node, f"eps is {eps}, not a number known when compiling")
    kwargs = {"out_dtype": dtype(node)} if dtype(node) != x_dtype else {}
    return Match(
        PATTERN, rms_norm, (x, weight, epsilon), kwargs, (Output(node),), frozenset({node})
    )


@recogniser(PATTERN, "rsqrt", "sqrt", "pow")
def spelled_rms_norm(node: fx.Node) -> Match | Miss | None:
    """`x * rsqrt(x.square().mean(-1, keepdim=True) + eps) [* weight]` in any order and spelling."""
    if kind(node) == "pow" and number(arg(node, "exponent")) != -0.5:
        return None
    radicand = _mean_square(node)
    if radicand is None or isinstance(radicand, Miss):
        return radicand
    squared, epsilon, inside = radicand
    x = strip_widening(squared)
    scaled = _scaled(node, squared)
    if scaled is None:
        return Miss(PATTERN, node, f"no user multiplies {squared.name} by {node.name}")
    y, between = scaled
    tail = walk_scale(y, x)
    inside |= {node, y, *between, *tail.interior}
    if squared is not x:
        inside.add(squared)
    x_dtype, out = dtype(x), dtype(tail.end)
    if x_dtype is None or tensor(x) is None:
        return None
    if x_dtype.itemsize < 4 and tail.weight is not None and dtype(tail.unscaled) != x_dtype:
        rounds = False
    else:
        rounds = x_dtype.itemsize < 4 and tail.weight is not None
    kwargs: dict[str, object] = {}
    if tail.offset:
        kwargs["weight_offset"] = tail.offset
    if rounds:
        kwargs["round_before_weight"] = True
    if out != x_dtype:
        kwargs["out_dtype"] = out
    return Match(
        PATTERN, rms_norm, (x, tail.weight, epsilon), kwargs, (Output(tail.end),), frozenset(inside)
    )


def _mean_square(root: fx.Node) -> tuple[fx.Node, float, set[fx.Node]] | Miss | None:
    """`(x, eps, nodes)` if `root`'s operand is the mean of x² over the last dimension plus eps."""
    total = source(root)
    if kind(total) != "add":
        found = _squared_mean(total)
        return (found[0], 0.0, found[1]) if isinstance(found, tuple) else None
    reason: Miss | None = None
    for mean, eps in commuted(total, "add"):
        found = _squared_mean(mean)
        if isinstance(found, str):
            reason = Miss(PATTERN, root, found)
        elif found is not None:
            epsilon = number(eps)
            if epsilon is None:
                return Miss(PATTERN, root, f"eps is {eps}, not a number known when compiling")
            return found[0], epsilon, {total, *found[1]}
    if reason is None and kind(root) == "rsqrt":
        terms = ", ".join(str(kind(t) or t) for t in operands(total, "add") or ())
        return Miss(PATTERN, root, f"the root is over {terms}, not a mean of squares plus eps")
    return reason


def _squared_mean(node: object) -> tuple[fx.Node, set[fx.Node]] | str | None:
    """`(x, nodes)` if `node` is mean(x², -1, keepdim=True), written as a mean or a sum over N."""
    if not isinstance(node, fx.Node):
        return None
    inside = {node}
    reduced = node
    if kind(node) in ("div", "mul"):
        pair = operands(node, kind(node) or "")
        if pair is None or not isinstance(pair[0], fx.Node) or kind(pair[0]) != "sum":
            return None
        reduced, factor = pair[0], number(pair[1])
        N = size(source(reduced), -1)
        if factor is None or factor != (N if kind(node) == "div" else 1 / N):
            return f"the sum is scaled by {pair[1]}, not divided by N={N}"
        inside.add(reduced)
    elif kind(node) != "mean":
        return None
    squares = source(reduced)
    x = _square_root_of(squares)
    if x is None:
        return None
    if not is_last_dim(arg(reduced, "dim"), squares):
        return f"the mean is over dimensions {arg(reduced, 'dim')}, not the last"
    if arg(reduced, "keepdim") is not True:
        return "the mean does not keep the reduced dimension"
    return x, {*inside, squares}


def _square_root_of(node: object) -> fx.Node | None:
    """x if `node` is x², else None."""
    if not isinstance(node, fx.Node):
        return None
    found: object = None
    if kind(node) == "square" or (kind(node) == "pow" and number(arg(node, "exponent")) == 2):
        found = source(node)
    elif (pair := operands(node, "mul")) and pair[0] is pair[1]:
        found = pair[0]
    return found if isinstance(found, fx.Node) else None


def _scaled(root: fx.Node, squared: fx.Node) -> tuple[fx.Node, set[fx.Node]] | None:
    """`(y, nodes between)`: the user of `root` that divides `squared` by the root mean square."""
    divides = kind(root) == "sqrt"
    for user in _through_casts(root):
        pairs: Iterator[tuple[object, object]]
        if divides and kind(user) == "reciprocal":
            found = _scaled_by(user, squared)
            if found:
                return found[0], {user, *found[1]}
            continue
        if divides:
            pairs = iter([pair] if (pair := operands(user, "div")) else [])
        else:
            pairs = commuted(user, "mul")
        for numerator, factor in pairs:
            if strip_casts(factor) is root and strip_casts(numerator) is strip_casts(squared):
                return user, _casts(factor, root) | _casts(numerator, squared)
    return None


def _scaled_by(factor: fx.Node, squared: fx.Node) -> tuple[fx.Node, set[fx.Node]] | None:
    for user in factor.users:
        for numerator, other in commuted(user, "mul"):
            if other is factor and strip_casts(numerator) is strip_casts(squared):
                return user, _casts(numerator, squared)
    return None


def _through_casts(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
        if kind(user) == "cast":
            yield from user.users


def _casts(node: object, until: fx.Node) -> set[fx.Node]:
    """The cast nodes from `node` back to `until`."""
    found = set()
    while isinstance(node, fx.Node) and node is not until and kind(node) == "cast":
        found.add(node)
        node = source(node)
    return found


