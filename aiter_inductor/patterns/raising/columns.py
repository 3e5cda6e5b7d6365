"""Ranges of a tensor's last dimension: taken from it, or put together in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from aiter_inductor.core.graph import (
    arg,
    dtype,
    is_last_dim,
    kind,
    ndim,
    size,
    sizes,
    source,
    value,
)
from aiter_inductor.core.problem import fixed


@dataclass(frozen=True)
class Columns:
    """`of[..., start:stop]`.

    Attributes:
        path: the nodes that take it, a split and its item for example.
    """

    of: fx.Node
    start: int
    stop: int
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Joined:
    """A tensor whose columns are those of `first`, then those of `second`.

    Attributes:
        interior: the nodes that put it together.
    """

    first: fx.Node
    second: fx.Node
    interior: frozenset[fx.Node]


def columns(node: Any) -> Columns | None:
    """The range of columns that `node` takes from another tensor, or None if it does not."""
    if kind(node) == "getitem":
        index = arg(node, "index")
        return _sliced(node, index) if isinstance(index, tuple) else _split(node, index)
    if kind(node) == "slice":
        if arg(node, "step", 1) != 1:
            return None
        piece = slice(arg(node, "start"), arg(node, "end"))
    elif kind(node) == "narrow" and _int(arg(node, "start")) and _int(arg(node, "length")):
        piece = slice(arg(node, "start"), arg(node, "start") + arg(node, "length"))
    else:
        return None
    return _range(node, piece) if is_last_dim(arg(node, "dim", 0), source(node)) else None


def joined(node: Any, reader: fx.Node) -> Joined | None:
    """What `node` was put together from, as `reader` finds it: by `cat`, or by two copies."""
    if kind(node) == "cat":
        tensors = arg(node, "tensors")
        if not isinstance(tensors, tuple | list) or len(tensors) != 2:
            return None
        if not is_last_dim(arg(node, "dim", 0), node):
            return None
        if any(dtype(t) != dtype(node) for t in tensors):
            return None
        return Joined(tensors[0], tensors[1], frozenset({node}))
    return _filled(node, reader) if kind(node) == "empty" else None


def _filled(node: fx.Node, reader: fx.Node) -> Joined | None:
    """An empty tensor that two copies fill before `reader`, the only one to see it, does."""
    found: list[tuple[Columns, fx.Node]] = []
    for user in node.users:
        if user is reader:
            continue
        part = columns(user)
        copies = list(user.users)
        if part is None or len(copies) != 1 or kind(copies[0]) != "copy_":
            return None
        copy = copies[0]
        if source(copy) is not user or copy.users or not copy < reader:
            return None
        found.append((part, copy))
    if len(found) != 2:
        return None
    (first, first_copy), (second, second_copy) = sorted(found, key=lambda pair: pair[0].start)
    if first.start != 0 or first.stop != second.start or second.stop != fixed(size(node, -1)):
        return None
    given = [arg(copy, "other") for copy in (first_copy, second_copy)]
    for copy, what in zip((first_copy, second_copy), given, strict=True):
        if sizes(what) != sizes(source(copy)) or dtype(what) != dtype(node):
            return None
    interior = {node, first_copy, second_copy, *first.path, *second.path}
    return Joined(given[0], given[1], frozenset(interior))


def _sliced(node: fx.Node, index: tuple[Any, ...]) -> Columns | None:
    *others, last = index
    whole = all(i is Ellipsis or i == slice(None) for i in others)
    reaches_last = Ellipsis in others or len(index) == ndim(source(node))
    if not whole or not reaches_last or not isinstance(last, slice) or last.step not in (None, 1):
        return None
    return _range(node, last)


def _split(node: fx.Node, index: Any) -> Columns | None:
    """One item of a split or chunk along the last dimension."""
    whole = source(node)
    if kind(whole) not in ("split", "chunk") or not isinstance(index, int):
        return None
    x = source(whole)
    if not isinstance(x, fx.Node) or not is_last_dim(arg(whole, "dim", 0), x):
        return None
    widths = [piece.shape[-1] for piece in value(whole)]
    known = [width for width in widths if isinstance(width, int)]
    if len(known) != len(widths):
        return None
    index %= len(known)
    start = sum(known[:index])
    return Columns(x, start, start + known[index], (node, whole))


def _range(node: fx.Node, piece: slice) -> Columns | None:
    width = fixed(size(source(node), -1))
    if width is None or not all(b is None or _int(b) for b in (piece.start, piece.stop)):
        return None
    start, stop, _ = piece.indices(width)
    return Columns(source(node), start, stop, (node,))


def _int(bound: Any) -> bool:
    return isinstance(bound, int)
