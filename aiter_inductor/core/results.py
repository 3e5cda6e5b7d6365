"""What a match's op would give, computed on fake values."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.graph import value
from aiter_inductor.core.match import Match, fake
from aiter_inductor.core.problem import dim

_SCALARS = (int, float, str, type(None), torch.dtype, torch.device)


class FakeResults:
    """Runs ops on the fake values of one graph; must be asked under the graph's fake mode.

    Layers that are alike share their results, which are read for shape, dtype and strides only.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def of(self, match: Match, provider: str) -> Any:
        """What the operator of `match` returns for the graph's fake values."""
        args = tuple(fake(argument) for argument in match.args)
        kwargs = {name: fake(argument) for name, argument in match.kwargs.items()}
        described = _described((*args, tuple(kwargs), *kwargs.values()))
        key = (match.op.name, provider, described)
        if described is not None and key in self._known:
            return self._known[key]
        # Without gradients, as `fake` and for its reason.
        with torch.no_grad():
            results = match.op(*args, **kwargs, provider=provider)
        if described is not None:
            self._known[key] = results
        return results


def mismatch(match: Match, results: Any) -> str | None:
    """Why the op's results could not stand for the graph's nodes: another shape, dtype or stride.

    A reference that disagrees with the program it was matched to becomes a refusal here and never
    a wrong graph.

    Args:
        match: a claim about some nodes.
        results: what its op gives for their fake values.
    """
    results = results if isinstance(results, tuple) else (results,)
    for output, result in zip(match.outputs, results, strict=True):
        if output is None:
            continue
        for function, args in output.adapt:
            result = function(result, *args)
        want = value(output.node)
        if (found := _layout(result)) != (wanted := _layout(want)):
            return f"{output.node.name} is {wanted} but {match.op.name} would give {found}"
    return None


def _described(argument: Any) -> Hashable | None:
    """All that decides an op's fake result about one argument; None if that is not known."""
    if isinstance(argument, torch.Tensor):
        shape, stride = (tuple(map(dim, each)) for each in (argument.shape, argument.stride()))
        return (argument.dtype, argument.device, shape, stride)
    if isinstance(argument, tuple | list):
        parts = tuple(map(_described, argument))
        return None if None in parts else parts
    # 1, 1.0 and True are equal, but not alike.
    return (type(argument), argument) if isinstance(argument, _SCALARS) else None


def _layout(found: Any) -> str:
    if not isinstance(found, torch.Tensor):
        return type(found).__name__
    shape = [str(dim(s)) for s in found.shape]
    stride = [str(dim(s)) for s, n in zip(found.stride(), found.shape, strict=True) if dim(n) != 1]
    return f"{short_name(found.dtype)} [{', '.join(shape)}] strides [{', '.join(stride)}]"
