"""Fold the residual addition into the RMSNorm that reads it."""

from __future__ import annotations

from aiter_inductor.core.graph import dtype, dtype_name, operands, same_sizes
from aiter_inductor.core.match import Match, Matches, Output, fusion
from aiter_inductor.lowerings.norm import add_rms_norm, rms_norm


@fusion("add_into_rms_norm", rms_norm)
def add_into_rms_norm(norm: Match, matches: Matches) -> Match | str | None:
    """x + residual → rms_norm: saves one read of [num_rows, N]; the sum is still written once."""
    total = norm.argument("x")
    pair = operands(total, "add")
    if pair is None:
        return None
    if owner := matches.containing(total):
        return f"{total.name} is part of a {owner.pattern or owner.op.name} already"
    x, residual = pair
    if dtype(x) is None or dtype(residual) is None:
        return None
    if not (same_sizes(x, total) and same_sizes(residual, total)):
        return f"{total.name} broadcasts one of its terms"
    if dtype(x) != dtype(residual):
        return f"{total.name} adds {dtype_name(x)} and {dtype_name(residual)}"
    return Match(
        pattern="",
        op=add_rms_norm,
        args=(x, residual, *norm.args[1:]),
        kwargs=norm.kwargs,
        outputs=(*norm.outputs, Output(total)),
        interior=norm.interior | {total},
        parts=(norm,),
    )
