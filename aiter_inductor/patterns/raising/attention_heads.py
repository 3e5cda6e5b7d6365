"""What every spelling of attention shares: grouped heads, masks, and the match itself."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    TRANSPARENT,
    arg,
    dtype,
    dtype_name,
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
from aiter_inductor.core.match import Derived, Match, Miss, Output
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_backward import attention_with_lse
from aiter_inductor.patterns.raising.mask import shape_of_mask

PATTERN = "attention"


def build(
    end: fx.Node,
    heads: tuple[Any, Any, Any],
    mask: Any,
    interior: frozenset[fx.Node],
    *,
    sinks: fx.Node | None = None,
    **kwargs: Any,
) -> Match | Miss:
    """The match for attention whose result is `end`, or why its operands do not fit the op.

    A mask of documents is offered as their first keys, and as itself where nobody takes those.

    Args:
        end: the program's result, [B, H, S, Dv].
        heads: q, k and v as the program hands them over, repeated heads included.
        mask: a node to be understood or passed on, or None.
        interior: all nodes that the op computes.
        sinks: one logit a head, or None.
        kwargs: the op's, `causal` included if the program says so itself.
    """
    q, k, v = heads
    if reason := _do_not_fit(q, k, v, end):
        return Miss(PATTERN, end, reason)
    k, v = shared_heads(k, v)
    layout = _layout(end)
    if layout is None:
        found = tensor(end)
        strides = [] if found is None else list(found.stride())
        return Miss(PATTERN, end, f"the result has strides {strides}, neither order of heads")
    output = Output(end)
    if layout == "bhsd" and (rows := _stored_by_token(end)) is not None:
        layout, output = "bshd", Output(rows, ((torch.transpose, (1, 2)),))
        interior |= {rows, source(rows)}
    kwargs |= {} if layout == "bhsd" else {"layout": layout}
    seen = None if mask is None else shape_of_mask(mask, size(q, 2), size(k, 2))
    if seen is not None and not _numbers_tokens_of(seen.documents, q):
        seen = None
    said = kwargs if seen is None else {**kwargs, "causal": seen.causal, "window": seen.window}
    documents = None if seen is None else seen.documents
    if mask is None or (seen is not None and documents is None):
        return _match((q, k, v, None, sinks), said, output, interior)
    if reason := _not_a_mask(mask):
        return Miss(PATTERN, end, reason)
    if ndim(mask) < 4:
        mask = Derived(operator.getitem, (mask, (None,) * (4 - ndim(mask)) + (Ellipsis,)))
    masked = _match((q, k, v, mask, sinks), kwargs, output, interior)
    if documents is None:
        return masked
    tensors = (q, k, v, None, sinks, _first_keys(documents))
    return replace(_match(tensors, said, output, interior), pattern="", parts=(masked,))


def sdpa_scale(node: fx.Node) -> float | None:
    """The factor on the scores of an SDPA call; None if it is not known when compiling."""
    given = arg(node, "scale")
    if given is not None:
        return number(given)
    width = fixed(size(source(node), -1))
    return width**-0.5 if width else None


def _match(
    tensors: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Output,
    interior: frozenset[fx.Node],
) -> Match:
    """With the log-sum-exp, which nothing in the graph reads, where gradients flow."""
    said = {name: given for name, given in kwargs.items() if given not in (None, "none")}
    found = tensor(output.node)
    if torch.is_grad_enabled() and found is not None and found.requires_grad:
        return Match(PATTERN, attention_with_lse, tensors, said, (output, None), interior)
    return Match(PATTERN, attention, tensors, said, (output,), interior)


def _numbers_tokens_of(documents: fx.Node | None, q: fx.Node) -> bool:
    return documents is None or sizes(documents) == (size(q, 0), size(q, 2))


def _first_keys(documents: fx.Node) -> Derived:
    """Where the document of each token begins: the first token with its number."""
    how = (("out_int32", True),)
    return Derived(torch.searchsorted, (documents, documents), how, shared=True)


def shared_heads(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads were repeated for a group of query heads each."""
    bare_k, bare_v = _unrepeated(k), _unrepeated(v)
    return (bare_k, bare_v) if size(bare_k, 1) == size(bare_v, 1) else (k, v)


