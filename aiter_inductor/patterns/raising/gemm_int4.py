"""int4 weights as programs unpack them: two to a byte, the even element in the low half.

Two's complement, spelled as `where(n < 8, n, n - 16)` or `(n ^ 8) - 8` of halves that `& 15` and
`>> 4` cut out of uint8, or as `(b << 4) >> 4` and `b >> 4` of int8; or offset binary, the halves
themselves, perhaps less 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import arg, commuted, dtype, kind, operands, size, sizes, source

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Nibbles:
    """Bytes, and what they stand for.

    Attributes:
        packed: [*, C].
        nodes: those that make [*, 2 C] of it.
        offset_binary: whether a code c, from -8 to 7, is stored as c + 8.
        lift: what the program has is a code and this number.
    """

    packed: fx.Node
    nodes: frozenset[fx.Node]
    offset_binary: bool = False
    lift: int = 0


def read_nibbles(node: Any) -> Nibbles | None:
    """Elements of four bits behind `node`, or None."""
    if not isinstance(node, fx.Node) or dtype(node) not in _INTEGERS:
        return None
    seen: set[fx.Node] = set()
    codes, made = _signed(_through_casts(node, seen), seen)
    codes = _through_casts(codes, seen)
    halves = _interleaved(codes, seen)
    if halves is None:
        return None
    shifted = [_half(half, seen) for half in halves]
    low, high = shifted
    if low is None or high is None or low[0] is not high[0] or (low[1], high[1]) != ("low", "high"):
        return None
    packed, by_shifting = low[0], low[2] == "int8"
    if dtype(packed) != torch.uint8 or (made and dtype(node) == torch.uint8):
        return None  # what is below zero wraps around in uint8
    if by_shifting and made == "by flipping":
        return None
    less = 8 if made == "minus 8" else 0
    if by_shifting or made in ("by cases", "by flipping"):
        return Nibbles(packed, frozenset(seen), lift=-less)
    return Nibbles(packed, frozenset(seen), offset_binary=True, lift=8 - less)


def read_codes(node: Any) -> Nibbles | None:
    """Elements from 0 to 15 behind `node`, for a table to give them values."""
    seen: set[fx.Node] = set()
    halves = _interleaved(_through_casts(node, seen), seen)
    low, high = (_half(half, seen) for half in halves) if halves else (None, None)
    if low is None or high is None or low[0] is not high[0]:
        return None
    unsigned = (low[1:], high[1:]) == (("low", "uint8"), ("high", "uint8"))
    return Nibbles(low[0], frozenset(seen)) if unsigned else None


def _through_casts(node: Any, seen: set[fx.Node]) -> Any:
    while isinstance(node, fx.Node) and kind(node) == "cast" and dtype(node) in _INTEGERS:
        if dtype(source(node)) not in _INTEGERS:
            return node
        seen.add(node)
        node = source(node)
    return node


def _signed(node: Any, seen: set[fx.Node]) -> tuple[Any, str]:
    """What 0 to 15 is made signed from, and how; `node` itself and nothing if it is not."""
    if kind(node) == "where":
        condition, kept, moved = (arg(node, name) for name in ("condition", "input", "other"))
        below = operands(condition, "lt")
        codes = below[0] if below and below[1] == 8 else None
        if codes is not None and kept is codes and operands(moved, "sub") == (codes, 16):
            seen |= {node, condition, moved}
            return codes, "by cases"
    if (pair := operands(node, "sub")) and pair[1] == 8:
        for inner, eight in commuted(pair[0], "xor"):
            if eight == 8:
                seen |= {node, pair[0]}
                return inner, "by flipping"
        seen.add(node)
        return pair[0], "minus 8"
    return node, ""


def _interleaved(node: Any, seen: set[fx.Node]) -> tuple[Any, Any] | None:
    """The two tensors whose elements alternate in the last dimension of `node`."""
    if kind(node) not in ("flatten", "reshape") or kind(stacked := source(node)) != "stack":
        return None
    tensors, along = arg(stacked, "tensors"), arg(stacked, "dim", 0)
    shape = sizes(stacked) or ()
    if not isinstance(tensors, tuple | list) or len(tensors) != 2 or not isinstance(along, int):
        return None
    if along % max(len(shape), 1) != len(shape) - 1 or size(node, -1) != 2 * shape[-2]:
        return None
    seen |= {node, stacked}
    return tensors[0], tensors[1]


def _half(node: Any, seen: set[fx.Node]) -> tuple[fx.Node, str, str] | None:
    """`(bytes, "low" or "high", "uint8" or "int8")` of one half."""
    node = _through_casts(node, seen)
    for inner, mask in commuted(node, "and"):
        if mask == 15 and dtype(inner) == torch.uint8:
            seen.add(node)
            return inner, "low", "uint8"
    if not (pair := operands(node, "rshift")) or pair[1] != 4:
        return None
    seen.add(node)
    inner = pair[0]
    if dtype(inner) == torch.uint8:
        return inner, "high", "uint8"
    if dtype(inner) != torch.int8:
        return None
    which = "high"
    if (left := operands(inner, "lshift")) and left[1] == 4:
        seen.add(inner)
        inner, which = left[0], "low"
    packed = _bytes_of(inner, seen)
    return None if packed is None else (packed, which, "int8")


def _bytes_of(node: Any, seen: set[fx.Node]) -> Any:
    """The uint8 tensor that an int8 one is a view of."""
    if isinstance(node, fx.Node) and kind(node) in ("bit_cast", "cast"):
        before = source(node)
        if dtype(before) == torch.uint8 and sizes(before) == sizes(node):
            seen.add(node)
            return before
    return None
