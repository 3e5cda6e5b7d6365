"""Which nodes count as writing to their first argument."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from aiter_inductor.core.effects import Effects

WRITING = [
    operator.iadd, operator.imul, operator.imod, operator.ixor, operator.ilshift, operator.setitem,
    torch.relu_, torch.ops.aten.add_.Tensor, "add_", "copy_", "__setitem__", "__iadd__", "__ior__",
]  # fmt: skip
READING = [
    operator.and_, operator.or_, operator.not_, operator.is_, operator.add, torch.relu,
    torch.ops.aten.add.Tensor, "add", "__and__", "__invert__", "__index__", "is_floating_point",
]  # fmt: skip


def one_call(target):
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta["val"], y.meta["val"] = torch.ones(2), torch.ones(2)
    op = "call_method" if isinstance(target, str) else "call_function"
    return graph, x, graph.create_node(op, target, (x, y))


def named(target):
    """The same in every process, unlike the text of a builtin method, which holds an address."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


@pytest.mark.parametrize("target", WRITING, ids=named)
def test_writes_to_its_first_argument(target):
    graph, x, node = one_call(target)
    (effect,) = Effects(graph).effects
    assert effect.node is node
    assert effect.storages == frozenset({x.meta["val"].untyped_storage()._cdata})


@pytest.mark.parametrize("target", READING, ids=named)
def test_writes_to_nothing(target):
    graph, _, _ = one_call(target)
    assert Effects(graph).effects == []
