"""Where the rows of several tensors lie, as a nest of at most two loops.

Row kernels read `[*, N]` tensors whose leading dimensions may be permuted or cut out of a wider
tensor. Dimensions that every tensor steps through evenly are merged; comparisons are between
expressions, so that nothing here installs a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

from torch import SymInt, Tensor

from aiter_inductor.core.problem import dim, product

MAX_LEVELS = 2


@dataclass(frozen=True)
class RowNest:
    """Two nested loops over the rows of some tensors of one leading shape.

    Attributes:
        num_rows: rows in all, int or SymInt.
        inner: trip count of the inner loop; 1 where one loop does.
        strides: for each tensor its `(outer, inner)` strides in elements.
    """

    num_rows: Any
    inner: Any
    strides: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class _Loop:
    size: Any
    strides: tuple[Any, ...]

    def contains(self, inner: _Loop) -> bool:
        """Whether one step of this loop passes over all of `inner`, in every tensor."""
        return all(
            _expression(ours) == _expression(inner.size) * _expression(theirs)
            for ours, theirs in zip(self.strides, inner.strides, strict=True)
        )


def row_nest(*tensors: Tensor) -> RowNest | None:
    """The nest over the rows of `tensors`, all `[*, anything]` with equal leading sizes.

    Returns:
        None where the rows need more than two loops.
    """
    loops = _loops(tensors[0].shape[:-1], [t.stride()[:-1] for t in tensors])
    if len(loops) > MAX_LEVELS:
        return None
    zeros = (0,) * len(tensors)
    outer = loops[0] if loops else _Loop(1, zeros)
    inner = loops[1] if len(loops) == MAX_LEVELS else _Loop(1, zeros)
    pairs = tuple(zip(outer.strides, inner.strides, strict=True))
    return RowNest(outer.size * inner.size, inner.size, pairs)


def num_loops(*tensors: Tensor, row_major_output: bool = False) -> int:
    """How many loops the rows of `tensors` need; kernels take up to `MAX_LEVELS`.

    Args:
        row_major_output: one value a row is written too, in the order of the shape.
    """
    sizes = tensors[0].shape[:-1]
    strides = [t.stride()[:-1] for t in tensors]
    if row_major_output:
        strides.append(tuple(product(sizes[axis + 1 :]) for axis in range(len(sizes))))
    return max(len(_loops(sizes, strides)), 1)


def result_is_strided(x: Tensor) -> bool:
    """Whether another dimension than the last is innermost in a dense result laid out like `x`.

    So it is for a transposed `x`, and for one whose rows overlap, as windows over one vector do.
    """
    if x.dim() == 0 or _expression(x.shape[-1]) in (0, 1):
        return False
    last = _expression(x.stride(-1))
    others = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    strides = [_expression(stride) for size, stride in others if _expression(size) != 1]
    return any(s == last or (isinstance(s, int) and s > 0 and _above(last, s)) for s in strides)


def _above(size: Any, number: int) -> bool:
    """Whether a size, symbolic ones taken to be large, is above a number."""
    return size > number if isinstance(size, int) else True


def _loops(sizes: Sequence[Any], strides: Sequence[Sequence[Any]]) -> list[_Loop]:
    if any(isinstance(n, SymInt) for row in (sizes, *strides) for n in row):
        return _find_loops(sizes, strides)
    return _known_loops(tuple(sizes), tuple(map(tuple, strides)))


def _find_loops(sizes: Sequence[Any], strides: Sequence[Sequence[Any]]) -> list[_Loop]:
    axes = enumerate(sizes)
    return _merged(
        [_Loop(n, tuple(s[axis] for s in strides)) for axis, n in axes if _expression(n) != 1]
    )


_known_loops = lru_cache(maxsize=1024)(_find_loops)
"""Eager calls repeat their shapes, and merging loops took a third of such a call's planning."""


def _merged(loops: Sequence[_Loop]) -> list[_Loop]:
    """Loops with every pair merged that can be, whatever their order in the shape."""
    found = list(loops)
    for outer, inner in permutations(found, 2):
        if outer.contains(inner):
            merged = _Loop(outer.size * inner.size, inner.strides)
            rest = [merged if loop is outer else loop for loop in found if loop is not inner]
            return _merged(rest)
    return found


def _expression(size: Any) -> Any:
    return dim(size) if isinstance(size, SymInt) else size
