"""Add a residual where the product is rounded, instead of in a pass of its own."""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import commuted, dtype, dtype_name, only_user, same_sizes
from aiter_inductor.core.match import Match, Matches, Output, fusion
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_fp8_rowwise
from aiter_inductor.lowerings.gemm_residual import gemm_fp8_blockscale_add, gemm_fp8_rowwise_add

_WITH_RESIDUAL = {
    gemm_fp8_blockscale: gemm_fp8_blockscale_add,
    gemm_fp8_rowwise: gemm_fp8_rowwise_add,
}


@fusion("residual_into_gemm", gemm_fp8_blockscale, gemm_fp8_rowwise)
def residual_into_gemm(product: Match, matches: Matches) -> Match | str | None:
    """residual + linear(x): saves a write and a read of [num_rows, N].

    An addition that a norm has taken in is left to it: the norm reads both terms anyway.
    """
    out = product.anchor
    total = only_user(out)
    for term, residual in commuted(total, "add"):
        if term is not out or not isinstance(residual, fx.Node) or residual is out:
            continue
        assert total is not None
        if matches.containing(total) or dtype(residual) is None:
            return None
        if not same_sizes(residual, out):
            return None if dtype(residual) != dtype(out) else f"{residual.name} is broadcast"
        if dtype(residual) != dtype(out):
            return f"{total.name} adds {dtype_name(residual)} to {dtype_name(out)}"
        names = ("x", "weight", "x_scale", "weight_scale", "bias")
        *operands, bias = (product.argument(name) for name in names)
        return Match(
            pattern="",
            op=_WITH_RESIDUAL[product.op],
            args=(*operands, residual, bias),
            kwargs=product.kwargs,
            outputs=(Output(total),),
            interior=product.interior | {total},
            parts=(product,),
            kept=product.kept,
        )
    return None
