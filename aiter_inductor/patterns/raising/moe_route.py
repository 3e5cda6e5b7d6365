"""Routing of tokens to experts: the choice, and the weights of those chosen.

Mixtral, Qwen3-MoE and DeepSeek-V2 choose by the softmax of the logits, DeepSeek-V3 and GLM-4 by a
sigmoid and a bias, and within groups; GPT-OSS chooses by the logits and takes the softmax of those
chosen.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    arg,
    argument,
    commuted,
    dtype,
    is_last_dim,
    kind,
    ndim,
    number,
    only_user,
    operands,
    size,
    sizes,
    source,
)
from aiter_inductor.core.match import Match, Miss, Output, recogniser
from aiter_inductor.lowerings.moe import moe_route
from aiter_inductor.patterns.raising.moe_groups import (
    Groups,
    called,
    grouped_choice,
    largest,
    parts,
)
from aiter_inductor.patterns.raising.tail import strip_widening, widenings

PATTERN = "moe_route"


@dataclass(frozen=True)
class _Scores:
    """Where scores come from: `scoring` of `logits`, and a bias added before the choice."""

    node: fx.Node
    logits: fx.Node
    scoring: str
    bias: fx.Node | None
    interior: frozenset[fx.Node]


@dataclass(frozen=True)
class _Weights:
    """The weights of the experts chosen: the last node, and what was done to the scores."""

    end: fx.Node
    style: dict[str, Any]
    interior: frozenset[fx.Node]


@recogniser(PATTERN, "topk")
def routed_experts(node: fx.Node) -> Match | Miss | None:
    """`topk` of a router's scores whose values, or the scores at its indices, are used."""
    topk = largest(node)
    values, indices = parts(node)
    if topk is None or indices is None or ndim(source(node)) != 2:
        return None
    groups, choice = None, source(node)
    if called(choice, "masked_fill"):
        groups = grouped_choice(choice)
        if groups is None:
            return _not_groups(choice)
        choice = groups.choice
    scores = _scores(choice)
    if scores is None or isinstance(scores, Miss):
        return scores
    weights = _weights(scores, values, indices)
    if weights is None:
        return None
    style = {"topk": topk, "scoring": scores.scoring, **_group_style(groups), **weights.style}
    if dtype(weights.end) != torch.float32:
        style["out_dtype"] = dtype(weights.end)
    taken = (node, indices, *((values,) if values else ()))
    inside = frozenset(taken) | scores.interior | weights.interior
    if groups is not None:
        if not _is_lowest(groups.fill, scores):
            reason = f"experts of other groups are filled with {groups.fill:g}, which may be chosen"
            return Miss(PATTERN, node, reason)
        inside |= groups.interior
    outputs = (Output(weights.end), Output(indices))
    return Match(PATTERN, moe_route, (scores.logits, scores.bias), style, outputs, inside)


def _not_groups(filled: fx.Node) -> Miss | None:
    """A near miss if what is filled are a router's scores."""
    scores = _scores(argument(filled, 0, "input"))
    if not isinstance(scores, _Scores) or scores.scoring == "softmax_of_chosen":
        return None
    reason = f"{filled.name} leaves out experts by something else than their groups' best scores"
    return Miss(PATTERN, filled, reason)


def _is_lowest(fill: float, scores: _Scores) -> bool:
    """Whether no expert can be chosen that was filled: scores without a bias are positive."""
    positive = scores.scoring != "softmax_of_chosen" and scores.bias is None
    return fill == -math.inf or (fill <= 0 and positive)


def _group_style(groups: Groups | None) -> dict[str, Any]:
    if groups is None:
        return {}
    style: dict[str, Any] = {"num_groups": groups.number, "topk_groups": groups.kept}
    return style if groups.score == "top2" else {**style, "group_score": groups.score}


def _scores(choice: Any) -> _Scores | Miss | None:
    """What the choice is made by, read backwards from its argument."""
    for scores, bias in ((choice, None), *commuted(choice, "add")):
        if kind(scores) not in ("sigmoid", "softmax"):
            continue
        if bias is not None and sizes(bias) != (size(scores, -1),):
            continue
        if kind(scores) == "softmax" and not is_last_dim(arg(scores, "dim"), scores):
            return None
        if dtype(scores) != torch.float32:
            reason = f"scores are rounded to {dtype(scores)}; the kernel chooses by fp32"
            return Miss(PATTERN, scores, reason)
        logits = strip_widening(source(scores))
        inside = {scores, choice, *widenings(source(scores))}
        return _Scores(scores, logits, kind(scores) or "", bias, frozenset(inside))
    if not isinstance(choice, fx.Node) or dtype(choice) is None:
        return None
    return _Scores(choice, choice, "softmax_of_chosen", None, frozenset())


def _weights(scores: _Scores, values: fx.Node | None, indices: fx.Node) -> _Weights | None:
    """The weights, read forwards from the values chosen or from the scores at the indices."""
    if scores.scoring == "softmax_of_chosen":
        end = only_user(values) if values is not None else None
        if end is None or kind(end) != "softmax" or not is_last_dim(arg(end, "dim"), end):
            return None
        return _scaled(end, {}, {end})
    gathers = [
        user
        for user in indices.users
        if called(user, "gather")
        and argument(user, 0, "input") is scores.node
        and argument(user, 1, "dim") in (1, -1)
    ]
    if len(gathers) == 1 and values is None:
        return _renormalised(gathers[0])
    if not gathers and values is not None and scores.bias is None:
        return _renormalised(values)
    return None


def _renormalised(weights: fx.Node) -> _Weights:
    """`weights / (weights.sum(-1, keepdim=True) [+ eps])`, if that is what becomes of them."""
    for total in weights.users:
        if kind(total) != "sum" or not arg(total, "keepdim"):
            continue
        if not is_last_dim(arg(total, "dim"), weights):
            continue
        divisor, eps = total, 0.0
        shifted = only_user(total)
        for left, right in commuted(shifted, "add"):
            if left is total and number(right) is not None and shifted is not None:
                divisor, eps = shifted, number(right) or 0.0
        end = only_user(divisor)
        if end is not None and _quotient(end) == (weights, divisor):
            style = {"renormalize": True, **({"eps": eps} if eps else {})}
            return _scaled(end, style, {weights, total, divisor, end})
    return _scaled(weights, {}, {weights})


def _quotient(node: fx.Node) -> tuple[Any, Any] | None:
    if node.target is operator.itruediv:
        return node.args[0], node.args[1]
    return operands(node, "div")


def _scaled(end: fx.Node, style: dict[str, Any], inside: set[fx.Node]) -> _Weights:
    """A constant factor and a cast that follow, each the only reader of what is before it."""
    after = only_user(end)
    for left, right in commuted(after, "mul"):
        if after is not None and left is end and (factor := number(right)) is not None:
            end, style = after, {**style, "scale": factor}
            inside.add(after)
            break
    after = only_user(end)
    if after is not None and kind(after) == "cast" and dtype(after) in _ROUNDED:
        end = after
        inside.add(after)
    return _Weights(end, style, frozenset(inside))


_ROUNDED = (torch.bfloat16, torch.float16, torch.float32)
