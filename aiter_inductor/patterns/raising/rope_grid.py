"""The last dimensions of a value, element by element: which inputs each one is computed from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

Read = tuple[fx.Node, int, int]
"""One element of a tensor: the node, how many of its last dimensions, the flat index into them."""

Term = tuple[int, tuple[Read, ...]]
"""A sign, and the elements that are multiplied."""

Cell = tuple[Term, ...]
"""A sum of at most two terms."""


@dataclass(frozen=True)
class Grid:
    """The cells of a value's last dimensions, in row-major order."""

    shape: tuple[int, ...]
    cells: tuple[Cell, ...]

    def take(self, axis: int, indices: Sequence[int]) -> Grid:
        """The grid with entry `indices[i]` of `axis` at place i."""
        n, inner = self.shape[axis], math.prod(self.shape[axis + 1 :])
        outer = math.prod(self.shape[:axis])
        rows = [self.cells[r * inner : (r + 1) * inner] for r in range(outer * n)]
        taken = (rows[o * n + i] for o in range(outer) for i in indices)
        shape = (*self.shape[:axis], len(indices), *self.shape[axis + 1 :])
        return Grid(shape, tuple(itertools.chain.from_iterable(taken)))

    def reshape(self, shape: tuple[int, ...]) -> Grid:
        """The same cells in another shape."""
        return Grid(shape, self.cells)

    def permute(self, dims: Sequence[int]) -> Grid:
        """The grid with axis `dims[i]` at place i."""
        strides = [math.prod(self.shape[d + 1 :]) for d in dims]
        shape = tuple(self.shape[d] for d in dims)
        places = itertools.product(*map(range, shape))
        cells = (self.cells[sum(i * s for i, s in zip(at, strides, strict=True))] for at in places)
        return Grid(shape, tuple(cells))

    def broadcast(self, shape: tuple[int, ...]) -> Grid | None:
        """The grid expanded to `shape`, or None if it does not fit."""
        if len(self.shape) > len(shape):
            return None
        grid = self.reshape((1,) * (len(shape) - len(self.shape)) + self.shape)
        for axis, n in enumerate(shape):
            if grid.shape[axis] != n:
                if grid.shape[axis] != 1:
                    return None
                grid = grid.take(axis, (0,) * n)
        return grid

    def negated(self) -> Grid:
        """Every sign turned."""
        turned = (tuple((-sign, reads) for sign, reads in cell) for cell in self.cells)
        return Grid(self.shape, tuple(turned))

    @cached_property
    def reads(self) -> tuple[Read, ...] | None:
        """The one element behind each cell, if every cell is just that."""
        found = []
        for cell in self.cells:
            if len(cell) != 1 or cell[0][0] != 1 or len(cell[0][1]) != 1:
                return None
            found.append(cell[0][1][0])
        return tuple(found)


def join(grids: Sequence[Grid], axis: int) -> Grid:
    """Concatenate along `axis`."""
    first = grids[0]
    inner = math.prod(first.shape[axis + 1 :])
    outer = math.prod(first.shape[:axis])
    widths = [grid.shape[axis] * inner for grid in grids]
    cells = itertools.chain.from_iterable(
        grid.cells[o * width : (o + 1) * width]
        for o in range(outer)
        for grid, width in zip(grids, widths, strict=True)
    )
    total = sum(grid.shape[axis] for grid in grids)
    return Grid((*first.shape[:axis], total, *first.shape[axis + 1 :]), tuple(cells))
