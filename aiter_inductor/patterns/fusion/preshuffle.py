"""Lay a constant weight out once as the matrix cores read it."""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import sizes
from aiter_inductor.core.inductor import is_frozen
from aiter_inductor.core.match import Derived, Match, Matches, fusion
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_fp8_rowwise
from aiter_inductor.lowerings.gemm_preshuffled import (
    gemm_fp8_blockscale_preshuffled,
    gemm_fp8_rowwise_preshuffled,
)
from aiter_inductor.lowerings.gemm_tiles import TILE, in_tiles

_TILED = {
    gemm_fp8_blockscale: gemm_fp8_blockscale_preshuffled,
    gemm_fp8_rowwise: gemm_fp8_rowwise_preshuffled,
}


@fusion("preshuffle", gemm_fp8_blockscale, gemm_fp8_rowwise)
def preshuffle(product: Match, matches: Matches) -> Match | str | None:
    """The graph gets the rearrangement, which freezing folds into the weight.

    With Inductor's `freezing`, and only then, Dynamo gives parameters and buffers to the graph as
    its own attributes and Inductor computes once, when compiling, what is made of them alone.
    """
    weight = product.argument("weight")
    if not isinstance(weight, fx.Node) or not is_frozen(weight):
        return None
    N, K = sizes(weight) or (0, 0)
    if fixed(N) is None or N % TILE or K % TILE:
        return f"a weight [{N}, {K}] is not made of tiles of {TILE} x {TILE}"
    return Match(
        pattern="",
        op=_TILED[product.op],
        args=(product.args[0], Derived(in_tiles, (weight,)), *product.args[2:]),
        kwargs=product.kwargs,
        outputs=product.outputs,
        interior=product.interior,
        parts=(product,),
        kept=product.kept,
    )
