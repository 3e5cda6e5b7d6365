"""Attention over a latent cache, as transformers' DeepSeek models write it.

`kv_b_proj` makes the keys and values of all heads from one latent row a token; a key is completed
with a rotated part that all heads share, by `cat` or by copies into an empty tensor. Which cache
the latent rows come from does not matter here: they are whatever the projection reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    TRANSPARENT,
    arg,
    dtype,
    kind,
    ndim,
    number,
    only_user,
    size,
    sizes,
    skip,
    source,
    tensor,
)
from aiter_inductor.core.match import Derived, Match, Miss, Output, readers, recogniser
from aiter_inductor.core.problem import fixed
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from aiter_inductor.patterns.raising.attention_heads import sdpa_scale
from aiter_inductor.patterns.raising.columns import Joined, columns, joined
from aiter_inductor.patterns.raising.mask import shape_of_mask

PATTERN = "mla_decode"


@dataclass(frozen=True)
class Expansion:
    """Keys and values of all heads, made by one projection of latent rows.

    Attributes:
        latent: what the projection reads, [batch, kv_len, R] or [batch, 1, kv_len, R].
        projection: the linear.
        nope: columns of a head that belong to the key; the others are the value.
        interior: the projection and the views behind it.
    """

    latent: fx.Node
    projection: fx.Node
    nope: int
    interior: frozenset[fx.Node]


@recogniser(PATTERN, "sdpa")
def latent_attention(node: fx.Node) -> Match | Miss | None:
    """Attention whose keys and values are one projection of latent rows, as `mla_decode`."""
    key, value = arg(node, "key"), arg(node, "value")
    parts = joined(key, node)
    found = None if parts is None else _expansion(parts.first, value)
    if parts is None or found is None:
        return None
    scale = sdpa_scale(node)
    if reason := _unfit(node, parts, found) or _not_worth_it(node, parts, found):
        return Miss(PATTERN, node, reason)
    if scale is None:
        return Miss(PATTERN, node, f"scale is {arg(node, 'scale')}, not known when compiling")
    q_nope, q_rope, assembled = _query(arg(node, "input"), found.nope, node)
    k_rope = source(parts.second)
    latent = found.latent
    mask, causal = _mask(node)
    return Match(
        PATTERN,
        mla_decode,
        (
            q_nope,
            q_rope,
            Derived(torch.squeeze, (latent, 1)) if ndim(latent) == 4 else latent,
            Derived(torch.squeeze, (k_rope, 1)),
            arg(found.projection, "weight"),
            mask,
        ),
        {"scale": scale, "causal": causal},
        (Output(node),),
        assembled | parts.interior | found.interior | {node, parts.second},
    )


def _expansion(k_nope: fx.Node, value: Any) -> Expansion | None:
    """What made the first columns of every key head and, beside them, the values."""
    key_part, value_part = columns(skip(k_nope, TRANSPARENT)), columns(skip(value, TRANSPARENT))
    if key_part is None or value_part is None or key_part.of is not value_part.of:
        return None
    heads = key_part.of
    width = fixed(size(heads, -1))
    if key_part.start != 0 or key_part.stop != value_part.start or value_part.stop != width:
        return None
    rows = source(heads)
    if kind(heads) != "transpose" or ndim(heads) != 4 or kind(rows) != "reshape":
        return None
    swapped = {arg(heads, "dim0") % 4, arg(heads, "dim1") % 4}
    projection = source(rows)
    if swapped != {1, 2} or kind(projection) != "linear":
        return None
    latent = source(projection)
    batch_size, num_heads, kv_len, _ = sizes(heads) or (None,) * 4
    rank = size(latent, -1)
    if sizes(rows) != (batch_size, kv_len, num_heads, width):
        return None
    if sizes(latent) not in ((batch_size, kv_len, rank), (batch_size, 1, kv_len, rank)):
        return None
    path = (*_passed(k_nope), *_passed(value), *key_part.path, *value_part.path)
    interior = frozenset({*path, heads, rows, projection})
    return Expansion(latent, projection, key_part.stop, interior)


def _unfit(node: fx.Node, parts: Joined, found: Expansion) -> str | None:
    """Why the op would not compute what the program does."""
    heads = sizes(arg(node, "key"))
    rope = parts.second
    shared = source(rope) if kind(rope) == "expand" else None
    if heads is None or sizes(shared) != (heads[0], 1, heads[2], size(rope, -1)):
        return f"{rope.name}, the rotated part of the keys, is not one head expanded to all"
    if arg(found.projection, "bias") is not None:
        return f"{found.projection.name} adds a bias to keys and values"
    if number(arg(node, "dropout_p", 0.0)) != 0:
        return f"dropout_p is {arg(node, 'dropout_p')}, not 0"
    if not isinstance(arg(node, "is_causal", False), bool):
        return f"is_causal is {arg(node, 'is_causal')}, not known when compiling"
    query = sizes(arg(node, "input"))
    if query is None or query[:2] != heads[:2] or query[3] != heads[3]:
        return f"queries are {list(query or ())} and keys {list(heads)}"
    inside = parts.interior | found.interior | {node, rope}
    for view in found.interior:
        if outside := readers(view, inside):
            return f"{outside[0].name} reads the keys and values of all heads too ({view.name})"
    kinds = {dtype(n) for n in (arg(node, "input"), found.latent, shared, found.projection, node)}
    if len(kinds) != 1:
        return f"queries, latent rows and keys are of {len(kinds)} dtypes, not one"
    return None


def _not_worth_it(node: fx.Node, parts: Joined, found: Expansion) -> str | None:
    """Why the program's form should stay: gradients, or tokens enough to pay for expanding."""
    result = tensor(node)
    if torch.is_grad_enabled() and result is not None and result.requires_grad:
        return f"gradients flow through it and {mla_decode.name} has no backward"
    query, weight = arg(node, "input"), arg(found.projection, "weight")
    return MlaProblem(
        batch_size=size(query, 0),
        num_heads=size(query, 1),
        q_len=size(query, 2),
        kv_len=size(arg(node, "key"), 2),
        kv_lora_rank=size(weight, 1),
        qk_nope_head_dim=found.nope,
        qk_rope_head_dim=size(parts.second, -1),
        v_head_dim=size(arg(node, "value"), -1),
        dtype=torch.float32,
    ).absorbing_costs_more()


