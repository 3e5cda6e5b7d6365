"""Mixture of experts around its GEMMs: which experts a token goes to, and in what order."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.moe_problem import (
    GROUP_SCORES,
    SCORINGS,
    RouteProblem,
    SortProblem,
    route_unsupported,
    sort_unsupported,
    sorted_capacity,
)
from aiter_inductor.lowerings.providers import add_hip


@op(problem=RouteProblem.of)
def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    topk: int,
    scoring: str,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts for each token, in fp32.

    Mixtral and Qwen3-MoE are `softmax`, renormalised; GPT-OSS is `softmax_of_chosen`; DeepSeek-V3
    is `sigmoid` with a bias, 4 of 8 groups by `top2`, renormalised with eps 1e-20 and scaled;
    DeepSeek-V2 is `softmax` with groups by `max`.

    Args:
        logits: [num_tokens, num_experts], any float dtype.
        bias: [num_experts], added to the scores that experts are chosen by, not to the weights.
        topk: experts of a token.
        scoring: how logits become scores: `softmax` or `sigmoid` of a row; `softmax_of_chosen`
            chooses by the logits and takes the softmax of those chosen.
        num_groups: groups of neighbouring experts.
        topk_groups: groups whose experts may be chosen.
        group_score: what a group is chosen by: `top2`, the sum of its two best scores, or `max`.
        renormalize: divide a token's weights by their sum; never for `softmax_of_chosen`.
        eps: added to that sum.
        scale: factor on the weights.
        out_dtype: of the weights; None is fp32.

    Returns:
        weights: [num_tokens, topk], largest score first.
        experts: [num_tokens, topk], int64; among equal scores the lowest number comes first.

    Raises:
        ValueError: for an unknown scoring or group_score.
    """
    for name, value, known in (
        ("scoring", scoring, SCORINGS),
        ("group_score", group_score, GROUP_SCORES),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
    f = logits.to(accumulate_dtype(logits.dtype))
    scores = {"softmax": f.softmax(-1), "sigmoid": f.sigmoid()}.get(scoring, f)
    choice = scores if bias is None else scores + bias.to(f.dtype)
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.topk(2).values.sum(-1) if group_score == "top2" else grouped.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(-1, _first_largest(best, topk_groups), value=True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    experts = _first_largest(choice, topk)
    weights = scores.gather(-1, experts)
    if scoring == "softmax_of_chosen":
        weights = weights.softmax(-1)
    elif renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * scale).to(out_dtype or torch.float32), experts


def _first_largest(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, among equals the first ones."""
    return x.sort(stable=True, dim=-1, descending=True).indices[..., :k].contiguous()


@op(problem=SortProblem.of)
def moe_sort(
    experts: Tensor, weights: Tensor, *, num_experts: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order the (token, slot) pairs by expert, in blocks of `block_m` that hold one expert each.

    An entry is `token * topk + slot`; within an expert they ascend. An expert's last block is
    filled up with the entry `num_tokens * topk`, of weight 0, and so is what no block needs.
    Entries of an expert outside 0 to num_experts - 1 are left out. The layout is that of vLLM's
    moe_align_block_size, with the weights of AITER's moe_sorting.

    Args:
        experts: [num_tokens, topk], int32 or int64.
        weights: [num_tokens, topk], any float dtype.
        num_experts: experts in all.
        block_m: entries of a block, a power of two.

    Returns:
        sorted_entries: [capacity], int32, where capacity is `sorted_capacity(...)`.
        sorted_weights: [capacity], fp32.
        block_experts: [capacity / block_m], int32: the expert of each block, -1 for unused ones.
        counts: [num_experts], int32: entries of each expert.
        num_sorted: [1], int32: places of the blocks in use.
    """
    flat = experts.flatten().long()
    entries = flat.shape[0]
    capacity = sorted_capacity(entries, num_experts, block_m)
    known = (flat >= 0) & (flat < num_experts)
    expert = torch.where(known, flat, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    padded = (counts[:-1] + block_m - 1) // block_m * block_m
    ends = padded.cumsum(0)
    order = expert.argsort(stable=True)
    first = counts.cumsum(0) - counts
    start = torch.cat((ends - padded, ends.new_full((1,), capacity)))
    by_expert = expert[order]
    rank = torch.arange(entries, device=flat.device) - first[by_expert]
    place = torch.where(known[order], start[by_expert] + rank, capacity)
    sorted_entries = order.new_full((capacity + 1,), entries).scatter(0, place, order)
    sorted_weights = torch.zeros(capacity + 1, device=flat.device).scatter(
        0, place, weights.flatten().float()[order]
    )
    block = torch.arange(capacity // block_m, device=flat.device) * block_m
    owner = torch.searchsorted(ends, block, right=True)
    block_experts = torch.where(owner < num_experts, owner, -1)
    return (
        sorted_entries[:-1].to(torch.int32),
        sorted_weights[:-1].clone(),
        block_experts.to(torch.int32),
        counts[:-1].to(torch.int32),
        ends[-1:].to(torch.int32),
    )


add_hip(moe_route, "moe_route", refuse=route_unsupported)
add_hip(moe_sort, "moe_sort", refuse=sort_unsupported)
