"""Where the elements of a view come from, by digits: `view`, `expand`, `repeat_interleave`, `[:N]`.

A dimension's index is written in mixed radix, most significant digit first. Each digit either
selects along one axis of the tensor that the views start from, or only repeats. A dimension that
was cut short keeps its digits and has a smaller size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import fx

from aiter_inductor.core.graph import RESHAPES, TRANSPARENT, arg, kind, ndim, sizes, source
from aiter_inductor.core.problem import Dim, fixed

SPREADS = frozenset({"expand", "expand_as", "repeat_interleave"})
TRANSPOSES = frozenset({"transpose", "permute"})


@dataclass(frozen=True)
class Digit:
    """`extent` values, each of which moves `step` along `axis`, or nowhere if that is None."""

    axis: int | None
    step: Dim
    extent: Dim


@dataclass(frozen=True)
class Axes:
    """The digits and the size of every dimension of a view."""

    digits: tuple[tuple[Digit, ...], ...]
    sizes: tuple[Dim, ...]

    def whole(self, index: int) -> bool:
        """Whether a dimension was not cut short."""
        return bool(math.prod(d.extent for d in self.digits[index]) == self.sizes[index])


def start(shape: Sequence[Dim]) -> Axes:
    """The axes of a tensor before any view."""
    digits = tuple(() if n == 1 else (Digit(axis, 1, n),) for axis, n in enumerate(shape))
    return Axes(digits, tuple(shape))


def is_view(node: object) -> TypeGuard[fx.Node]:
    """Whether `through` may know what `node` does to its source's elements."""
    if not isinstance(node, fx.Node):
        return False
    name = kind(node)
    if name == "getitem":
        index = arg(node, "index")
        parts = index if isinstance(index, tuple) else (index,)
        return all(part is None or part is Ellipsis or isinstance(part, slice) for part in parts)
    spread = name in SPREADS or name in RESHAPES or name in TRANSPOSES
    return spread or name in TRANSPARENT or name == "detach" or _is_transposed_attribute(node)


def behind(node: fx.Node) -> Any:
    """What a view is a view of."""
    return node.args[0] if _is_transposed_attribute(node) else source(node)


def through(view: fx.Node, before: Axes) -> Axes | None:
    """The axes after one view; None for a view that no layout of scales needs."""
    name, after = kind(view), sizes(view)
    if after is None:
        return None
    if name in TRANSPARENT or name == "detach":
        return before
    if name in RESHAPES:
        return regroup(before, after)
    if name in ("expand", "expand_as"):
        return broadcast(before, after)
    if name == "repeat_interleave":
        return _repeated(view, before, after)
    if name == "getitem":
        return _indexed(arg(view, "index"), before, after)
    order = _order(view, len(after))
    return None if order is None else reorder(before, order)


def reorder(before: Axes, order: Sequence[int]) -> Axes:
    """The dimensions in another order."""
    return Axes(tuple(before.digits[i] for i in order), tuple(before.sizes[i] for i in order))


def broadcast(before: Axes, after: tuple[Dim, ...]) -> Axes | None:
    """Dimensions of one repeated, and new ones in front."""
    new = len(after) - len(before.sizes)
    digits: list[tuple[Digit, ...]] = [() if n == 1 else (Digit(None, 0, n),) for n in after[:new]]
    for old, n, found in zip(before.sizes, after[new:], before.digits, strict=True):
        if old != n and old != 1:
            return None
        digits.append(found if old == n else (Digit(None, 0, n),))
    return Axes(tuple(digits), after)


def regroup(before: Axes, after: tuple[Dim, ...]) -> Axes | None:
    """The same digits under new dimensions; a digit is split where a boundary falls inside it."""
    if before.sizes == after:
        return before
    pending: list[Digit] = []
    for index, found in enumerate(before.digits):
        if not before.whole(index):
            return _beside_cut(before, after)
        pending += found
    digits = []
    for n in after:
        taken = _take(pending, n)
        if taken is None:
            return None
        digits.append(taken)
    return None if pending else Axes(tuple(digits), after)


def merged(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """Neighbouring digits that count on along one axis, or only repeat, as one."""
    found: list[Digit] = []
    for digit in digits:
        last = found[-1] if found else None
        if last and last.axis == digit.axis and last.step == digit.step * digit.extent:
            found[-1] = Digit(digit.axis, digit.step, last.extent * digit.extent)
        else:
            found.append(digit)
    return tuple(found)


def _beside_cut(before: Axes, after: tuple[Dim, ...]) -> Axes | None:
    """Dimensions of one that come or go beside one that was cut short."""
    kept = [i for i, n in enumerate(before.sizes) if n != 1]
    if [before.sizes[i] for i in kept] != [n for n in after if n != 1]:
        return None
    left = iter(kept)
    return Axes(tuple(() if n == 1 else before.digits[next(left)] for n in after), after)


def _take(pending: list[Digit], n: Dim) -> tuple[Digit, ...] | None:
    """The first digits of `pending` that make a dimension of `n`, removed from it."""
    taken: list[Digit] = []
    left = n
    while left != 1:
        if not pending:
            return None
        digit = pending.pop(0)
        if digit.extent == left:
            taken.append(digit)
            break
        extent, wanted = fixed(digit.extent), fixed(left)
        if extent is not None and wanted is not None and wanted % extent == 0:
            taken.append(digit)
            left = wanted // extent
        elif extent is not None and wanted is not None and extent % wanted == 0:
            low = extent // wanted
            taken.append(Digit(digit.axis, digit.step * low, wanted))
            pending.insert(0, Digit(digit.axis, digit.step, low))
            break
        elif fixed(rest := left / digit.extent) is not None or getattr(rest, "is_integer", False):
            taken.append(digit)
            left = rest
        else:
            return None
    return tuple(taken)


def _repeated(view: fx.Node, before: Axes, after: tuple[Dim, ...]) -> Axes | None:
    times, along = arg(view, "repeats"), arg(view, "dim")
    if not isinstance(times, int) or not isinstance(along, int):
        return None
    digits = list(before.digits)
    along %= len(digits)
    if not before.whole(along):
        return None
    digits[along] = (*digits[along], Digit(None, 0, times))
    return Axes(tuple(digits), after)


def _indexed(index: Any, before: Axes, after: tuple[Dim, ...]) -> Axes | None:
    """`x[:, None, :N]`: new dimensions of one, and dimensions cut short at their end."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(before.sizes) - used)
    else:
        parts += [slice(None)] * (len(before.sizes) - used)
    left = iter(before.digits)
    digits: list[tuple[Digit, ...]] = []
    for part in parts:
        if part is None:
            digits.append(())
        elif isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1):
            digits.append(next(left, ()))
        else:
            return None
    return Axes(tuple(digits), after) if len(digits) == len(after) else None


def _is_transposed_attribute(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("T", "mT")


def _order(view: fx.Node, rank: int) -> list[int] | None:
    order = list(range(rank))
    name = kind(view)
    if name == "permute" and len(view.args) > 1:
        dims = view.args[1] if isinstance(view.args[1], tuple | list) else view.args[1:]
        return [d % rank for d in dims if isinstance(d, int)]
    first, second = arg(view, "dim0", -2), arg(view, "dim1", -1)
    if not isinstance(first, int) or not isinstance(second, int) or ndim(view) < 2:
        return None
    swaps = name == "transpose" or (view.target is getattr and view.args[1] == "mT")
    if (not swaps and rank != 2) or view.kwargs.get("dims") is not None:
        return None
    order[first], order[second] = order[second], order[first]
    return order
