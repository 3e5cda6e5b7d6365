"""Groups of experts in a router's graph: DeepSeek lets each token choose within its best groups.

The program gives every group a score, keeps the best groups in a mask, spreads the mask over the
experts and fills what is left out before it chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from aiter_inductor.core.graph import arg, argument, is_last_dim, kind, number, sizes, source


@dataclass(frozen=True)
class Groups:
    """What limits the choice.

    Attributes:
        choice: the scores of all experts, before any is left out.
        number: groups of neighbouring experts.
        kept: groups that a token may choose from.
        score: what a group is kept for, `top2` or `max`.
        fill: what the scores of the others become.
        interior: the nodes between `choice` and the filled scores, these included.
    """

    choice: fx.Node
    number: int
    kept: int
    score: str
    fill: float
    interior: frozenset[fx.Node]


def called(node: object, *names: str) -> bool:
    """Whether `node` calls a method or function of one of these names."""
    if not isinstance(node, fx.Node):
        return False
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return target in names


def parts(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The nodes that take values and indices out of a `topk` or `max`."""
    taken = {arg(user, "index"): user for user in node.users if kind(user) == "getitem"}
    return taken.get(0), taken.get(1)


def largest(node: object) -> int | None:
    """The k of a `topk` of the largest along the last dimension, else None."""
    if not isinstance(node, fx.Node) or kind(node) != "topk":
        return None
    k = number(arg(node, "k"))
    if k is None or not arg(node, "largest", True):
        return None
    return int(k) if is_last_dim(arg(node, "dim", -1), source(node)) else None


def grouped_choice(filled: fx.Node) -> Groups | None:
    """The groups behind `choice.masked_fill(~kept, fill)`, or None if it is something else."""
    if not called(filled, "masked_fill"):
        return None
    choice, mask = argument(filled, 0, "input"), argument(filled, 1, "mask")
    fill = argument(filled, 2, "value")
    shape = sizes(choice)
    if not isinstance(choice, fx.Node) or shape is None or len(shape) != 2:
        return None
    interior = {filled}
    kept_mask = _peel(mask, interior, "invert", "logical_not", "bitwise_not")
    if kept_mask is mask:
        return None  # fills the best groups, not the others
    spread = _spread(_peel(kept_mask, interior, "bool"), shape, interior)
    found = spread and _kept(spread[0], interior)
    amount = number(fill)
    if not spread or not found or amount is None:
        return None
    best, kept = found
    score = _score(best, choice, (shape[0], *spread[1]), interior)
    if score is None:
        return None
    return Groups(choice, spread[1][0], kept, score, amount, frozenset(interior))


def _peel(node: Any, interior: set[fx.Node], *names: str) -> Any:
    """What a call of one of these names is applied to; `node` itself if it is none."""
    if not called(node, *names):
        return node
    interior.add(node)
    return argument(node, 0, "input")


def _spread(
    node: Any, shape: tuple[Any, ...], interior: set[fx.Node]
) -> tuple[fx.Node, tuple[int, int]] | None:
    """A mask [T, G] repeated for the experts of each group, and G and their number."""
    if kind(node) not in ("reshape", "flatten") or sizes(node) != shape:
        return None
    repeated = source(node)
    by_group = sizes(repeated)
    if kind(repeated) != "expand" or by_group is None or len(by_group) != 3:
        return None
    unsqueezed = source(repeated)
    if kind(unsqueezed) != "unsqueeze" or sizes(unsqueezed) != (*by_group[:2], 1):
        return None
    if not all(isinstance(n, int) for n in by_group[1:]) or by_group[0] != shape[0]:
        return None
    interior.update((node, repeated, unsqueezed))
    return source(unsqueezed), (by_group[1], by_group[2])


def _kept(mask: Any, interior: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """The group scores whose best are 1 in `mask`, zeros that a scatter writes to, and how many."""
    scatter = mask if called(mask, "scatter", "scatter_") else None
    if scatter is None and isinstance(mask, fx.Node):
        writers = [user for user in mask.users if called(user, "scatter_")]
        scatter = writers[0] if len(writers) == 1 else None
    if scatter is None or scatter.kwargs.get("reduce") is not None:
        return None
    zeros, axis = argument(scatter, 0, "input"), argument(scatter, 1, "dim")
    index = argument(scatter, 2, "index")
    one = argument(scatter, 3, "src", scatter.kwargs.get("value"))
    if not called(zeros, "zeros_like") or axis not in (1, -1) or number(one) != 1:
        return None
    chosen = _part(index, 1)
    kept = largest(chosen)
    if chosen is None or kept is None or sizes(zeros) != sizes(source(chosen)):
        return None
    interior.update((scatter, zeros, index, chosen))
    return source(chosen), kept


def _part(node: Any, index: int) -> fx.Node | None:
    """The call that `node` takes one result of, else None."""
    if kind(node) != "getitem" or arg(node, "index") != index:
        return None
    called_node = source(node)
    return called_node if isinstance(called_node, fx.Node) else None


def _score(
    best: fx.Node, choice: fx.Node, shape: tuple[Any, ...], interior: set[fx.Node]
) -> str | None:
    """How `best` [T, G] comes from `choice` in groups of `shape`: `top2`, `max`, or None."""
    if kind(best) == "sum" and not arg(best, "keepdim"):
        values = source(best)
        two = _part(values, 0)
        if two is None or largest(two) != 2 or not is_last_dim(arg(best, "dim"), values):
            return None
        name, inner = "top2", {best, values, two}
    else:
        two = _part(best, 0) or best
        if kind(two) not in ("max", "amax") or arg(two, "keepdim"):
            return None
        if not is_last_dim(arg(two, "dim"), source(two)):
            return None
        name, inner = "max", {best, two}
    view = source(two)
    if kind(view) != "reshape" or source(view) is not choice or sizes(view) != shape:
        return None
    interior.update(inner, {view})
    return name
