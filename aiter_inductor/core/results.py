"""What a match's op would give, computed on fake values."""

from __future__ import annotations

from typing import Any

import torch

from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.graph import value
from aiter_inductor.core.match import Match, fake
from aiter_inductor.core.problem import dim


def run(match: Match, provider: str) -> Any:
    """The op's fake results, as the operator returns them; must run under the fake mode."""
    args = tuple(fake(argument) for argument in match.args)
    kwargs = {name: fake(argument) for name, argument in match.kwargs.items()}
    return match.op(*args, **kwargs, provider=provider)


def mismatch(match: Match, provider: str) -> str | None:
    """Why the op's results could not stand for the graph's nodes: another shape, dtype or stride.

    Runs the op on fake values, so a reference that disagrees with the program it was matched to
    becomes a refusal here and never a wrong graph. Must run under the graph's fake mode.
    """
    results = run(match, provider)
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


def _layout(found: Any) -> str:
    if not isinstance(found, torch.Tensor):
        return type(found).__name__
    shape = [str(dim(s)) for s in found.shape]
    stride = [str(dim(s)) for s, n in zip(found.stride(), found.shape, strict=True) if dim(n) != 1]
    return f"{short_name(found.dtype)} [{', '.join(shape)}] strides [{', '.join(stride)}]"
