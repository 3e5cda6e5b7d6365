"""What recognisers and fusions produce: a claim that some nodes of a graph compute one op.

Nothing is rewritten while matches are made. A plan is a set of matches; the graph changes once,
when a provider has accepted, so a site that nobody takes stays exactly as the program wrote it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import PIECES, VIEWS, kind, value
from aiter_inductor.core.kinds import CALLED
from aiter_inductor.core.op import Op


@dataclass(frozen=True)
class Derived:
    """An op argument that the graph does not hold yet: `function(*args)`, inserted on rewrite.

    Attributes:
        function, args: the call.
        kwargs: its keywords, pairs of name and value without nodes.
        shared: it is inserted once for all ops that ask for it. Nothing may write to what it reads.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Output:
    """A node that one result of the op replaces.

    Attributes:
        node: the graph's own node.
        adapt: calls that turn the op's result into what `node` holds, such as
            `(torch.squeeze, (-1,))`; each gets the value so far as first argument.
        twins: other nodes that the same result replaces, where the program computes it repeatedly.
    """

    node: fx.Node
    adapt: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = ()
    twins: tuple[Output, ...] = ()


@dataclass(frozen=True, eq=False)
class Match:
    """A claim that `interior` computes `op(*args, **kwargs)`.

    Attributes:
        pattern: the name under which the report counts it; empty for a fusion of `parts`.
        args, kwargs: the op's arguments: nodes, numbers, dtypes, `Derived`s.
        outputs: per result of the op the node it replaces, or None where the graph has none.
        interior: all nodes that the op computes, outputs included.
        parts: the matches a fusion was made of; they stand in if nobody takes the fusion.
        kept: nodes that the op computes anew and that may stay for other readers, as an activation
            does that is dequantised once for several linears.
    """

    pattern: str
    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Output | None, ...]
    interior: frozenset[fx.Node]
    parts: tuple[Match, ...] = ()
    kept: frozenset[fx.Node] = frozenset()

    @property
    def anchor(self) -> fx.Node:
        """The node that stands for the whole: the first output the graph has."""
        return next(output.node for output in self.outputs if output is not None)

    def ends(self) -> Iterator[Output]:
        """Every output that the graph has, twins included."""
        for output in self.outputs:
            if output is not None:
                yield from (output, *output.twins)

    def argument(self, name: str) -> Any:
        """One op argument by its name in the reference's signature, default included."""
        return self.op.bind(*self.args, **self.kwargs)[name]

    @property
    def called(self) -> fx.Node | None:
        """The program's own call of this package's operator, if that is what was recognised."""
        return next((node for node in self.interior if kind(node) == CALLED), None)

    def leaves(self) -> Iterator[Match]:
        """The recognised sites inside: the match itself, or its parts' leaves."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def inputs(self) -> Iterator[fx.Node]:
        """Every graph node the op reads."""
        yield from nodes_in((self.args, tuple(self.kwargs.values())))


@dataclass(frozen=True)
class Miss:
    """A node that looks like a pattern but is not one a kernel could take, and why."""

    pattern: str
    node: fx.Node
    reason: str


Recognise = Callable[[fx.Node], "Match | Miss | None"]


@dataclass(frozen=True)
class Recogniser:
    """One spelling family: the node kinds it starts from, and the walker."""

    pattern: str
    anchors: frozenset[str]
    recognise: Recognise


def recogniser(pattern: str, *anchors: str) -> Callable[[Recognise], Recogniser]:
    """Declare a walker that is tried on every node whose kind is one of `anchors`."""
    return lambda walk: Recogniser(pattern, frozenset(anchors), walk)


class Matches:
    """All current matches of one graph, looked up by the nodes that they compute.

    Where several compute a node, the first in graph order is found.
    """

    def __init__(self) -> None:
        self._places: list[Match | None] = []
        self._place_of: dict[Match, int] = {}
        self._computing: dict[fx.Node, set[Match]] = defaultdict(set)

    @property
    def found(self) -> list[Match]:
        """Every match, in graph order."""
        return [match for match in self._places if match is not None]

    def __contains__(self, match: Match) -> bool:
        return match in self._place_of

    def add(self, match: Match) -> None:
        """Append a match, which stands behind all others in the graph."""
        self._places.append(None)
        self._put(match, len(self._places) - 1)

    def producing(self, node: object) -> Match | None:
        """The match that has `node` as an output."""
        if not isinstance(node, fx.Node):
            return None
        computing = self._computing.get(node, ())
        return self._first(m for m in computing if any(end.node is node for end in m.ends()))

    def containing(self, node: fx.Node) -> Match | None:
        """The match that computes `node`."""
        return self._first(m for m in self._computing.get(node, ()) if node in m.interior)

    def of(self, op: Op) -> list[Match]:
        """Every match of `op`, in graph order."""
        return [match for match in self._places if match is not None and match.op is op]

    def replace(self, old: Iterable[Match], new: Match) -> None:
        """Put `new` in the place of the first of `old`, each of which is here once."""
        self._put(new, min([self._drop(match) for match in old]))

    def _put(self, match: Match, place: int) -> None:
        self._places[place], self._place_of[match] = match, place
        for node in _computed(match):
            self._computing[node].add(match)

    def _drop(self, match: Match) -> int:
        place = self._place_of.pop(match)
        self._places[place] = None
        for node in _computed(match):
            self._computing[node].discard(match)
        return place

    def _first(self, matches: Iterable[Match]) -> Match | None:
        return min(matches, key=self._place_of.__getitem__, default=None)


def _computed(match: Match) -> set[fx.Node]:
    return {*match.interior, *(end.node for end in match.ends())}


Fuse = Callable[[Match, Matches], "Match | str | None"]


@dataclass(frozen=True)
class Fusion:
    """One rule that merges a match with what feeds it or stands beside it.

    `fuse(match, matches)` returns the fused match, the sentence why a neighbour that was found
    cannot be merged, or None where there is no neighbour. The fused match's `parts` are replaced.
    """

    name: str
    ops: tuple[Op, ...]
    fuse: Fuse


def fusion(name: str, *ops: Op) -> Callable[[Fuse], Fusion]:
    """Declare a fusion that is tried on every match of one of `ops`."""
    return lambda fuse: Fusion(name, ops, fuse)


def nodes_in(values: Any) -> Iterator[fx.Node]:
    """Every node inside nested tuples, lists and `Derived`s."""
    if isinstance(values, fx.Node):
        yield values
    elif isinstance(values, Derived):
        yield from nodes_in(values.args)
    elif isinstance(values, tuple | list):
        for item in values:
            yield from nodes_in(item)


def fake(argument: Any) -> Any:
    """The fake value of an op argument; must run under the graph's fake mode.

    Without gradients: saving a tensor for one would call the program's hooks on saved tensors, by
    which checkpointing counts.
    """
    if isinstance(argument, fx.Node):
        return value(argument)
    if isinstance(argument, Derived):
        with torch.no_grad():
            return argument.function(*(fake(a) for a in argument.args), **dict(argument.kwargs))
    if isinstance(argument, tuple | list):
        return type(argument)(fake(item) for item in argument)
    return argument


DUPLICABLE = VIEWS | PIECES | {"cast", "neg"}
"""Kinds cheap enough to stay in the graph for another user while a kernel computes them again."""


def readers(node: fx.Node, inside: Collection[fx.Node]) -> list[fx.Node]:
    """Who reads the values of `node` besides `inside`.

    A view or cast that only `inside` reads is no reader, nor is a query of its sizes.
    """
    found = []
    for user in node.users:
        if user in inside or isinstance(value(user), torch.Size | torch.SymInt | int):
            continue
        idle = kind(user) in DUPLICABLE and user.users and not readers(user, inside)
        if not idle:
            found.append(user)
    return found


def leak(match: Match) -> str | None:
    """Why the interior cannot disappear: a costly intermediate that something else reads too."""
    ends = {output.node for output in match.ends()}
    for node in match.interior - ends:
        outside = readers(node, match.interior)
        if outside and kind(node) not in DUPLICABLE and isinstance(value(node), torch.Tensor):
            return (
                f"intermediate {node.name} has {len(node.users)} users, "
                f"{len(outside)} of them outside ({outside[0].name})"
            )
    return None
