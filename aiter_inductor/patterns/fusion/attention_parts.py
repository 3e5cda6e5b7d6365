"""Read the parts of queries and keys where they lie, instead of putting them together first."""

from __future__ import annotations

from typing import Any

from torch import fx

from aiter_inductor.core.graph import kind, size, sizes, source
from aiter_inductor.core.match import Match, Matches, fusion
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.mla_prefill import mla_prefill
from aiter_inductor.patterns.raising.columns import Joined, joined

_WITHOUT = ("mask", "sinks", "first_keys", "window", "softcap")
_SETTINGS = ("scale", "causal", "layout")


@fusion("parts_into_attention", attention)
def parts_into_attention(found: Match, matches: Matches) -> Match | str | None:
    """cat(q, q'), cat(k, one head of k' for all) → attention: saves a write and a read of both."""
    q, k = (_parts(found.argument(name), found) for name in ("q", "k"))
    if q is None or k is None:
        return None
    shared = source(k.second) if kind(k.second) == "expand" else None
    heads = sizes(k.first) or ()
    if sizes(shared) != (*heads[:1], 1, *heads[2:3], size(k.second, -1)):
        return f"{k.second.name}, the second part of the keys, is not one head expanded to all"
    if size(q.first, -1) != size(k.first, -1) or size(q.first, 1) != size(k.first, 1):
        return f"{q.first.name} and {k.first.name} differ in heads or in elements of a head"
    for name in _WITHOUT:
        if found.argument(name) is not None:
            return f"there is a {name}, and {mla_prefill.name} has none"
    return Match(
        pattern="",
        op=mla_prefill,
        args=(q.first, q.second, k.first, shared, found.argument("v")),
        kwargs={name: found.argument(name) for name in _SETTINGS},
        outputs=found.outputs,
        interior=found.interior | q.interior | k.interior | {k.second},
        parts=(found,),
    )


def _parts(heads: Any, found: Match) -> Joined | None:
    """What queries or keys were put together from, where only this attention reads them."""
    if not isinstance(heads, fx.Node):
        return None
    reader = next((user for user in heads.users if user in found.interior), None)
    return None if reader is None else joined(heads, reader)
