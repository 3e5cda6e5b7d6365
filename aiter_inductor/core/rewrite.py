"""Carry out decisions: replace the nodes that a kernel takes, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from aiter_inductor.core.graph import value
from aiter_inductor.core.match import Derived, Match, Output, fake
from aiter_inductor.core.plan import Decision

_COPIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "fwd_source_fn_stack")


def apply(graph: fx.Graph, decisions: Iterable[Decision]) -> int:
    """Insert the op of every decision that has a provider; returns how many calls it changed.

    An operator that the program calls itself, and that no provider takes, computes its reference:
    left as it is, it would be selected for anew, without the evidence of the plan.

    The last op goes in first: the arguments of a match name the nodes of the graph as captured, and
    those that another op replaces are then exchanged along with all their other uses.
    """
    decisions = tuple(decisions)
    left = [d for d in decisions if d.provider is None]
    calls = [leaf.called for d in left for leaf in d.match.leaves() if leaf.called is not None]
    for call in calls:
        call.kwargs = {**call.kwargs, "provider": "reference"}
    position = {node: i for i, node in enumerate(graph.nodes)}
    taken = [d for d in decisions if d.provider is not None and d.before is not None]
    shared: dict[Derived, fx.Node] = {}
    for decision in sorted(taken, key=lambda d: position[d.before], reverse=True):
        _insert(graph, decision, shared)
    if taken:
        _erase_dead(graph, taken)
        graph.lint()
    return len(taken) + len(calls)


def _insert(graph: fx.Graph, decision: Decision, shared: dict[Derived, fx.Node]) -> None:
    match = decision.match
    assert decision.provider is not None
    assert decision.before is not None
    with graph.inserting_before(decision.before):
        given = (match.args, dict(match.kwargs))
        args, kwargs = (_materialise(graph, v, match, decision.before, shared) for v in given)
        call = graph.call_function(
            match.op.overload, args, {**kwargs, "provider": decision.provider.name}
        )
        _describe(call, match, decision.results)
        single = len(match.outputs) == 1
        for index, output in enumerate(match.outputs):
            if output is None:
                continue
            result = call if single else graph.call_function(operator.getitem, (call, index))
            if not single:
                _describe(result, match, value(call)[index])
            for end in (output, *output.twins):
                _substitute(graph, result, end, match)


def _substitute(graph: fx.Graph, result: fx.Node, output: Output, match: Match) -> None:
    for function, args in output.adapt:
        adapted = graph.call_function(function, (result, *args))
        _describe(adapted, match, function(value(result), *args))
        result = adapted
    own = match.interior | {result}
    output.node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    result.meta["example_value"] = value(output.node)


def _materialise(
    graph: fx.Graph,
    argument: Any,
    match: Match,
    before: fx.Node,
    shared: dict[Derived, fx.Node],
) -> Any:
    """`argument` with every `Derived` inserted into the graph.

    One in `shared` stands at a later op yet: it moves up to this one.
    """
    if isinstance(argument, Derived):
        if argument.shared and argument in shared:
            before.prepend(shared[argument])
            return shared[argument]
        args = _materialise(graph, argument.args, match, before, shared)
        node = graph.call_function(argument.function, args, dict(argument.kwargs))
        _describe(node, match, fake(argument))
        if argument.shared:
            shared[argument] = node
        return node
    if isinstance(argument, dict):
        return {k: _materialise(graph, v, match, before, shared) for k, v in argument.items()}
    if isinstance(argument, tuple | list):
        return type(argument)(_materialise(graph, v, match, before, shared) for v in argument)
    return argument


def _describe(node: fx.Node, match: Match, found: Any) -> None:
    node.meta["example_value"] = found
    for name in _COPIED_META:
        if name in match.anchor.meta:
            node.meta[name] = match.anchor.meta[name]


def _erase_dead(graph: fx.Graph, taken: Iterable[Decision]) -> None:
    """Erase the replaced nodes, last first; those that somebody else still reads stay."""
    matches = [decision.match for decision in taken]
    replaced = {node for match in matches for node in match.interior | match.kept}
    for node in reversed(graph.nodes):
        if node in replaced and not node.users:
            graph.erase_node(node)
