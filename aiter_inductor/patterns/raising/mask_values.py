"""What the nodes that build an attention mask hold, read off the graph.

An interpreter over `Affine`, `Condition` and `Additive`; a node it does not know, a tensor whose
values only the run will tell included, is None, and so is everything computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.effects import effects_of, storages
from aiter_inductor.core.graph import argument, dtype, ndim, number, sizes, tensor, value
from aiter_inductor.core.problem import dim
from aiter_inductor.patterns.raising.mask_affine import (
    FALSE,
    TRUE,
    Additive,
    Affine,
    Condition,
    Numbers,
    Value,
    at_least_zero,
)

_MODULES = frozenset({"_operator", "torch", "torch.nn.functional", "torch._C._nn"})


class Reader:
    """Evaluates nodes; remembers which it has seen."""

    def __init__(self) -> None:
        self.seen: dict[fx.Node, Value | None] = {}

    def read(self, node: object) -> Value | None:
        """The value of a node or a number, None if it is not known."""
        if isinstance(node, bool):
            return TRUE if node else FALSE
        if isinstance(node, int | torch.SymInt):
            return Affine((), dim(node))
        if not isinstance(node, fx.Node):
            return None
        if isinstance(found := value(node), int | torch.SymInt) and not isinstance(found, bool):
            return Affine((), dim(found))
        if node not in self.seen:
            self.seen[node] = self._flattened(node)
        return self.seen[node]

    def is_mutated(self, graph: fx.Graph) -> bool:
        """Whether the program writes into one of the tensors that were read."""
        touched = frozenset(s for node in self.seen for s in storages(node))
        effects = effects_of(graph).effects
        return any(e.storages and e.storages & touched for e in effects)

    def _flattened(self, node: fx.Node) -> Value | None:
        """The node's value, with no coefficient on dimensions of size 1."""
        rule = _RULES.get(_name(node))
        found = rule(self, node) if rule is not None else None
        found = _unknown_numbers(node) if found is None else found
        shape = sizes(node)
        if found is None or shape is None:
            return None
        if isinstance(found, Affine):
            return _on(found, shape)
        if isinstance(found, Numbers):
            row, token = _on(found.row, shape), _on(found.token, shape)
            return replace(found, row=row, token=token)
        condition = found.seen if isinstance(found, Additive) else found
        atoms = at_least_zero(*(_on(atom, shape) for atom in condition.atoms))
        seen = replace(condition, atoms=atoms.atoms)
        return Additive(seen) if isinstance(found, Additive) else seen


def _unknown_numbers(node: fx.Node) -> Numbers | None:
    """What only the run knows of an integer tensor [B, S]; rows may be one that was expanded."""
    kinds = dtype(node)
    if ndim(node) != 2 or kinds not in (torch.int32, torch.int64):
        return None
    while _name(node) == "expand" and (sizes(_operand(node)) or ())[1:] == (sizes(node) or ())[1:]:
        node = _operand(node)
    rows = 0 if (sizes(node) or ())[0] == 1 else 1
    return Numbers(node, Affine((rows, 0), 0), Affine((0, 1), 0))


def _on(found: Affine, shape: tuple[Any, ...]) -> Affine:
    coefficients = (0,) * (len(shape) - len(found.coefficients)) + found.coefficients
    kept = tuple(0 if n == 1 else c for c, n in zip(coefficients, shape, strict=True))
    return Affine(kept, found.constant)


def _name(node: fx.Node) -> str:
    """`add` for `operator.add`, `torch.add` and the method; empty for anything else.

    torch 2.11's Dynamo writes some comparisons of tensors as methods, `__eq__` for `==`.
    """
    if node.op == "call_method":
        method = str(node.target)
        return method[2:-2] if method.startswith("__") else method
    known = node.op == "call_function" and getattr(node.target, "__module__", "") in _MODULES
    return str(getattr(node.target, "__name__", "")) if known else ""


def _operand(node: fx.Node) -> Any:
    return argument(node, 0, "input")


def _arange(reader: Reader, node: fx.Node) -> Value | None:
    kinds = dtype(node)
    if kinds is None or kinds.is_floating_point:
        return None
    bounds = list(node.args)
    given = node.kwargs
    start = bounds[0] if len(bounds) > 1 else given.get("start", 0)
    step = bounds[2] if len(bounds) > 2 else given.get("step", 1)
    begin = reader.read(start)
    if not isinstance(begin, Affine) or not isinstance(step, int):
        return None
    return Affine((step,), begin.constant)


