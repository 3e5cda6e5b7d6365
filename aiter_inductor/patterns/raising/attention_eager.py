"""Attention written out: matmul, scale, mask, softmax, matmul.

The spellings of transformers' eager implementations: scores may be capped (Gemma 2), a sink may
stand beside them (GPT-OSS), the softmax may run in float32. The op computes all of it in float32
and rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from aiter_inductor.core.graph import (
    TRANSPARENT,
    arg,
    commuted,
    dtype,
    is_last_dim,
    kind,
    ndim,
    number,
    operands,
    size,
    sizes,
    source,
)
from aiter_inductor.core.match import Match, Miss, recogniser
from aiter_inductor.patterns.raising.attention_heads import PATTERN, build
from aiter_inductor.patterns.raising.tail import strip_widening


@dataclass
class _Walk:
    """Nodes passed on the way from the result to the operands."""

    interior: set[fx.Node] = field(default_factory=set)

    def through(self, node: Any, *kinds: str) -> Any:
        """The first node before `node` of another kind; float casts and copies are passed too."""
        while isinstance(node, fx.Node) and (kind(node) in kinds or _is_idle(node)):
            self.interior.add(node)
            node = source(node)
        return node

    def into(self, node: fx.Node, *operand: Any) -> Any:
        """Note `node` and go on to its first operand or the one given."""
        self.interior.add(node)
        return operand[0] if operand else source(node)


@recogniser(PATTERN, "matmul", "bmm")
def spelled_attention(node: fx.Node) -> Match | Miss | None:
    """`softmax(q @ k^T * scale + mask) @ v`."""
    walk = _Walk({node})
    v = arg(node, "mat2" if kind(node) == "bmm" else "other")
    softmax, keeps_all = _softmax(walk, source(node))
    if softmax is None:
        return None
    if ndim(softmax) != 4:
        return Miss(PATTERN, node, f"its scores have {ndim(softmax)} dimensions, not 4")
    if (dropped := _dropped(walk)) is not None:
        return Miss(PATTERN, node, f"it drops probabilities with p={dropped}")
    logits, sinks = _unshifted(walk, walk.through(walk.into(softmax))), None
    if not keeps_all:
        found = _beside_a_sink(walk, logits)
        if found is None:
            return Miss(PATTERN, node, "the last key's probabilities are dropped, and are no sinks")
        logits, sinks = found
    scores, mask = _masked(walk, logits)
    scores, softcap = _capped(walk, scores)
    scores, scale = _scaled(walk, scores)
    if kind(scores) != "matmul" or ndim(scores) != 4:
        name = getattr(scores, "name", scores)
        return Miss(PATTERN, node, f"behind scale and mask its scores are {name}, no q @ k^T")
    q, k = walk.into(scores), _untransposed(walk, arg(scores, "other"))
    if k is None:
        return Miss(PATTERN, node, f"its scores are {scores.name}, whose right side is no k^T")
    interior = frozenset(walk.interior)
    heads = (*_unwidened(q, k, dtype(v)), v)
    return build(node, heads, mask, interior, sinks=sinks, scale=scale, softcap=softcap)


def _unwidened(q: Any, k: Any, wanted: torch.dtype | None) -> tuple[Any, Any]:
    """q and k before both were widened from v's dtype, as GPT-J does; the op computes in fp32."""
    plain = [strip_widening(n) if isinstance(n, fx.Node) else n for n in (q, k)]
    return (plain[0], plain[1]) if all(dtype(n) == wanted for n in plain) else (q, k)


def _is_idle(node: fx.Node) -> bool:
    """A copy, or a cast from float to float."""
    if kind(node) == "cast":
        kinds = dtype(node), dtype(source(node))
        return all(found is not None and found.is_floating_point for found in kinds)
    return kind(node) in TRANSPARENT


def _softmax(walk: _Walk, node: Any) -> tuple[fx.Node | None, bool]:
    """The softmax over keys behind the probabilities, and whether its last column is kept."""
    keeps_all = True
    node = walk.through(node, "dropout")
    if isinstance(node, fx.Node) and _drops_last(node):
        keeps_all = False
        node = walk.through(walk.into(node), "dropout")
    if kind(node) != "softmax" or ndim(node) < 3 or not is_last_dim(arg(node, "dim"), node):
        return None, True
    return node, keeps_all


