"""What each element of a head is computed from, read off the graph element by element.

Programs rotate heads by slices, chunks, stacks, reshapes, concatenations and complex numbers. Here
the last dimensions of a value are a small grid of *cells*, each a sum of signed products of
elements of tensors that the walk does not look into. Two spellings of one computation give the same
grid, and a wrong index or sign gives another, so a recogniser compares grids and no spellings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.graph import arg, dtype, kind, ndim, operands, source, value, widens
from aiter_inductor.patterns.raising.rope_grid import Grid, join
from aiter_inductor.patterns.raising.rope_views import last_sizes, viewed


@dataclass
class Lanes:
    """Grids of the nodes around one site, each computed once.

    The parts of a complex value lie along one more axis than the value has.

    Attributes:
        read: nodes seen as elements of other tensors, by the number of their last dimensions
            looked at, inputs before what is made of them.
        computed: nodes seen as sums of products.
        sources: nodes that were not looked into.
    """

    read: dict[tuple[fx.Node, int], Grid | None] = field(default_factory=dict)
    computed: dict[tuple[fx.Node, int], Grid | None] = field(default_factory=dict)
    sources: set[fx.Node] = field(default_factory=set)

    def sum(self, node: Any, rank: int) -> Grid | None:
        """The last `rank` dimensions of `node` as sums of products, None if they are not."""
        if not isinstance(node, fx.Node) or node in self.sources:
            return None
        key = node, rank
        if key not in self.computed:
            self.computed[key] = self._sum(node, rank)
        return self.computed[key]

    def elements(self, node: Any, rank: int) -> Grid | None:
        """The last `rank` dimensions of `node` as elements of other tensors.

        None only where a size is not known when compiling.
        """
        if not isinstance(node, fx.Node):
            return None
        key = node, rank
        if key not in self.read:
            grid = None if node in self.sources else self._elements(node, rank)
            self.read[key] = grid or self._source(node, rank)
        return self.read[key]

    def _sum(self, node: fx.Node, rank: int) -> Grid | None:
        found = kind(node)
        if found in ("add", "sub"):
            return self._added(node, rank, 1 if found == "add" else -1)
        if found == "mul" and isinstance(arg(node, "other"), fx.Node):
            return self._multiplied(node, rank)
        if found == "view_as_real" and rank > 1:
            return self.sum(source(node), rank - 1)
        if found == "cast":
            before = dtype(source(node))
            grid = self.sum(source(node), rank)
            return grid if _rounds_once(before, dtype(node), grid) else None

        def either(part: fx.Node, part_rank: int) -> Grid | None:
            grid = self.sum(part, part_rank)
            if grid is None:
                return self.elements(part, part_rank)
            return grid if dtype(part) == dtype(node) else None

        grid = viewed(node, rank, either)
        if grid is None or all(len(reads) < 2 for cell in grid.cells for _, reads in cell):
            return None
        return grid

    def _added(self, node: fx.Node, rank: int, sign: int) -> Grid | None:
        pair = operands(node, kind(node) or "")
        shape = last_sizes(node, rank)
        if pair is None or shape is None:
            return None
        grids = []
        for operand in pair:
            grid = self.sum(operand, rank)
            if grid is None or dtype(operand) != dtype(node):
                return None
            grids.append(grid.broadcast(shape))
        left, right = grids
        if left is None or right is None:
            return None
        right = right if sign == 1 else right.negated()
        cells = tuple(a + b for a, b in zip(left.cells, right.cells, strict=True))
        return Grid(shape, cells) if all(len(cell) <= 2 for cell in cells) else None

    def _multiplied(self, node: fx.Node, rank: int) -> Grid | None:
        pair, shape = operands(node, "mul"), last_sizes(node, rank)
        if pair is None or shape is None:
            return None
        left, right = (self.elements(p, min(rank, ndim(p))) if ndim(p) > 0 else None for p in pair)
        if left is None or right is None:
            return None
        if not _is_complex(node):
            return _product(left, right, shape)
        if not (_is_complex(pair[0]) and _is_complex(pair[1])):
            return None
        return _complex_product(left, right, shape)

    def _elements(self, node: fx.Node, rank: int) -> Grid | None:
        if kind(node) == "cast":
            return self.elements(source(node), rank) if widens(node) else None
        if kind(node) == "view_as_complex":
            return self.elements(source(node), rank + 1)
        return None if _is_complex(node) else viewed(node, rank, self.elements)

    def _source(self, node: fx.Node, rank: int) -> Grid | None:
        """A tensor that is not looked into."""
        shape = last_sizes(node, rank)
        found = value(node)
        if shape is None or not isinstance(found, torch.Tensor) or found.is_conj():
            return None
        shape = (*shape, 2) if found.is_complex() else shape
        self.sources.add(node)
        period = shape[-1] // 2 if rank == 1 and repeats_itself(node) else math.prod(shape)
        cells = (
            ((1, ((node, rank, i % period if period else i),)),) for i in range(math.prod(shape))
        )
        return Grid(shape, tuple(cells))


def _product(left: Grid, right: Grid, shape: tuple[int, ...]) -> Grid | None:
    """Cell by cell, of single elements."""
    a, b = left.broadcast(shape), right.broadcast(shape)
    if a is None or b is None:
        return None
    cells = []
    for first, second in zip(a.cells, b.cells, strict=True):
        if len(first) != 1 or len(second) != 1:
            return None
        (sign, reads), (other_sign, other_reads) = first[0], second[0]
        cells.append(((sign * other_sign, reads + other_reads),))
    return Grid(shape, tuple(cells))


def _complex_product(left: Grid, right: Grid, shape: tuple[int, ...]) -> Grid | None:
    """Of numbers whose real and imaginary parts lie along the last axis, which `shape` lacks."""
    a, b = left.broadcast((*shape, 2)), right.broadcast((*shape, 2))
    if a is None or b is None:
        return None
    last = len(shape)
    a_re, a_im, b_re, b_im = (g.take(last, (part,)) for g in (a, b) for part in (0, 1))
    parts = []
    for first, second in (((a_re, b_re), (a_im.negated(), b_im)), ((a_re, b_im), (a_im, b_re))):
        p, q = _product(*first, a_re.shape), _product(*second, a_re.shape)
        if p is None or q is None:
            return None
        parts.append(Grid(p.shape, tuple(x + y for x, y in zip(p.cells, q.cells, strict=True))))
    return join(parts, last)


def _is_complex(node: Any) -> bool:
    found = value(node)
    return isinstance(found, torch.Tensor) and found.is_complex()


def repeats_itself(node: fx.Node) -> bool:
    """Whether the two halves of the last dimension are equal: a function of `cat((t, t))`."""
    current: Any = node
    for _ in range(8):
        found = kind(current)
        if found == "cat":
            parts = arg(current, "tensors")
            along = arg(current, "dim", 0) in (-1, ndim(current) - 1)
            return along and len(parts) == 2 and parts[0] is parts[1]
        if found in ("cos", "sin", "cast", "contiguous", "clone"):
            current = source(current)
        elif found == "mul" and not isinstance(value(arg(current, "other")), torch.Tensor):
            current = source(current)
        elif found == "unsqueeze" and ndim(current) > 1 and last_sizes(current, 1) != (1,):
            current = source(current)
        else:
            return False
    return False


def _rounds_once(before: torch.dtype | None, after: torch.dtype | None, grid: Grid | None) -> bool:
    """Whether a cast of finished sums is one the op can make: none, or one from its fp32."""
    if before is None or after is None or not after.is_floating_point or grid is None:
        return False
    finished = all(len(cell) == 2 for cell in grid.cells if len(cell[0][1]) == 2)
    return before == after or (accumulate_dtype(before) == before and finished)
