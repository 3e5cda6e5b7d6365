"""MXFP4 as programs dequantise it: a table of the elements, and powers of two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    RESHAPES,
    TRANSPARENT,
    commuted,
    dtype,
    kind,
    number,
    operands,
    source,
)
from aiter_inductor.lowerings.mxfp4 import E2M1
from aiter_inductor.patterns.raising.gemm_axes import is_view
from aiter_inductor.patterns.raising.gemm_int4 import Nibbles, read_codes

_SIGNED = [*E2M1, *(-value for value in E2M1)]
_BIAS = 127
_SAME_ORDER = RESHAPES | TRANSPARENT | {"getitem"}
"""Views of a scale that was found to hold each of its elements once."""


def read_e2m1(node: fx.Node) -> Nibbles | None:
    """`torch.tensor([0.0, 0.5, ...])[codes]` of two elements a byte, the even one in the low."""
    if kind(node) != "getitem":
        return None
    table, codes = node.args
    if not isinstance(table, fx.Node) or not isinstance(codes, fx.Node):
        return None
    held = table.args[0] if table.target is torch.tensor else None
    if not isinstance(held, list | tuple) or not _is_table(held):
        return None
    seen = {node, codes, table}
    if kind(codes) == "cast" and dtype(codes) == torch.int64:
        codes = source(codes)
    found = read_codes(codes)
    return None if found is None else Nibbles(found.packed, found.nodes | seen)


def read_e8m0(node: Any) -> fx.Node | None:
    """The codes behind a scale in fp32: a cast of float8_e8m0fnu, or `exp2(code - 127)`."""
    while is_view(node) and kind(node) in _SAME_ORDER:
        node = source(node)
    if not isinstance(node, fx.Node):
        return None
    before = source(node)
    if kind(node) == "cast" and dtype(before) == torch.float8_e8m0fnu:
        return before if isinstance(before, fx.Node) else None
    if kind(node) != "exp2":
        return None
    pair = operands(before, "sub")
    terms = [(pair[0], number(pair[1]))] if pair else []
    terms += [(left, -(number(right) or 0)) for left, right in commuted(before, "add")]
    for code, bias in terms:
        if bias == _BIAS and kind(code) == "cast" and dtype(source(code)) == torch.uint8:
            found = source(code)
            return found if isinstance(found, fx.Node) else None
    return None


def _is_table(held: list[Any] | tuple[Any, ...]) -> bool:
    """Whether these are the sixteen elements by code, negative zero included."""
    return list(held) == _SIGNED and math.copysign(1, float(held[8])) < 0
