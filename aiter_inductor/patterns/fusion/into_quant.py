"""Fold a quantisation into the normalisation or activation that feeds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import TRANSPARENT, dtype, dtype_name, kind, ndim, size, source
from aiter_inductor.core.match import Fusion, Match, Matches, Output, fusion, readers
from aiter_inductor.core.op import Op
from aiter_inductor.lowerings.activation import (
    act_and_mul,
    act_and_mul_quant,
    act_and_mul_quant_static,
)
from aiter_inductor.lowerings.norm import add_rms_norm, layer_norm, rms_norm
from aiter_inductor.lowerings.norm_quant import (
    add_rms_norm_quant,
    add_rms_norm_quant_static,
    layer_norm_quant,
    layer_norm_quant_static,
    rms_norm_quant,
    rms_norm_quant_static,
)
from aiter_inductor.lowerings.quant import quant_per_group, quant_per_token, quant_static

Adaptation = tuple[tuple[Any, tuple[Any, ...]], ...]
_QUANTS = (quant_per_token, quant_per_group, quant_static)


@dataclass(frozen=True)
class Pair:
    """The fused ops of one producer: with scales computed, and with a scale given."""

    producer: Op
    dynamic: Op
    static: Op


def _into_quant(name: str, *pairs: Pair) -> Fusion:
    by_producer = {pair.producer: pair for pair in pairs}

    @fusion(name, *_QUANTS)
    def fold(quant: Match, matches: Matches) -> Match | str | None:
        """Saves one write and one read of [num_rows, N]."""
        rows, views = _through_row_views(quant.argument("x"))
        producer = matches.producing(rows)
        if producer is None or producer.op not in by_producer:
            return None
        if producer.outputs[0] is None or producer.outputs[0].node is not rows:
            return None
        if reason := _unfit(producer, quant, rows, views):
            return reason
        return _merge(by_producer[producer.op], producer, quant, views)

    return fold


norm_into_quant = _into_quant(
    "norm_into_quant",
    Pair(rms_norm, rms_norm_quant, rms_norm_quant_static),
    Pair(add_rms_norm, add_rms_norm_quant, add_rms_norm_quant_static),
    Pair(layer_norm, layer_norm_quant, layer_norm_quant_static),
)
act_into_quant = _into_quant(
    "act_into_quant", Pair(act_and_mul, act_and_mul_quant, act_and_mul_quant_static)
)


def _unfit(producer: Match, quant: Match, rows: fx.Node, views: list[fx.Node]) -> str | None:
    inside = producer.interior | quant.interior | set(views)
    outside = [user for node in (rows, *views) for user in readers(node, inside)]
    if outside:
        return f"{rows.name} is read by {outside[0].name} too, so it has to be written anyway"
    if views and ndim(views[0]) != 2:
        return f"{views[0].name} has {ndim(views[0])} dimensions between the two, not 2"
    if quant.op is quant_static and (low := quant.argument("qmin")) is not None:
        return f"the clamp's lower bound is {low:g}, fused kernels keep the symmetric one"
    widened = dtype(rows) != dtype(producer.argument(_rows_of(producer)))
    if widened and dtype(rows) != torch.float32:
        return f"{rows.name} is {dtype_name(rows)}, which the fused kernel does not round to"
    return None


def _merge(pair: Pair, producer: Match, quant: Match, views: list[fx.Node]) -> Match:
    static = quant.op is quant_static
    kwargs: dict[str, Any] = {k: v for k, v in producer.kwargs.items() if k != "out_dtype"}
    if producer.kwargs.get("out_dtype") == torch.float32:
        kwargs["round_norm"] = False
    kwargs["dtype"] = quant.argument("dtype")
    args = producer.args
    if static:
        args = (*args, quant.argument("scale"))
    else:
        kwargs["amax_min"] = quant.argument("amax_min")
        grouped = quant.op is quant_per_group
        kwargs["group_size"] = quant.argument("group_size") if grouped else None
    flat: Adaptation = ((torch.flatten, (0, -2)),) if views else ()
    results = tuple(None if end is None else _behind(flat, end) for end in quant.outputs)
    return Match(
        pattern="",
        op=pair.static if static else pair.dynamic,
        args=args,
        kwargs=kwargs,
        outputs=(*results, *producer.outputs[1:]),
        interior=producer.interior | quant.interior | frozenset(views),
        parts=(producer, quant),
    )


def _behind(flat: Adaptation, end: Output) -> Output:
    """The same output, its rows flattened first."""
    twins = tuple(_behind(flat, twin) for twin in end.twins)
    return Output(end.node, (*flat, *end.adapt), twins)


def _rows_of(producer: Match) -> str:
    return "gate" if producer.op is act_and_mul else "x"


def _through_row_views(node: Any) -> tuple[Any, list[fx.Node]]:
    """`node` before reshapes of its leading dimensions, and those reshapes, outermost first."""
    views = []
    while kind(node) in TRANSPARENT or (kind(node) in ("reshape", "flatten") and _keeps_rows(node)):
        views.append(node)
        node = source(node)
    return node, views


def _keeps_rows(view: fx.Node) -> bool:
    return bool(size(view, -1) == size(source(view), -1))