def _drops_last(node: fx.Node) -> bool:
    index = arg(node, "index")
    if kind(node) != "getitem" or not isinstance(index, tuple):
        return False
    full = all(item is Ellipsis or item == slice(None) for item in index[:-1])
    reaches = index[0] is Ellipsis or len(index) == ndim(node)
    return full and reaches and index[-1] == slice(None, -1)


def _dropped(walk: _Walk) -> float | str | None:
    """The probability with which a dropout passed on the way drops, None if none does."""
    for node in walk.interior:
        if kind(node) == "dropout" and arg(node, "training", True) is not False:
            p = number(arg(node, "p", 0.5))
            if p != 0:
                return "?" if p is None else p
    return None


def _beside_a_sink(walk: _Walk, node: Any) -> tuple[Any, fx.Node] | None:
    """`(logits, sinks)` of `cat((logits, sinks), -1)`."""
    parts: Any = arg(node, "tensors", ()) if kind(node) == "cat" else ()
    if len(parts) != 2 or not is_last_dim(arg(node, "dim", 0), node) or size(parts[1], -1) != 1:
        return None
    walk.interior.add(node)
    spread = parts[1]
    if kind(spread) == "expand":
        spread = walk.into(spread)
    sinks = source(spread) if kind(spread) == "reshape" else None
    shape = sizes(spread)
    if not isinstance(sinks, fx.Node) or ndim(sinks) != 1 or shape != (1, size(sinks, 0), 1, 1):
        return None
    walk.interior.add(spread)
    return walk.through(parts[0]), sinks


def _unshifted(walk: _Walk, node: Any) -> Any:
    """The logits before their maximum was subtracted, which no softmax can tell."""
    pair = operands(node, "sub")
    if pair is None or not _is_maximum(walk, pair[1], of=pair[0]):
        return node
    return walk.through(walk.into(node))


def _is_maximum(walk: _Walk, node: Any, of: Any) -> bool:
    """Whether `node` is `of.max(dim=-1, keepdim=True)`'s values."""
    passed = {node}
    if kind(node) == "getitem" and arg(node, "index") == 0:
        node = source(node)
        passed.add(node)
    maximum = kind(node) in ("max", "amax") and source(node) is of
    if not maximum or not is_last_dim(arg(node, "dim"), of) or arg(node, "keepdim") is not True:
        return False
    walk.interior |= passed
    return True


def _masked(walk: _Walk, node: Any) -> tuple[Any, fx.Node | None]:
    """Scores and the mask added to them, None if none is."""
    for scores, mask in commuted(node, "add"):
        floats = (dtype(mask), dtype(scores))
        if all(found is not None and found.is_floating_point for found in floats):
            if kind(scores) in ("mul", "div", "matmul", "cast") and ndim(scores) == 4:
                return walk.through(walk.into(node, scores)), mask
    return node, None


def _capped(walk: _Walk, node: Any) -> tuple[Any, float | None]:
    """Scores and c of `c * tanh(scores / c)`."""
    for inner, cap in commuted(node, "mul"):
        limit = number(cap)
        if limit is None or kind(inner) != "tanh":
            continue
        divided = source(inner)
        pair = operands(divided, "div")
        if pair and number(pair[1]) == limit:
            walk.interior |= {node, inner}
            return walk.through(walk.into(divided)), limit
    return node, None


def _scaled(walk: _Walk, node: Any) -> tuple[Any, float]:
    """Scores and the number they are multiplied with."""
    for scores, factor in commuted(node, "mul"):
        if (found := number(factor)) is not None:
            return walk.through(walk.into(node, scores)), found
    pair = operands(node, "div")
    if pair and (found := number(pair[1])):
        return walk.through(walk.into(node)), 1 / found
    return node, 1.0


def _untransposed(walk: _Walk, node: Any) -> fx.Node | None:
    """k [B, H, T, D] behind its transpose [B, H, D, T]."""
    if kind(node) != "transpose":
        return None
    axes = {arg(node, "dim0", -2), arg(node, "dim1", -1)}
    swapped = {axis % 4 for axis in axes if isinstance(axis, int)} == {2, 3}
    return walk.into(node) if swapped and isinstance(source(node), fx.Node) else None
