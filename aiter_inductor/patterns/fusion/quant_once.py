"""Quantise once what several linears read: q, k and v, or gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from aiter_inductor.core.match import Match, Matches, Output, fusion
from aiter_inductor.lowerings.mxfp4 import quant_mxfp4
from aiter_inductor.lowerings.quant import (
    quant_int4_per_group,
    quant_per_group,
    quant_per_tensor,
    quant_per_token,
    quant_static,
)


@fusion(
    "quant_once",
    quant_per_token,
    quant_per_group,
    quant_per_tensor,
    quant_static,
    quant_int4_per_group,
    quant_mxfp4,
)
def quant_once(quant: Match, matches: Matches) -> Match | None:
    """Saves a read of x [num_rows, N], and all of the others' work; then a norm may take it in."""
    alike = [other for other in matches.of(quant.op) if other is quant or _same(other, quant)]
    if len(alike) == 1:
        return None
    return Match(
        pattern="",
        op=quant.op,
        args=quant.args,
        kwargs=quant.kwargs,
        outputs=tuple(_outputs(alike)),
        interior=frozenset().union(*(each.interior for each in alike)),
        parts=tuple(alike),
        kept=frozenset().union(*(each.kept for each in alike)),
    )


def _same(other: Match, quant: Match) -> bool:
    if other.args[0] is not quant.args[0] or other.parts:
        return False
    ours, theirs = (m.op.bind(*m.args, **m.kwargs) for m in (quant, other))
    return ours == theirs


def _outputs(alike: list[Match]) -> Iterator[Output | None]:
    """Of each result the first node, with those of the others beside it."""
    for nodes in zip(*(each.outputs for each in alike), strict=True):
        first, *others = [output for output in nodes if output is not None] or [None]
        yield None if first is None else replace(first, twins=tuple(filter(None, others)))
