"""Which dimension of [batch, ?, ?, head_dim] tensors counts heads, and which counts tokens."""

from __future__ import annotations

from torch import Tensor

from aiter_inductor.core.problem import Dim, dim

RANK = 4


def leading(x: Tensor) -> tuple[Dim, Dim, Dim]:
    """The three sizes before the last one, 1 where `x` has fewer dimensions."""
    sizes = [dim(size) for size in x.shape[-RANK:-1]]
    first, second, third = [1] * (RANK - 1 - len(sizes)) + sizes
    return first, second, third


def heads_axis(q: Tensor, k: Tensor | None, table: Tensor) -> int:
    """1 for [batch, heads, tokens, head_dim], 2 for [batch, tokens, heads, head_dim].

    Heads are what a table of positions broadcasts over. Where there is one position, both
    dimensions are, and heads are what q and k may have different numbers of.
    """
    _, second, third = leading(table)
    if second != 1:
        return 2 if third == 1 else 1
    if third != 1 or k is None:
        return 1
    ours, theirs = leading(q), leading(k)
    return 2 if ours[1] == theirs[1] and ours[2] != theirs[2] else 1