def _sum(reader: Reader, node: fx.Node) -> Value | None:
    return _linear(reader, node, 1)


def _difference(reader: Reader, node: fx.Node) -> Value | None:
    return _linear(reader, node, -1)


def _linear(reader: Reader, node: fx.Node, sign: int) -> Value | None:
    left, right = _operands(reader, node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(left, Affine) and isinstance(right, Affine):
        return left + right * sign
    if isinstance(right, Numbers) and sign > 0:
        left, right = right, left
    if isinstance(left, Numbers) and isinstance(right, Affine) and right.is_constant:
        return left.plus(right.constant * sign)
    return None


def _operands(reader: Reader, node: fx.Node) -> tuple[Value | None, Value | None]:
    return reader.read(_operand(node)), reader.read(argument(node, 1, "other"))


def _integers(reader: Reader, node: fx.Node) -> tuple[Affine, Affine] | None:
    left, right = _operands(reader, node)
    return (left, right) if isinstance(left, Affine) and isinstance(right, Affine) else None


def _compare(atoms: Callable[[Affine], tuple[Affine, ...]]) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: fx.Node) -> Value | None:
        left, right = _operands(reader, node)
        if isinstance(left, Affine) and isinstance(right, Affine):
            return at_least_zero(*atoms(left - right))
        if not isinstance(left, Numbers) or not isinstance(right, Numbers):
            return None
        if not left.is_beside(right):
            return None
        apart = (left.token - right.token).plus(left.offset - right.offset)
        return at_least_zero(*atoms(apart)) & Condition(stepping=frozenset({left.of}))

    return rule


_equal_integers = _compare(lambda d: (d, -d))


def _equals(reader: Reader, node: fx.Node) -> Value | None:
    """Of integers, or of the documents of queries [B, 1, S, 1] and keys [B, 1, 1, S]."""
    left, right = _operands(reader, node)
    if not isinstance(left, Numbers) or not isinstance(right, Numbers):
        return _equal_integers(reader, node)
    of_pairs = {Affine((0, 0, 1, 0), 0), Affine((0, 0, 0, 1), 0)}
    if not left.is_beside(right) or {left.token, right.token} != of_pairs:
        return None
    if left.offset != right.offset or not counts_documents(left.of):
        return None
    return Condition(documents=frozenset({left.of}))


def counts_documents(node: fx.Node) -> bool:
    """Whether [B, S] counts along each row how often something held: equal numbers are a run."""
    if _name(node) != "cumsum" or dtype(_operand(node)) != torch.bool:
        return False
    return argument(node, 1, "dim") in (-1, 1)


def counts_where_it_jumps(node: fx.Node, positions: fx.Node) -> bool:
    """Whether documents begin wherever `positions` do not go on by one from the token before."""
    jumps = _operand(node)
    if not isinstance(jumps, fx.Node) or _name(jumps) != "ne" or argument(jumps, 1, "other") != 1:
        return False
    steps = _operand(jumps)
    if not isinstance(steps, fx.Node) or _name(steps) != "diff" or steps.kwargs.get("append"):
        return False
    prepended = sizes(steps.kwargs.get("prepend")) or ()
    along = argument(steps, 2, "dim", -1) in (-1, 1) and argument(steps, 1, "n", 1) == 1
    compared = _operand(steps)
    found = _unknown_numbers(compared) if isinstance(compared, fx.Node) else None
    return along and prepended[1:] == (1,) and found is not None and found.of is positions


def _differs(reader: Reader, node: fx.Node) -> Value | None:
    pair = _integers(reader, node)
    delta = pair[0] - pair[1] if pair else None
    if delta is None or not delta.is_constant or not isinstance(delta.constant, int):
        return None
    return TRUE if delta.constant else FALSE


def _both(reader: Reader, node: fx.Node) -> Value | None:
    left, right = reader.read(_operand(node)), reader.read(argument(node, 1, "other"))
    if isinstance(left, Condition) and isinstance(right, Condition):
        return left & right
    return None