def _unrepeated(node: fx.Node) -> fx.Node:
    """[B, KVH, T, D] behind [B, KVH * G, T, D], whose neighbouring heads are equal."""
    end = skip(node, TRANSPARENT)
    if kind(end) == "repeat_interleave":
        repeats, axis = arg(end, "repeats"), arg(end, "dim")
        return source(end) if isinstance(repeats, int) and axis in (1, -3) else node
    if kind(end) != "reshape" or kind(spread := source(end)) != "expand":
        return node
    inserted = source(spread)
    base = source(inserted) if isinstance(inserted, fx.Node) else None
    if not isinstance(base, fx.Node) or ndim(base) != 4 or not _inserts_a_group(inserted):
        return node
    B, KVH, T, D = sizes(base) or ()
    groups = size(spread, 2)
    if sizes(spread) != (B, KVH, groups, T, D) or sizes(end) != (B, KVH * groups, T, D):
        return node
    return base


def _inserts_a_group(node: fx.Node) -> bool:
    """Whether `node` is `x[:, :, None]`, trailing full slices allowed, or `x.unsqueeze(2)`."""
    if kind(node) == "unsqueeze":
        return arg(node, "dim") in (2, -3)
    index = arg(node, "index")
    if kind(node) != "getitem" or not isinstance(index, tuple) or len(index) < 3:
        return False
    rest = (*index[:2], *index[3:])
    return index[2] is None and all(item == slice(None) for item in rest)


def _do_not_fit(q: Any, k: Any, v: Any, end: fx.Node) -> str | None:
    nodes = (q, k, v)
    for name, node in zip("qkv", nodes, strict=True):
        if ndim(node) != 4:
            return f"{name} has {ndim(node)} dimensions, not 4"
    if len({dtype(node) for node in (*nodes, end)}) > 1:
        names = ", ".join(map(dtype_name, (*nodes, end)))
        return f"q, k, v and the result are {names}, not of one dtype"
    if not size(q, 0) == size(k, 0) == size(v, 0) or size(k, 1) != size(v, 1):
        shapes = "; ".join(str(list(sizes(node) or ())) for node in nodes)
        return f"q, k and v are {shapes}: their batches or heads broadcast"
    return None


def _layout(end: fx.Node) -> str | None:
    """Order of a dense [B, H, S, D] in memory: `bhsd`, `bshd` or None."""
    found = tensor(end)
    if found is None:
        return None
    strides = tuple(map(dim, found.stride()))
    B, H, S, D = map(dim, found.shape)
    orders: Mapping[str, tuple[Dim, ...]] = {
        "bhsd": (H * S * D, S * D, D, 1),
        "bshd": (H * S * D, D, H * D, 1),
    }
    for name, wanted in orders.items():
        pairs = zip((B, H, S, D), strides, wanted, strict=True)
        if all(n == 1 or a == b for n, a, b in pairs):
            return name
    return None


def _stored_by_token(end: fx.Node) -> fx.Node | None:
    """The copy [B, S, H, D] of `end` [B, H, S, D], if that is all that becomes of it."""
    turned = only_user(end)
    if turned is None or kind(turned) != "transpose" or source(turned) is not end:
        return None
    rows = only_user(turned)
    axes = {arg(turned, "dim0"), arg(turned, "dim1")}
    if axes not in ({1, 2}, {-2, -3}) or rows is None or kind(rows) != "contiguous":
        return None
    return rows if len(rows.args) == 1 and not rows.kwargs else None


def _not_a_mask(mask: Any) -> str | None:
    found = tensor(mask)
    if found is None or not (found.dtype == torch.bool or found.is_floating_point()):
        return f"the mask {mask} is neither bool nor float"
    return None if found.dim() <= 4 else f"the mask has {found.dim()} dimensions, more than 4"
