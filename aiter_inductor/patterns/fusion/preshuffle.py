"""Give the matrix cores a weight as they read it: laid out once, or found so in memory."""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import sizes
from aiter_inductor.core.inductor import is_frozen
from aiter_inductor.core.match import Derived, Match, Matches, fusion
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_fp8_rowwise
from aiter_inductor.lowerings.gemm_preshuffled import (
    gemm_fp8_blockscale_preshuffled,
    gemm_fp8_rowwise_preshuffled,
)
from aiter_inductor.lowerings.gemm_tiles import TILE, in_tiles
from aiter_inductor.patterns.raising.gemm_axes import (
    Axes,
    Digit,
    behind,
    is_view,
    merged,
    start,
    through,
)

_TILED = {
    gemm_fp8_blockscale: gemm_fp8_blockscale_preshuffled,
    gemm_fp8_rowwise: gemm_fp8_rowwise_preshuffled,
}


@fusion("preshuffle", gemm_fp8_blockscale, gemm_fp8_rowwise)
def preshuffle(product: Match, matches: Matches) -> Match | str | None:
    """A weight that is stored in tiles is read as it is; one that is constant is laid out so.

    With Inductor's `freezing`, and only then, Dynamo gives parameters and buffers to the graph as
    its own attributes and Inductor computes once, when compiling, what is made of them alone: the
    graph gets the rearrangement, which freezing folds into the weight.
    """
    weight = product.argument("weight")
    if not isinstance(weight, fx.Node):
        return None
    if (stored := stored_tiles(weight)) is not None:
        return _tiled(product, stored)
    if not is_frozen(weight):
        return None
    N, K = sizes(weight) or (0, 0)
    if fixed(N) is None or N % TILE or K % TILE:
        return f"a weight [{N}, {K}] is not made of tiles of {TILE} x {TILE}"
    return _tiled(product, Derived(in_tiles, (weight,)))


def stored_tiles(weight: fx.Node) -> fx.Node | None:
    """The tensor [N / 16, 16 K] that a weight [N, K] is a rearranged view of, if it is of tiles."""
    views = [weight]
    while is_view(views[-1]) and isinstance(before := behind(views[-1]), fx.Node):
        views.append(before)
    found = sizes(weight) or ()
    for stored in views[1:]:
        axes: Axes | None = start(sizes(stored) or ())
        for view in reversed(views[: views.index(stored)]):
            axes = None if axes is None else through(view, axes)
        if axes is not None and [*map(merged, axes.digits)] == _tiles_of(*found):
            return stored
    return None


def _tiles_of(N: Dim, K: Dim) -> list[tuple[Digit, ...]]:
    """Where the rows and the columns of a weight come from: bands, and tiles of rows in them."""
    if fixed(N) is None or fixed(K) is None or N < TILE or K < TILE:
        return []
    bands = (Digit(0, 1, N // TILE),) if N > TILE else ()
    tiles = (Digit(1, TILE * TILE, K // TILE),) if K > TILE else ()
    return [(*bands, Digit(1, TILE, TILE)), (*tiles, Digit(1, 1, TILE))]


def _tiled(product: Match, weight: fx.Node | Derived) -> Match:
    return Match(
        pattern="",
        op=_TILED[product.op],
        args=(product.args[0], weight, *product.args[2:]),
        kwargs=product.kwargs,
        outputs=product.outputs,
        interior=product.interior,
        parts=(product,),
        kept=product.kept,
    )