def _inverse(reader: Reader, node: fx.Node) -> Value | None:
    found = reader.read(_operand(node))
    return found.inverted() if isinstance(found, Condition) else None


def _ones(reader: Reader, node: fx.Node) -> Value | None:
    return TRUE if dtype(node) == torch.bool else None


def _full(reader: Reader, node: fx.Node) -> Value | None:
    fill = argument(node, 1, "fill_value")
    return TRUE if dtype(node) == torch.bool and fill is True else None


def _tril(reader: Reader, node: fx.Node) -> Value | None:
    """Bool ones below a diagonal: key <= query + diagonal."""
    found, diagonal = reader.read(_operand(node)), argument(node, 1, "diagonal", 0)
    if found != TRUE or not isinstance(diagonal, int):
        return None
    return at_least_zero(Affine((0,) * (ndim(node) - 2) + (1, -1), diagonal))


def _triu(reader: Reader, node: fx.Node) -> Value | None:
    """Bool ones above a diagonal: key >= query + diagonal."""
    found, diagonal = reader.read(_operand(node)), argument(node, 1, "diagonal", 0)
    if found != TRUE or not isinstance(diagonal, int):
        return None
    return at_least_zero(Affine((0,) * (ndim(node) - 2) + (-1, 1), -diagonal))


def _same(reader: Reader, node: fx.Node) -> Value | None:
    """A copy, or a cast that keeps integers integers and conditions conditions."""
    before, after = tensor(_operand(node)), tensor(node)
    if before is None or after is None or before.shape != after.shape:
        return None
    was_bool, is_bool = before.dtype == torch.bool, after.dtype == torch.bool
    was_float, is_float = before.is_floating_point(), after.is_floating_point()
    return reader.read(_operand(node)) if (was_bool, was_float) == (is_bool, is_float) else None


def _expand(reader: Reader, node: fx.Node) -> Value | None:
    return reader.read(_operand(node))


def _unsqueeze(reader: Reader, node: fx.Node) -> Value | None:
    at = argument(node, 1, "dim")
    if not isinstance(at, int):
        return None
    at = at + ndim(node) if at < 0 else at
    index = (*(slice(None),) * at, None)
    return _basic(reader.read(_operand(node)), index, ndim(_operand(node)))


def _getitem(reader: Reader, node: fx.Node) -> Value | None:
    found, index = reader.read(_operand(node)), node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if isinstance(found, Numbers):
        row, token = (_indexed(reader, part, index, node) for part in (found.row, found.token))
        if not isinstance(row, Affine) or not isinstance(token, Affine):
            return None
        return replace(found, row=row, token=token)
    return _indexed(reader, found, index, node)


def _indexed(
    reader: Reader, found: Value | None, index: tuple[Any, ...], node: fx.Node
) -> Value | None:
    if any(isinstance(i, fx.Node) for i in index):
        return _gathered(reader, found, index, node)
    return _basic(found, index, ndim(_operand(node)))


def _basic(found: Value | None, index: tuple[Any, ...], rank: int) -> Value | None:
    """Indexing with slices from the start, None, an Ellipsis and integers from the start."""
    if isinstance(found, Additive):
        seen = _basic(found.seen, index, rank)
        return Additive(seen) if isinstance(seen, Condition) else None
    if isinstance(found, Condition):
        if found.reads_numbers and not all(item in (Ellipsis, slice(None)) for item in index):
            return None
        atoms = [_basic(atom, index, rank) for atom in found.atoms]
        kept = [atom for atom in atoms if isinstance(atom, Affine)]
        return replace(found, atoms=frozenset(kept)) if len(kept) == len(atoms) else None
    if not isinstance(found, Affine):
        return None
    left = list((0,) * (rank - len(found.coefficients)) + found.coefficients)
    named = sum(item is not None and item is not Ellipsis for item in index)
    made: list[int] = []
    constant = found.constant
    for item in index:
        if item is None:
            made.append(0)
        elif item is Ellipsis:
            made += [left.pop(0) for _ in range(rank - named)]
        elif isinstance(item, slice) and _from_start(item):
            coefficient = left.pop(0)
            constant = constant + coefficient * (item.start or 0)
            made.append(coefficient)
        elif isinstance(item, int) and item >= 0:
            constant = constant + left.pop(0) * item
        else:
            return None
    return Affine((*made, *left), constant)


