"""Operators of this package that the program calls by name: the plan chooses their kernels too."""

from __future__ import annotations

import operator

from torch import fx

from aiter_inductor.core.graph import value
from aiter_inductor.core.kinds import CALLED
from aiter_inductor.core.match import Match, Output, recogniser
from aiter_inductor.core.op import OPS, Op


@recogniser(CALLED, CALLED)
def called_operator(node: fx.Node) -> Match | None:
    """`torch.ops.aiter_inductor.attention(...)`, as transformers' attention `aiter` calls it.

    A call that names its provider stays as it is, and so does one that writes to its arguments.
    """
    op = op_of(node)
    if op is None or op.mutates or node.kwargs.get("provider", ""):
        return None
    kwargs = {name: given for name, given in node.kwargs.items() if name != "provider"}
    results = value(node)
    if not isinstance(results, tuple | list):
        return Match(op.name, op, node.args, kwargs, (Output(node),), frozenset({node}))
    parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if not parts or len(parts) < len(node.users):
        return None  # nobody reads it: Dynamo takes every result that is read by its index
    outputs = tuple(Output(parts[i]) if i in parts else None for i in range(len(results)))
    return Match(op.name, op, node.args, kwargs, outputs, frozenset({node, *parts.values()}))


def op_of(node: fx.Node) -> Op | None:
    """The operator that a node calls by name, if it is one of this package."""
    name = str(getattr(node.target, "_opname", "") or getattr(node.target, "__name__", ""))
    return OPS.get(name.partition(".")[0])
