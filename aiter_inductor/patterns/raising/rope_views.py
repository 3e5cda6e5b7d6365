"""Rearrangements of a value's last dimensions, in every spelling: slices, joins, reshapes.

Each walker takes `(node, rank, look)`, asks `look` for the grids of what `node` is made from, and
gives the grid of its last `rank` dimensions, or None where elements move between those dimensions
and the ones before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import arg, dtype, kind, ndim, sizes, source, value
from aiter_inductor.core.problem import dim, fixed
from aiter_inductor.patterns.raising.rope_grid import Grid, join

Look = Callable[[fx.Node, int], "Grid | None"]
"""The grid of a node's last dimensions."""


def viewed(node: fx.Node, rank: int, look: Look) -> Grid | None:
    """`node` as a rearrangement of its inputs' last dimensions, None if it is none.

    Whatever moves elements between the last `rank` dimensions and those before them is none.
    """
    walk = _VIEWS.get(kind(node) or "")
    return None if walk is None or ndim(node) < rank else walk(node, rank, look)


def last_sizes(node: Any, rank: int) -> tuple[int, ...] | None:
    """The last `rank` sizes of a tensor node, None unless all are known when compiling."""
    found = sizes(node)
    if found is None or len(found) < rank:
        return None
    last = tuple(fixed(size) for size in found[len(found) - rank :])
    return None if any(size is None for size in last) else tuple(s for s in last if s is not None)


def _copy(node: fx.Node, rank: int, look: Look) -> Grid | None:
    return look(source(node), rank)


def _negate(node: fx.Node, rank: int, look: Look) -> Grid | None:
    grid = look(source(node), rank)
    return None if grid is None else grid.negated()


def _times_minus_one(node: fx.Node, rank: int, look: Look) -> Grid | None:
    factor = arg(node, "other")
    return _negate(node, rank, look) if isinstance(factor, int | float) and factor == -1 else None


def _integer(operand: Any) -> int | None:
    """An int, however the graph holds it."""
    found = value(operand)
    return fixed(dim(found)) if isinstance(found, int | torch.SymInt) else None


def _axis(node: fx.Node, rank: int, which: Any) -> int | None:
    """Dimension `which` of `node` counted within its last `rank`, None if it is before them."""
    index = _integer(which)
    if index is None:
        return None
    axis = (index + ndim(node) if index < 0 else index) - (ndim(node) - rank)
    return axis if 0 <= axis < rank else None


def _range(n: int, piece: slice) -> range | None:
    bounds = [None if b is None else _integer(b) for b in (piece.start, piece.stop, piece.step)]
    given = (piece.start, piece.stop, piece.step)
    if any(b is None and g is not None for b, g in zip(bounds, given, strict=True)):
        return None
    return range(n)[slice(*bounds)]


def _take(x: Any, rank: int, which: Any, look: Look, indices: Callable[[int], Any]) -> Grid | None:
    """Entries `indices(n)` of dimension `which` of `x`, whose size is n."""
    axis = _axis(x, rank, which)
    grid = look(x, rank) if axis is not None else None
    if grid is None or axis is None:
        return None
    taken = indices(grid.shape[axis])
    return None if taken is None else grid.take(axis, taken)


def _slice(node: fx.Node, rank: int, look: Look) -> Grid | None:
    piece = slice(arg(node, "start"), arg(node, "end"), arg(node, "step"))
    which = arg(node, "dim", 0)
    return _take(source(node), rank, which, look, lambda n: _range(n, piece))


def _narrow(node: fx.Node, rank: int, look: Look) -> Grid | None:
    start, length = _integer(arg(node, "start")), _integer(arg(node, "length"))
    if start is None or length is None:
        return None

    def indices(n: int) -> range:
        first = start + n if start < 0 else start
        return range(first, first + length)

    return _take(source(node), rank, arg(node, "dim"), look, indices)


def _repeat_interleave(node: fx.Node, rank: int, look: Look) -> Grid | None:
    repeats = _integer(arg(node, "repeats"))
    if repeats is None:
        return None

    def indices(n: int) -> list[int]:
        return [i for i in range(n) for _ in range(repeats)]

    return _take(source(node), rank, arg(node, "dim"), look, indices)