def _query(query: fx.Node, nope: int, reader: fx.Node) -> tuple[Any, Any, frozenset[fx.Node]]:
    """Both parts of the queries and the nodes that joined them; slices of them if none did."""
    parts = joined(query, reader) if only_user(query) is reader else None
    if parts is not None and size(parts.first, -1) == nope:
        return parts.first, parts.second, parts.interior
    rope = size(query, -1) - nope
    return (
        Derived(torch.narrow, (query, -1, 0, nope)),
        Derived(torch.narrow, (query, -1, nope, rope)),
        frozenset(),
    )


def _mask(node: fx.Node) -> tuple[Any, bool]:
    """The mask that the op has to read, None if it says no more than `causal`, and `causal`."""
    mask, causal = arg(node, "mask"), bool(arg(node, "is_causal", False))
    if not isinstance(mask, fx.Node):
        return mask, causal
    seen = shape_of_mask(mask, size(arg(node, "input"), 2), size(arg(node, "key"), 2))
    if seen is None or seen.window is not None or seen.causal == "bottom_right":
        return mask, causal
    return None, seen.causal == "top_left"


def _passed(node: Any) -> list[fx.Node]:
    """The copies that `skip(node, TRANSPARENT)` looks through."""
    passed = []
    while isinstance(node, fx.Node) and kind(node) in TRANSPARENT:
        passed.append(node)
        node = source(node)
    return passed
