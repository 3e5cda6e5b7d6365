"""Which nodes of a graph change something, and whether a computation may move across them.

Dynamo's graph is not functional: it holds in-place calls, assignments to slices and switches of the
autograd mode. A match gathers its interior to one point; that is only right if nothing in between
writes to what it reads or changes how autograd or autocast treat it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import value
from aiter_inductor.core.wrapped import plain_tensors

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "ilshift",
        "irshift", "iand", "ior", "ixor", "iconcat", "setitem", "delitem",
    )
)  # fmt: skip
_INPLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _INPLACE_OPERATORS)


@dataclass(frozen=True)
class Effect:
    """One node that must not be crossed: by readers of `storages`, or by anything if None."""

    position: int
    node: fx.Node
    storages: frozenset[int] | None


class Effects:
    """All effects of one graph, and the position of every node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: tuple[fx.Node, ...] = tuple(graph.nodes)
        self.position: dict[fx.Node, int] = {node: i for i, node in enumerate(self.nodes)}
        found = (self._effect(node) for node in self.nodes)
        self.effects = [effect for effect in found if effect is not None]

    def between(
        self, first: int, last: int, reads: frozenset[int], own: Collection[fx.Node] = ()
    ) -> fx.Node | None:
        """A node at `first < position < last` that a reader of `reads` cannot cross.

        Writes by the nodes of `own` are part of the computation that moves.
        """
        for effect in self.effects:
            if first < effect.position < last and effect.node not in own:
                if effect.storages is None or effect.storages & reads:
                    return effect.node
        return None

    def writer(self, node: fx.Node, own: Collection[fx.Node]) -> fx.Node | None:
        """A node behind `node`, not one of `own`, that writes to its storage."""
        held = storages(node)
        for effect in self.effects:
            if effect.position > self.position[node] and effect.node not in own:
                if effect.storages is not None and effect.storages & held:
                    return effect.node
        return None

    def reader(
        self, first: int, last: int, written: frozenset[int], own: Collection[fx.Node]
    ) -> fx.Node | None:
        """A node at `first < position < last`, not one of `own`, that reads from `written`.

        A view of it reads nothing; its readers do.
        """
        for node in self.nodes[first + 1 : last]:
            reads = (storages(source) & written for source in node.all_input_nodes)
            if node not in own and any(reads) and not _only_views(node):
                return node
        return None

    def _effect(self, node: fx.Node) -> Effect | None:
        if node.op not in ("call_function", "call_method", "call_module"):
            return None
        position = self.position[node]
        if _switches_mode(node):
            return Effect(position, node, None)
        written = _written(node)
        if written is None:
            return None
        return Effect(position, node, frozenset(s for w in written for s in storages(w)))


@lru_cache(maxsize=1)
def effects_of(graph: fx.Graph) -> Effects:
    """The effects of a graph that is being planned, found once for all who ask.

    Planning changes no graph; whoever does clears this cache first.
    """
    return Effects(graph)


def storages(node: object) -> frozenset[int]:
    """Identities of the storages behind a node's fake tensors: equal ones may alias."""
    found = value(node) if isinstance(node, fx.Node) else None
    tensors = found if isinstance(found, tuple | list) else (found,)
    return frozenset(
        held.untyped_storage()._cdata
        for t in tensors
        if isinstance(t, torch.Tensor)
        for held in plain_tensors(t)
        if held.layout == torch.strided
    )


def _only_views(node: fx.Node) -> bool:
    """Whether a node is a view of all that it is made from, and writes nothing."""
    own = storages(node)
    aliases = all(own & storages(source) for source in node.all_input_nodes)
    return bool(own) and aliases and not _written(node)


def _switches_mode(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in (
        "_set_grad_enabled",
        "_enter_autocast",
        "_exit_autocast",
        "_enter_inference_mode",
    )


def _written(node: fx.Node) -> list[Any] | None:
    """The nodes that `node` writes to, or None if it is functional."""
    target: Any = node.target
    if "out" in node.kwargs:
        out = node.kwargs["out"]
        return list(out) if isinstance(out, tuple | list) else [out]
    if node.op == "call_method":
        inplace = target.endswith("_") and not target.endswith("__")
        return [node.args[0]] if inplace or target in _INPLACE_METHODS else None
    if node.op == "call_module":
        return None
    if target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return [node.args[0]]
    if isinstance(target, torch._ops.OpOverload):
        return _written_by_schema(node, target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return [n for n in node.all_input_nodes if storages(n)]
    name = getattr(target, "__name__", "")
    # and_, or_ and not_ of the operator module are named so because the plain words are reserved.
    functional = getattr(target, "__module__", "") == operator.add.__module__
    if name.endswith("_") and not name.endswith("__") and not functional and node.args:
        return [node.args[0]]
    return None


def _written_by_schema(node: fx.Node, target: torch._ops.OpOverload) -> list[Any] | None:
    if not target._schema.is_mutable:
        return None
    written: list[Any] = []
    for i, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            written.extend(given if isinstance(given, tuple | list) else [given])
    return written
