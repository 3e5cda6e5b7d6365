"""RMSNorm, in the spellings of transformers, torch and hand-written models.

`y = x * rsqrt(mean(x²) + eps)`, then an optional weight. What differs between models, and becomes
an argument of the op: whether y is rounded to x's dtype before the weight (Llama) or after it
(Gemma, GPT-OSS, F.rms_norm), whether the weight is stored around zero (Gemma: 1 + w), its dtype,
and where eps comes from.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.graph import (
    arg,
    dtype,
    is_last_dim,
    kind,
    number,
    operands,
    size,
    source,
    value,
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.lowerings.norm import rms_norm
from aiter_inductor.patterns.raising.root import ROOTS, applied, divides, radicands
from aiter_inductor.patterns.raising.tail import strip_widening, walk_tail, widenings

PATTERN = "rms_norm"


@recogniser(PATTERN, "rms_norm")
def functional_rms_norm(node: fx.Node) -> Match | Miss | None:
    """`F.rms_norm(x, [N], weight, eps)`."""
    x, weight, eps = source(node), arg(node, "weight"), arg(node, "eps")
    x_dtype = dtype(x)
    if x_dtype is None:
        return None
    if reason := not_one_dimension(arg(node, "normalized_shape")):
        return Miss(PATTERN, node, reason)
    epsilon = torch.finfo(accumulate_dtype(x_dtype)).eps if eps is None else number(eps)
    if epsilon is None:
        return Miss(PATTERN, node, f"eps is {eps}, not a number known when compiling")
    kwargs = {"out_dtype": dtype(node)} if dtype(node) != x_dtype else {}
    return Match(
        PATTERN, rms_norm, (x, weight, epsilon), kwargs, (Output(node),), frozenset({node})
    )


@recogniser(PATTERN, *ROOTS)
def spelled_rms_norm(node: fx.Node) -> Match | Miss | None:
    """`x * rsqrt(x.square().mean(-1, keepdim=True) + eps) [* weight]` in any order and spelling."""
    if divides(node) is None:
        return None
    radicand = _mean_square(node)
    if radicand is None or isinstance(radicand, Miss):
        return radicand
    squared, epsilon, inside = radicand
    x = strip_widening(squared)
    found = applied(node, lambda numerator: numerator is x)
    if found is None:
        verb = "is divided" if divides(node) else "is multiplied"
        return Miss(PATTERN, node, f"{x.name}, whose mean square this is, {verb} by no user of it")
    y, _, between = found
    x_dtype = dtype(x)
    if x_dtype is None or not x_dtype.is_floating_point:
        return None
    tail = walk_tail(y, x)
    kwargs: dict[str, object] = {}
    if tail.offset:
        kwargs["weight_offset"] = tail.offset
    if tail.rounded:
        kwargs["round_before_weight"] = True
    if dtype(tail.end) != x_dtype:
        kwargs["out_dtype"] = dtype(tail.end)
    interior = frozenset({node, *inside, *between, *widenings(squared), *tail.interior})
    return Match(
        PATTERN, rms_norm, (x, tail.weight, epsilon), kwargs, (Output(tail.end),), interior
    )


@recogniser(PATTERN, "normalize", "vector_norm")
def other_rms_norm(node: fx.Node) -> Match | Miss | None:
    """Rows divided by their Euclidean length: near misses, whose eps is not under the root."""
    order = number(arg(node, "p", arg(node, "ord", 2.0)))
    if order != 2 or not is_last_dim(arg(node, "dim", 1), source(node)):
        return None
    if kind(node) == "normalize":
        eps = number(arg(node, "eps", 1e-12))
        reason = f"F.normalize divides by max(norm, {eps:g}), not by sqrt(mean(x²) + eps)"
        return Miss(PATTERN, node, reason)
    reason = "the root mean square comes from a vector norm, so no eps is added under the root"
    return Miss(PATTERN, node, reason)


def not_one_dimension(shape: object) -> str | None:
    """Why a normalized_shape is not one dimension, or None if it is."""
    shape = value(shape)
    if not isinstance(shape, tuple | list):
        return f"normalized_shape is {shape}, not a shape known when compiling"
    if len(shape) != 1:
        return f"normalises over {len(shape)} dimensions {tuple(shape)}, not 1"
    return None


def squared_mean(node: fx.Node) -> tuple[fx.Node, set[fx.Node]] | str | None:
    """`(x, nodes)` if `node` is the mean of x² over the last dimension, as a mean or a sum over N.

    Returns:
        A sentence if it is a mean of squares of another kind, None if it is none.
    """
    inside = {node}
    reduced = node
    if kind(node) in ("div", "mul"):
        found = _scaled_sum(node)
        if found is None:
            return None
        reduced, factor = found
        N = size(source(reduced), -1)
        wanted = N if kind(node) == "div" else 1 / N if isinstance(N, int) else None
        if factor is None or wanted is None or not math.isclose(factor, wanted, rel_tol=1e-9):
            return f"the sum of squares is scaled by {factor}, not divided by N={N}"
        inside.add(reduced)
    elif kind(node) != "mean":
        return None
    squares = strip_widening(source(reduced))
    x = _square_root_of(squares)
    if x is None:
        return None
    if not is_last_dim(arg(reduced, "dim"), squares):
        return f"the mean is over dimensions {arg(reduced, 'dim')}, not the last"
    return x, {*inside, squares, *widenings(source(reduced))}


def _mean_square(root: fx.Node) -> tuple[fx.Node, float, set[fx.Node]] | Miss | None:
    """`(x, eps, nodes)` if `root`'s operand is the mean of x² over the last dimension plus eps."""
    seen = []
    for statistic, eps, inside in radicands(root):
        seen.append(kind(statistic) or str(statistic))
        found = squared_mean(statistic)
        if isinstance(found, str):
            return Miss(PATTERN, root, found)
        if found is None:
            continue
        epsilon = number(eps)
        if epsilon is None:
            return Miss(PATTERN, root, f"eps is {eps}, not a number known when compiling")
        return found[0], epsilon, {*inside, *found[1]}
    if kind(root) == "rsqrt" and seen:
        terms = " + ".join(seen)
        return Miss(PATTERN, root, f"the root is over {terms}, not a mean of squares plus eps")
    return None


def _scaled_sum(node: fx.Node) -> tuple[fx.Node, float | None] | None:
    """`(sum, number)` if `node` is a sum divided by or multiplied with a number."""
    left, right = operands(node, kind(node) or "") or (None, None)
    if kind(left) == "sum" and isinstance(left, fx.Node):
        return left, number(right)
    if kind(node) == "mul" and kind(right) == "sum" and isinstance(right, fx.Node):
        return right, number(left)
    return None


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
