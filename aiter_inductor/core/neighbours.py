"""What Inductor would compute in one kernel with a site, and a kernel of its own stands apart from.

A kernel that beats Inductor's code for an op alone may lose in a model: Inductor puts an embedding
and the norm after it, or a rotation and the copy of its heads, into one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from aiter_inductor.core.graph import PIECES, VIEWS, kind, skip, value
from aiter_inductor.core.match import Match, nodes_in

_ROWS = ("x", "residual", "q", "k", "gate", "up")
"""Arguments that an op passes over; weights and tables are made once."""
_CALLS = frozenset({"linear", "matmul", "bmm", "addmm", "sdpa", "scaled_mm", "scaled_mm_recipes"})
"""Kinds that a library computes, which takes nothing in and lets nothing out but whole tensors."""
_VIEWS = (VIEWS | PIECES) - {"expand"}


def neighbour(match: Match) -> str | None:
    """The name of a node that Inductor would fuse with `match`, or None if it stands alone.

    An operator that the program calls by name stands alone.
    """
    if match.called is not None:
        return None
    for name, argument in match.op.bind(*match.args, **match.kwargs).items():
        if name in _ROWS:
            for node in nodes_in(argument):
                made_by = skip(node, _VIEWS)
                if _generated(made_by):
                    return str(made_by.name)
    for end in match.ends():
        for reader in _readers(end.node, match.interior):
            if _generated(reader):
                return str(reader.name)
    return None


def _readers(node: fx.Node, inside: frozenset[fx.Node]) -> Iterator[fx.Node]:
    """Who reads `node`, whatever views are in between."""
    for user in node.users:
        if user in inside:
            continue
        if kind(user) in _VIEWS:
            yield from _readers(user, inside)
        else:
            yield user


def _generated(node: object) -> bool:
    """Whether `node` is a tensor that Inductor generates code for."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    if kind(node) in _CALLS or not isinstance(value(node), torch.Tensor):
        return False
    library = getattr(node.target, "namespace", "aten")
    return library in ("aten", "prims")
