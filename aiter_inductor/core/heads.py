"""Which dimension of a tensor counts heads and which tokens, and tensors in either order."""

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


def heads_first(packed: Tensor) -> Tensor:
    """[total, H, D] as the heads [1, H, total, D] of one sequence; a view."""
    return packed.transpose(0, 1).unsqueeze(0)


def heads_like(q: Tensor, v: Tensor, layout: str) -> Tensor:
    """An empty [B, H, S, Dv], dense in the order of `layout`.

    Args:
        q: [B, H, S, D], whose dtype and device it gets.
        v: [..., Dv].
        layout: `bhsd`, or `bshd`, which keeps the heads of a token side by side.
    """
    batch, num_heads, num_queries, _ = q.shape
    if layout == "bshd":
        return q.new_empty(batch, num_queries, num_heads, v.shape[-1]).transpose(1, 2)
    return q.new_empty(batch, num_heads, num_queries, v.shape[-1])
