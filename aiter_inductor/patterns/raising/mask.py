"""Attention masks understood from how the program builds them.

Transformers materialises even the plain causal mask: comparisons of `arange`s, indices unrolled
from a vmap, and a packed-sequence mask that is derived from positions. Where the positions are the
default `arange` all of that says no more than "causal, perhaps in a window".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.value_ranges import bound_sympy

from aiter_inductor.core.graph import ndim, size, sizes, tensor
from aiter_inductor.core.problem import Dim
from aiter_inductor.patterns.raising.mask_affine import Additive, Affine, Condition, positive
from aiter_inductor.patterns.raising.mask_values import Reader, counts_where_it_jumps

Ranges = dict[Any, Any]


@dataclass(frozen=True)
class Shape:
    """What a mask lets through: arguments of the op `attention`.

    Attributes:
        causal, window: the op's.
        documents: [B, S], int64, the number of each token's document, which never falls along a
            row: tokens see those of their own. None where a row is one.
    """

    causal: str = "none"
    window: int | None = None
    documents: fx.Node | None = None


def shape_of_mask(mask: fx.Node, num_queries: Dim, num_keys: Dim) -> Shape | None:
    """The shape of a mask [*, S, T] over the pairs of query and key, None if it is not known.

    Args:
        mask: bool, or float to be added to the scores.
        num_queries: S of the attention; the mask must have this size, not 1.
        num_keys: T of the attention, likewise.
    """
    if ndim(mask) < 2 or (size(mask, -2), size(mask, -1)) != (num_queries, num_keys):
        return None
    reader = Reader()
    found = reader.read(mask)
    seen = found.seen if isinstance(found, Additive) else found
    if not isinstance(seen, Condition) or reader.is_mutated(mask.graph):
        return None
    extra = num_keys - num_queries
    shape = _classify(seen, sizes(mask) or (), extra, _ranges(mask))
    # A row whose scores are all the lowest number is a mean over every key, not zeros.
    if shape is None or (isinstance(found, Additive) and not _every_query_sees(shape, extra)):
        return None
    return shape


def _every_query_sees(shape: Shape, extra: Dim) -> bool:
    """Whether each query provably sees one key at least; `extra` is T - S, and T is not 0."""
    aligned_to_the_end = shape.causal == "bottom_right"
    if aligned_to_the_end and not positive(extra):
        return False
    if shape.window is None or aligned_to_the_end:
        return True
    return positive(extra + shape.window - 1)


def _ranges(mask: fx.Node) -> Ranges:
    """Between which numbers the capture holds open sizes, those of the mask among them.

    Dynamo guards them: a cache's length is below the window once the program took that branch.
    """
    found = tensor(mask)
    open_sizes: list[Any] = [] if found is None else list(found.shape)
    for n in open_sizes:
        if isinstance(n, torch.SymInt):
            return dict(n.node.shape_env.var_to_range)
    return {}


def _never_negative(number: Dim, ranges: Ranges) -> bool:
    if positive(number):
        return True
    return not isinstance(number, int) and bool(bound_sympy(number, ranges).lower >= 0)


def _classify(seen: Condition, shape: tuple[Dim, ...], extra: Dim, ranges: Ranges) -> Shape | None:
    """The shape of a condition on tensors of this `shape`; `extra` is T - S."""
    documents = next(iter(seen.documents), None)
    if len(seen.documents) > 1 or (documents is not None and shape[-1] != shape[-2]):
        return None
    for positions in seen.stepping:
        if documents is None or not counts_where_it_jumps(documents, positions):
            return None
    ahead: set[Dim] = set()
    behind: set[Dim] = set()
    for atom in seen.atoms:
        if _never_negative(atom.least(shape), ranges):
            continue
        side = _side(atom)
        if side is None:
            return None
        (ahead if side > 0 else behind).add(atom.constant)
    if len(ahead) > 1 or len(behind) > 1:
        return None
    causal, shift = "none", 0
    if ahead:
        (shift,) = ahead
        if shift not in (0, extra):
            return None
        causal = "top_left" if shift == 0 else "bottom_right"
    if documents is not None and causal == "none":
        return None
    if not behind:
        return Shape(causal, documents=documents)
    window = next(iter(behind)) + 1 + shift
    known = isinstance(window, int) and window > 0
    return Shape(causal, window, documents) if known else None


def _side(atom: Affine) -> int | None:
    """1 for `query - key + c >= 0`, -1 for `key - query + c >= 0`, None for anything else."""
    *leading, query, key = atom.coefficients
    if any(leading) or (query, key) not in ((1, -1), (-1, 1)):
        return None
    return query