def _repeat(node: fx.Node, rank: int, look: Look) -> Grid | None:
    times = [_integer(t) for t in _listed(node)]
    x = source(node)
    first = len(times) - rank
    if None in times or len(times) != ndim(x) or first < 0 or any(t != 1 for t in times[:first]):
        return None
    grid = look(x, rank)
    for axis, t in enumerate(times[first:]):
        if grid is not None and t is not None:
            grid = grid.take(axis, list(range(grid.shape[axis])) * t)
    return grid


def _select(node: fx.Node, rank: int, look: Look) -> Grid | None:
    return _selected(source(node), rank + 1, arg(node, "dim"), arg(node, "index"), look)


def _selected(x: Any, rank: int, which: Any, index: Any, look: Look) -> Grid | None:
    at, axis = _integer(index), _axis(x, rank, which)
    grid = look(x, rank) if axis is not None and at is not None else None
    if grid is None or axis is None or at is None:
        return None
    grid = grid.take(axis, (at % grid.shape[axis],))
    return grid.reshape((*grid.shape[:axis], *grid.shape[axis + 1 :]))


def _getitem(node: fx.Node, rank: int, look: Look) -> Grid | None:
    x, index = source(node), arg(node, "index")
    found = kind(x)
    if isinstance(index, int) and found == "unbind":
        return _selected(source(x), rank + 1, arg(x, "dim", 0), index, look)
    if isinstance(index, int) and found in ("chunk", "split"):
        return _piece(x, index, rank, look)
    if ndim(x) < 1:
        return None
    return _indexed(x, index if isinstance(index, tuple) else (index,), rank, look)


def _piece(pieces: fx.Node, index: int, rank: int, look: Look) -> Grid | None:
    """One result of a chunk or split; where it starts follows from the sizes before it."""
    x, which = source(pieces), arg(pieces, "dim", 0)
    parts = value(pieces)
    if not isinstance(parts, tuple | list):
        parts = _parts(pieces)
    axis = _axis(x, rank, which)
    if parts is None or axis is None:
        return None
    widths = [fixed(dim(p.shape[axis - rank])) if isinstance(p, torch.Tensor) else p for p in parts]
    index = index + len(widths) if index < 0 else index
    if not 0 <= index < len(widths) or None in widths[: index + 1]:
        return None
    start = sum(width for width in widths[:index] if width is not None)
    stop = start + (widths[index] or 0)
    return _take(x, rank, which, look, lambda n: range(start, stop))


