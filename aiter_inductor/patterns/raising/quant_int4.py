"""Quantisation to int4, two elements a byte, written in plain PyTorch.

Walks back from the `|` that joins two nibbles, through masks and shifts, to the even and the odd
elements of one rounded quotient. What lies before that is read as for the other dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    RESHAPES,
    TRANSPARENT,
    arg,
    commuted,
    dtype,
    dtype_name,
    is_last_dim,
    kind,
    ndim,
    number,
    only_user,
    operands,
    size,
    sizes,
    source,
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.quant import INT4_MAX, quant_int4_per_group, quant_per_tensor
from aiter_inductor.patterns.raising.quant import (
    Quotient,
    formula_differs,
    granularity,
    read_quotient,
    scale_output,
)
from aiter_inductor.patterns.raising.quant_cast import read_rounding
from aiter_inductor.patterns.raising.quant_rows import adaptation
from aiter_inductor.patterns.raising.tail import widenings

PATTERN = quant_int4_per_group.name
_MASKS = {15.0: True, 240.0: True, 255.0: False}


@dataclass(frozen=True)
class _Nibble:
    """Every second element of `values`, from `parity` on, moved up by `shift` bits."""

    values: fx.Node
    parity: int
    shift: int
    masked: bool
    interior: frozenset[fx.Node]


@recogniser("quant", "or")
def packed_int4(node: fx.Node) -> Match | Miss | None:
    """Two nibbles of one quantised tensor, joined."""
    pair = operands(node, "or") or (None, None)
    low, high = (_nibble(side) for side in pair)
    if low is None or high is None or low.values is not high.values:
        return None
    if low.shift > high.shift:
        low, high = high, low
    if (low.shift, high.shift) != (0, 4) or {low.parity, high.parity} != {0, 1}:
        return None
    cast, passed, masked = _cast_behind(low.values)
    rounding = None if cast is None else read_rounding(cast)
    if cast is None or rounding is None:
        return None
    quotient = read_quotient(rounding.quotient)
    if quotient is None:
        return None
    if isinstance(quotient, str):
        return Miss(PATTERN, node, quotient)
    reason = _packing_differs(low, masked or low.masked) or rounding.asymmetric(torch.int8)
    reason = reason or formula_differs(quotient, rounding, torch.int8, INT4_MAX, "int4")
    if reason:
        return Miss(PATTERN, node, reason)
    inside = {node, cast, *passed, *low.interior, *high.interior, *rounding.interior}
    return _matched(node, quotient, {*inside, quotient.node, *widenings(quotient.values)})


def _matched(node: fx.Node, quotient: Quotient, inside: set[fx.Node]) -> Match | Miss | None:
    made = granularity(quotient)
    if isinstance(made, Miss):
        return replace(made, pattern=PATTERN, node=node)
    op, x, kwargs = made
    if op is quant_per_tensor:
        return Miss(PATTERN, node, "one scale is for the whole tensor, kernels take one a group")
    shape, N = sizes(x) or (), fixed(size(x, -1))
    if N is None or N % 2:
        return Miss(PATTERN, node, f"N={size(x, -1)} is not an even number known when compiling")
    group_size = kwargs.get("group_size", N)
    end, inside = _as_bytes(node, inside)
    if dtype(end) != torch.uint8:
        return Miss(
            PATTERN, node, f"nibbles are packed into {dtype_name(end)}, kernels write uint8"
        )
    adapt = adaptation((*shape[:-1], N // 2), sizes(end) or ())
    scale = scale_output(quotient, INT4_MAX, inside, (*shape[:-1], N // group_size))
    if adapt is None or isinstance(scale, str):
        shown = scale if isinstance(scale, str) else f"{end.name} is shaped anew"
        return Miss(PATTERN, node, shown)
    output, chain = scale
    arguments: dict[str, Any] = {"group_size": group_size}
    if quotient.scale.amax_min > 0:
        arguments["amax_min"] = quotient.scale.amax_min
    interior = frozenset({*inside, *chain, *quotient.scale.amax.interior})
    outputs = (Output(end, adapt), output)
    return Match(PATTERN, quant_int4_per_group, (x,), arguments, outputs, interior)


def _packing_differs(low: _Nibble, masked: bool) -> str | None:
    if low.parity == 1:
        return "even elements are in the high nibble, kernels put them into the low one"
    if not masked:
        return "the low nibble keeps its sign, which then covers the high one"
    return None


def _nibble(node: Any) -> _Nibble | None:
    shift, masked = 0, False
    inside: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        found = _selection(node)
        if found is not None:
            return _Nibble(found[0], found[1], shift, masked, frozenset({*inside, node}))
        inner, moved, kept = _bits(node)
        if inner is None:
            return None
        shift, masked = shift + moved, masked or kept
        inside.add(node)
        node = inner
    return None


def _bits(node: fx.Node) -> tuple[Any, int, bool]:
    """`(operand, bits it is moved up, whether it is masked)`; the operand is None for others."""
    name = kind(node)
    if name in TRANSPARENT or name in RESHAPES or (name == "cast" and _is_integer(source(node))):
        return source(node), 0, False
    if name == "lshift" and number(arg(node, "other")) == 4:
        return source(node), 4, False
    for inner, factor in commuted(node, name or "") if name in ("mul", "and") else ():
        found = number(factor)
        if name == "mul" and found == 16:
            return inner, 4, False
        if name == "and" and found in _MASKS:
            return inner, 0, _MASKS[found]
    return None, 0, False


def _selection(node: fx.Node) -> tuple[fx.Node, int] | None:
    """`(values, parity)` of `q[..., ::2]`, `q[..., 1::2]`, or one of the two of each pair."""
    values = source(node)
    if not isinstance(values, fx.Node):
        return None
    if kind(node) == "slice":
        start, step = arg(node, "start", 0), arg(node, "step", 1)
        by_two = is_last_dim(arg(node, "dim", 0), values) and step == 2 and start in (0, 1, None)
        return (values, start or 0) if by_two else None
    if kind(node) == "select":
        last, whole = arg(node, "index"), is_last_dim(arg(node, "dim"), values)
    elif kind(node) == "getitem":
        index = arg(node, "index")
        *leading, last = index if isinstance(index, tuple) and index else (None,)
        spans = Ellipsis in leading or len(leading) == ndim(values) - 1
        whole = spans and all(each in (Ellipsis, slice(None)) for each in leading)
    else:
        return None
    if whole and last in (slice(None, None, 2), slice(0, None, 2)):
        return values, 0
    if whole and last == slice(1, None, 2):
        return values, 1
    if whole and isinstance(last, int) and last in (0, 1) and size(values, -1) == 2:
        return values, last
    return None


def _cast_behind(node: Any) -> tuple[fx.Node | None, set[fx.Node], bool]:
    """`(the cast to integers, nodes passed, whether masked)` before reshapes, masks and casts."""
    passed: set[fx.Node] = set()
    masked = False
    while isinstance(node, fx.Node):
        if kind(node) == "cast" and not _is_integer(source(node)):
            return node, passed, masked
        inner, moved, kept = _bits(node)
        if inner is None or moved:
            break
        masked = masked or kept
        passed.add(node)
        node = inner
    return None, passed, masked


def _as_bytes(node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, set[fx.Node]]:
    """The node after a last cast to uint8, if one follows."""
    user = only_user(node)
    if dtype(node) != torch.uint8 and kind(user) == "cast" and dtype(user) == torch.uint8:
        assert user is not None
        return user, {*inside, user}
    return node, inside


def _is_integer(node: Any) -> bool:
    found = dtype(node)
    return found is not None and not found.is_floating_point
