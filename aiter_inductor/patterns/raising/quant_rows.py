"""Which elements share a scale, and how an op's results are shaped into what the program holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import RESHAPES, TRANSPARENT, kind, size, sizes, source
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.patterns.raising.tail import strip_widening

Adapt = tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Rows:
    """What a quantisation op gets.

    Attributes:
        x: the tensor to quantise.
        group_size: elements that share a scale, None if whole rows of `x` do.
    """

    x: fx.Node
    group_size: int | None


def rows_of(grouped: fx.Node) -> Rows | str:
    """The rows behind a tensor whose last dimension shares a scale.

    Walks back over reshapes to the tensor whose rows were cut into groups. Without one the last
    dimension itself is the row.

    Returns:
        A sentence if rows were cut where no kernel cuts them.
    """
    group = size(grouped, -1)
    for node in before_reshapes(grouped):
        N = size(node, -1)
        if group == N:
            continue
        if fixed(group) is None:
            return f"the group size {group} is not known when compiling"
        if fixed(N) is None or group > N:
            break
        if N % group:
            return f"group_size {group} does not divide N={N}"
        return Rows(node, group)
    return Rows(grouped, None)


def before_reshapes(node: fx.Node) -> Iterator[fx.Node]:
    """`node`, then every tensor before it that holds the same elements in the same order."""
    while True:
        node = strip_widening(node)
        yield node
        if kind(node) not in RESHAPES and kind(node) not in TRANSPARENT:
            return
        node = source(node)


def same_elements(left: fx.Node, right: fx.Node) -> bool:
    """Whether two tensors are reshapes of one."""
    return bool({*before_reshapes(left)} & {*before_reshapes(right)})


def adaptation(given: tuple[Dim, ...], wanted: tuple[Dim, ...]) -> Adapt | None:
    """The view that turns an op's result of one shape into the program's, None if none is known.

    Both hold the same elements; at most one size may be symbolic beyond those in common.
    """
    if given == wanted:
        return ()
    if wanted == (*given, 1):
        return ((torch.unsqueeze, (-1,)),)
    if given == (*wanted, 1):
        return ((torch.squeeze, (-1,)),)
    kept = len(given) - 1
    rest = wanted[kept:]
    if 0 < kept < len(wanted) and given[:-1] == wanted[:kept] and _fixed(rest):
        return ((torch.unflatten, (-1, rest)),)
    kept = len(wanted) - 1
    rest = given[kept:]
    if 0 < kept < len(given) - 1 and given[:kept] == wanted[:-1] and _fixed((*rest, wanted[-1])):
        return ((torch.flatten, (kept,)),)
    open_dims = [i for i, n in enumerate(wanted) if fixed(n) is None]
    if len(open_dims) > 1:
        return None
    shape = tuple(-1 if i in open_dims else n for i, n in enumerate(wanted))
    return ((torch.reshape, (shape,)),)


def rows_line_up(factor: fx.Node, values: fx.Node) -> bool:
    """Whether `factor` holds one number for each row of `values`."""
    rows = sizes(values)
    return bool(rows) and sizes(factor) == (*(rows or ())[:-1], 1)


def _fixed(dims: tuple[Dim, ...]) -> bool:
    return all(fixed(n) is not None for n in dims)
