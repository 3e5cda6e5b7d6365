"""Attention called by name, with the mask and the repeated heads that models give it."""

from __future__ import annotations

from torch import fx

from aiter_inductor.core.graph import arg, number, source
from aiter_inductor.core.kinds import CALLED
from aiter_inductor.core.match import Match, Miss, recogniser
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.patterns.raising.attention_heads import PATTERN, build, sdpa_scale
from aiter_inductor.patterns.raising.called import op_of


@recogniser(PATTERN, "sdpa")
def fused_attention(node: fx.Node) -> Match | Miss | None:
    """`F.scaled_dot_product_attention(q, k, v, ...)`."""
    dropout = number(arg(node, "dropout_p", 0.0))
    if dropout != 0:
        return Miss(PATTERN, node, f"it drops probabilities with p={dropout}")
    scale = sdpa_scale(node)
    if scale is None:
        return Miss(PATTERN, node, f"scale is {arg(node, 'scale')}, not known when compiling")
    causal = "top_left" if arg(node, "is_causal", False) is True else "none"
    heads = (source(node), arg(node, "key"), arg(node, "value"))
    mask = arg(node, "mask")
    return build(node, heads, mask, frozenset({node}), scale=scale, causal=causal)


@recogniser(PATTERN, CALLED)
def masked_operator(node: fx.Node) -> Match | None:
    """This package's operator with a mask, as transformers' attention `aiter` calls it."""
    if op_of(node) is not attention or node.kwargs.get("provider", ""):
        return None
    given = attention.bind(*node.args, **{k: v for k, v in node.kwargs.items() if k != "provider"})
    hides_more = given["causal"] != "none" or given["window"] or given["first_keys"] is not None
    if given["mask"] is None or hides_more:
        return None
    heads = (given["q"], given["k"], given["v"])
    kept = {name: given[name] for name in ("sinks", "scale", "softcap")}
    found = build(node, heads, given["mask"], frozenset({node}), **kept)
    return found if isinstance(found, Match) else None