def _parts(pieces: fx.Node) -> list[int | None] | None:
    """Widths of the results of a chunk or split whose fake value the graph does not hold."""
    x = source(pieces)
    which = _axis(x, ndim(x), arg(pieces, "dim", 0))
    total = None if which is None else last_sizes(x, ndim(x) - which)
    if total is None:
        return None
    n = total[0]
    wanted = arg(pieces, "chunks" if kind(pieces) == "chunk" else "sizes")
    if isinstance(wanted, tuple | list):
        return [_integer(width) for width in wanted]
    count = _integer(wanted)
    if not count:
        return None
    step = -(-n // count) if kind(pieces) == "chunk" else count
    return [min(step, n - start) for start in range(0, n, step)] if step else None


def _indexed(x: fx.Node, index: tuple[Any, ...], rank: int, look: Look) -> Grid | None:
    """`x[index]` with slices, ints and None behind the dimensions that are kept whole."""
    consumed = sum(i is not None and i is not Ellipsis for i in index)
    missing = ndim(x) - consumed
    if missing < 0 or sum(i is Ellipsis for i in index) > 1:
        return None
    if not any(i is Ellipsis for i in index):
        index = (*index, Ellipsis)
    at = next(n for n, i in enumerate(index) if i is Ellipsis)
    full = (*index[:at], *(slice(None),) * missing, *index[at + 1 :])
    # The last `rank` dimensions of the result, counted from its end.
    kept, split = 0, len(full)
    while split > 0 and kept < rank:
        split -= 1
        kept += not isinstance(full[split], int)
    while split > 0 and isinstance(full[split - 1], int):
        split -= 1
    lead, tail = full[:split], full[split:]
    if kept < rank or any(i != slice(None) for i in lead):
        return None
    grid = look(x, sum(i is not None for i in tail))
    return None if grid is None else _apply(grid, tail)


def _apply(grid: Grid, index: Iterable[Any]) -> Grid | None:
    axis = 0
    for i in index:
        if i is None:
            grid = grid.reshape((*grid.shape[:axis], 1, *grid.shape[axis:]))
            axis += 1
        elif isinstance(i, slice):
            taken = _range(grid.shape[axis], i)
            if taken is None:
                return None
            grid = grid.take(axis, taken)
            axis += 1
        elif isinstance(i, int) and not isinstance(i, bool):
            grid = grid.take(axis, (i % grid.shape[axis],))
            grid = grid.reshape((*grid.shape[:axis], *grid.shape[axis + 1 :]))
        else:
            return None
    return grid


def _reshape(node: fx.Node, rank: int, look: Look) -> Grid | None:
    x = source(node)
    lead = ndim(node) - rank
    before, after = sizes(x), sizes(node)
    shape = last_sizes(node, rank)
    if before is None or after is None or shape is None or dtype(x) != dtype(node):
        return None
    if len(before) <= lead or before[:lead] != after[:lead]:
        return None
    grid = look(x, len(before) - lead)
    return None if grid is None or len(grid.cells) != math.prod(shape) else grid.reshape(shape)


def _expand(node: fx.Node, rank: int, look: Look) -> Grid | None:
    x, shape = source(node), last_sizes(node, rank)
    before, after = sizes(x), sizes(node)
    if shape is None or before is None or after is None or len(before) < rank:
        return None
    if before[: len(before) - rank] != after[: len(after) - rank]:
        return None
    grid = look(x, rank)
    return None if grid is None else grid.broadcast(shape)


def _unsqueeze(node: fx.Node, rank: int, look: Look) -> Grid | None:
    axis = _axis(node, rank, arg(node, "dim"))
    shape = last_sizes(node, rank)
    grid = look(source(node), rank - 1) if axis is not None and rank > 1 else None
    return None if grid is None or shape is None else grid.reshape(shape)


def _transpose(node: fx.Node, rank: int, look: Look) -> Grid | None:
    axes = [_axis(node, rank, arg(node, name)) for name in ("dim0", "dim1")]
    first, second = axes
    if first is None or second is None:
        return None
    dims = list(range(rank))
    dims[first], dims[second] = dims[second], dims[first]
    grid = look(source(node), rank)
    return None if grid is None else grid.permute(dims)


def _permute(node: fx.Node, rank: int, look: Look) -> Grid | None:
    order = [_integer(d) for d in _listed(node)]
    total = ndim(node)
    plain = [d % total for d in order if d is not None]
    lead = total - rank
    if len(plain) != total or plain[:lead] != list(range(lead)):
        return None
    grid = look(source(node), rank)
    return None if grid is None else grid.permute([d - lead for d in plain[lead:]])


def _cat(node: fx.Node, rank: int, look: Look) -> Grid | None:
    axis = _axis(node, rank, arg(node, "dim", 0))
    if axis is None:
        return None
    grids = [look(part, rank) for part in arg(node, "tensors")]
    known = [grid for grid in grids if grid is not None and len(grid.shape) == rank]
    return join(known, axis) if known and len(known) == len(grids) else None


def _stack(node: fx.Node, rank: int, look: Look) -> Grid | None:
    axis = _axis(node, rank, arg(node, "dim", 0))
    if axis is None or rank < 2:
        return None
    grids = [look(part, rank - 1) for part in arg(node, "tensors")]
    known = [
        grid.reshape((*grid.shape[:axis], 1, *grid.shape[axis:]))
        for grid in grids
        if grid is not None and len(grid.shape) == rank - 1
    ]
    return join(known, axis) if known and len(known) == len(grids) else None


def _listed(node: fx.Node) -> tuple[Any, ...]:
    """The ints of `x.permute(0, 2, 1)` or `x.permute((0, 2, 1))`."""
    given = node.args[1:] or tuple(node.kwargs.values())
    first = given[0] if len(given) == 1 else None
    return tuple(first) if isinstance(first, tuple | list) else given


# No `detach`: what is behind it would get a gradient.
_VIEWS: dict[str, Callable[[fx.Node, int, Look], Grid | None]] = {
    "contiguous": _copy,
    "clone": _copy,
    "neg": _negate,
    "mul": _times_minus_one,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "getitem": _getitem,
    "reshape": _reshape,
    "flatten": _reshape,
    "squeeze": _reshape,
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "permute": _permute,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "cat": _cat,
    "stack": _stack,
}