def _from_start(item: slice) -> bool:
    start = item.start is None or (isinstance(item.start, int) and item.start >= 0)
    return start and item.step in (None, 1)


def _gathered(
    reader: Reader, found: Value | None, index: tuple[Any, ...], node: fx.Node
) -> Value | None:
    """`x[b, q]` with index tensors for every dimension, none of them negative."""
    if not isinstance(found, Affine) or len(index) != ndim(_operand(node)):
        return None
    total = Affine((), found.constant)
    coefficients = (0,) * (len(index) - len(found.coefficients)) + found.coefficients
    for coefficient, item in zip(coefficients, index, strict=True):
        if not coefficient:
            continue
        at, shape = reader.read(item), sizes(item)
        if not isinstance(at, Affine) or shape is None:
            return None
        if at_least_zero(Affine((), at.least(shape))) != TRUE:
            return None
        total = total + at * coefficient
    return total


def _diff(reader: Reader, node: fx.Node) -> Value | None:
    """`torch.diff(x, prepend=first, dim=-1)` where the step is the same everywhere."""
    x, first = reader.read(_operand(node)), reader.read(node.kwargs.get("prepend"))
    axis = argument(node, 2, "dim", -1)
    if not isinstance(x, Affine) or not isinstance(first, Affine) or argument(node, 1, "n", 1) != 1:
        return None
    prepended = tensor(node.kwargs["prepend"])
    if axis not in (-1, ndim(node) - 1) or prepended is None or dim(prepended.shape[-1]) != 1:
        return None
    step = x.coefficients[-1]
    start = Affine((*x.coefficients[:-1], 0), x.constant) - first
    return Affine((), step) if start.is_constant and start.constant == step else None


def _cumsum(reader: Reader, node: fx.Node) -> Value | None:
    found = reader.read(_operand(node))
    nothing = isinstance(found, Condition) and found.is_false
    return Affine((), 0) if nothing or found == Affine((0,) * ndim(node), 0) else None


def _where(reader: Reader, node: fx.Node) -> Value | None:
    """`torch.where(seen, 0, lowest)`."""
    condition = reader.read(argument(node, 0, "condition"))
    shown, hidden = argument(node, 1, "input"), argument(node, 2, "other")
    if not isinstance(condition, Condition):
        return None
    return Additive(condition) if _is_zero(shown) and _is_lowest(hidden, node) else None


def _masked_fill(reader: Reader, node: fx.Node) -> Value | None:
    """`zeros.masked_fill(hidden, lowest)`."""
    hidden = reader.read(argument(node, 1, "mask"))
    seen = hidden.inverted() if isinstance(hidden, Condition) else None
    fill = argument(node, 2, "value")
    if seen is None or not (_is_zero(_operand(node)) and _is_lowest(fill, node)):
        return None
    return Additive(seen)


def _is_zero(operand: object) -> bool:
    zeros = isinstance(operand, fx.Node) and _name(operand) in ("zeros", "zeros_like", "new_zeros")
    return zeros or number(operand) == 0


def _is_lowest(operand: object, node: fx.Node) -> bool:
    """Whether a fill value is minus infinity or the lowest number of the mask's dtype."""
    found, kinds = number(operand), dtype(node)
    if found is None or kinds is None or not kinds.is_floating_point:
        return False
    return found == -math.inf or found <= torch.finfo(kinds).min


_RULES: Mapping[str, Callable[[Reader, fx.Node], Value | None]] = {
    "arange": _arange,
    "add": _sum,
    "sub": _difference,
    "le": _compare(lambda d: (-d,)),
    "lt": _compare(lambda d: (-d.plus(1),)),
    "ge": _compare(lambda d: (d,)),
    "gt": _compare(lambda d: (d.plus(-1),)),
    "eq": _equals,
    "ne": _differs,
    **dict.fromkeys(("and_", "and", "bitwise_and", "logical_and"), _both),
    **dict.fromkeys(("invert", "inv", "bitwise_not", "logical_not"), _inverse),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _ones),
    "full": _full,
    "tril": _tril,
    "triu": _triu,
    **dict.fromkeys(("to", "bool", "long", "int", "clone", "contiguous", "detach"), _same),
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "diff": _diff,
    "cumsum": _cumsum,
    "where": _where,
    "masked_fill": _masked_fill,
}
