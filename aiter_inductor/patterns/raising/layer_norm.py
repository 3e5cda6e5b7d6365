"""LayerNorm over the last dimension: `F.layer_norm`, and the formula written out.

`y = (x - mean) * rsqrt(var + eps)`, then an optional weight and bias. The op computes in float32
and rounds once at the end, so a program that rounds y before its weight keeps weight and bias.
"""

from __future__ import annotations

from typing import Any

from torch import fx

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
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.lowerings.norm import layer_norm
from aiter_inductor.patterns.raising.rms_norm import not_one_dimension, squared_mean
from aiter_inductor.patterns.raising.root import (
    ROOTS,
    applied,
    divides,
    radicands,
    restores_last_dim,
)
from aiter_inductor.patterns.raising.tail import strip_widening, walk_tail, widenings

PATTERN = "layer_norm"


@recogniser(PATTERN, "layer_norm")
def functional_layer_norm(node: fx.Node) -> Match | Miss | None:
    """`F.layer_norm(x, [N], weight, bias, eps)`, whose result is float32 under autocast."""
    x = source(node)
    if dtype(x) is None:
        return None
    if reason := not_one_dimension(arg(node, "normalized_shape")):
        return Miss(PATTERN, node, reason)
    epsilon = number(arg(node, "eps", 1e-5))
    if epsilon is None:
        return Miss(PATTERN, node, f"eps is {arg(node, 'eps')}, not known when compiling")
    kwargs = {"out_dtype": dtype(node)} if dtype(node) != dtype(x) else {}
    args = (x, arg(node, "weight"), arg(node, "bias"), epsilon)
    return Match(PATTERN, layer_norm, args, kwargs, (Output(node),), frozenset({node}))


@recogniser(PATTERN, *ROOTS)
def spelled_layer_norm(node: fx.Node) -> Match | Miss | None:
    """`(x - mean) * rsqrt(var + eps) [* weight] [+ bias]` in any order and spelling."""
    if divides(node) is None:
        return None
    for statistic, eps, inside in radicands(node):
        found = _variance(statistic)
        if isinstance(found, str):
            return Miss(PATTERN, node, found)
        if found is None:
            continue
        epsilon = number(eps)
        if epsilon is None:
            return Miss(PATTERN, node, f"eps is {eps}, not known when compiling")
        x, between = found
        return _normalised(node, x, epsilon, {*inside, *between})
    return None


@recogniser(PATTERN, "std")
def deviation_layer_norm(node: fx.Node) -> Match | Miss | None:
    """`(x - mean) / (std + eps)`: a near miss."""
    if not is_last_dim(arg(node, "dim"), source(node)):
        return None
    return Miss(PATTERN, node, "x is divided by its standard deviation, with no eps under the root")


def _normalised(
    root: fx.Node, x: fx.Node, epsilon: float, inside: set[fx.Node]
) -> Match | Miss | None:
    applied_to = applied(root, lambda numerator: _centred(numerator, x) is not None)
    if applied_to is None:
        reason = f"{x.name} minus its mean, whose variance this is, is scaled by no user of it"
        return Miss(PATTERN, root, reason)
    y, numerator, between = applied_to
    x_dtype, rounds = dtype(x), dtype(y) == dtype(x)
    if x_dtype is None or not x_dtype.is_floating_point:
        return None
    tail = walk_tail(y, x, with_bias=True, as_stored=rounds)
    kwargs = {"out_dtype": dtype(tail.end)} if dtype(tail.end) != x_dtype else {}
    centring = _centred(numerator, x) or set()
    interior = frozenset({root, numerator, *inside, *between, *centring, *tail.interior})
    args = (x, tail.weight, tail.bias, epsilon)
    return Match(PATTERN, layer_norm, args, kwargs, (Output(tail.end),), interior)


def _variance(node: fx.Node) -> tuple[fx.Node, set[fx.Node]] | str | None:
    """`(x, nodes)` if `node` is the variance of x over its last dimension, not Bessel-corrected."""
    reduced = _reduction(node, "var", 0)
    if reduced is not None:
        rows = source(reduced)
        if not is_last_dim(arg(reduced, "dim"), rows):
            return f"the variance is over dimensions {arg(reduced, 'dim')}, not the last"
        if (correction := _correction(reduced)) != 0:
            N = size(rows, -1)
            return f"the variance divides by N - {correction:g} with N={N}, LayerNorm by N"
        return strip_widening(rows), {node, reduced, *widenings(rows)}
    if kind(node) == "sub":
        left, right = operands(node, "sub") or (None, None)
        if kind(left) == "mean" and kind(right) in ("square", "pow", "mul"):
            return "the variance is mean(x²) - mean(x)², which cancels where the kernel does not"
    return _mean_of_centred_squares(node)


def _mean_of_centred_squares(node: fx.Node) -> tuple[fx.Node, set[fx.Node]] | str | None:
    found = squared_mean(node)
    if not isinstance(found, tuple):
        return None
    centred = strip_widening(found[0])
    left, _ = operands(centred, "sub") or (None, None)
    if not isinstance(left, fx.Node):
        return None
    x = strip_widening(left)
    centring = _centred(centred, x)
    return None if centring is None else (x, {*found[1], *widenings(found[0]), *centring})


def _reduction(node: fx.Node, name: str, index: int) -> fx.Node | None:
    """What computes `node`: itself if of kind `name`, or the `var_mean` it is item `index` of.

    An item of anything else is rows taken out of a statistic.
    """
    if kind(node) == name:
        return node
    pair = source(node) if kind(node) == "getitem" and arg(node, "index") == index else None
    return pair if isinstance(pair, fx.Node) and kind(pair) == "var_mean" else None


def _correction(variance: fx.Node) -> float:
    """What `variance` subtracts from N before dividing."""
    given = variance.kwargs.get("correction")
    if given is not None:
        return number(given) or 0.0
    return 0.0 if arg(variance, "unbiased") is False else 1.0


def _centred(node: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """The nodes of `x - mean(x)`, if that is what `node` is, else None."""
    left, right = _subtraction(node)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if strip_widening(left) is not x:
        return None
    inside = {node, *widenings(left), *widenings(right)}
    mean = strip_widening(right)
    while restores_last_dim(mean):
        inside.add(mean)
        mean = source(mean)
    reduced = _reduction(mean, "mean", 1)
    if reduced is None:
        return None
    rows = source(reduced)
    if strip_widening(rows) is not x or not is_last_dim(arg(reduced, "dim"), rows):
        return None
    if size(right, -1) != 1:
        return None
    return {*inside, mean, reduced, *widenings(rows)}


def _subtraction(node: fx.Node) -> tuple[Any, Any]:
    """Operands of `a - b`, also when spelled `a + -b`."""
    if pair := operands(node, "sub"):
        return pair
    for left, right in commuted(node, "add"):
        if kind(right) == "neg":
            return left, source(right)
    return None, None
