"""Store rotated keys, and values beside them, in a static cache by the kernel that rotates."""

from __future__ import annotations

from typing import Any

from torch import fx

from aiter_inductor.core.effects import storages
from aiter_inductor.core.graph import ndim, tensor
from aiter_inductor.core.match import Match, Matches, fusion, readers
from aiter_inductor.lowerings.rope import qk_norm_rope, rope_qk
from aiter_inductor.lowerings.rope_cache import rope_cache_write

_STYLE = ("interleaved_in", "interleaved_out", "rotary_dim", "out_dtype")
_NORM = ("eps", "weight_offset", "round_before_weight")


@fusion("rope_into_cache", rope_qk, qk_norm_rope)
def rope_into_cache(pair: Match, matches: Matches) -> Match | str | None:
    """rotated k, v → `index_copy_` → rope_cache_write: one launch instead of three.

    As transformers' StaticCache stores them: `keys.index_copy_(2, cache_position, k)`.
    """
    q_out, k_out = pair.outputs
    if q_out is None or k_out is None or k_out.adapt or k_out.twins or ndim(k_out.node) != 4:
        return None
    of_keys = next((user for user in k_out.node.users if _stores(user, k_out.node)), None)
    if of_keys is None:
        return None
    key_cache: Any
    slots: Any
    key_cache, _, slots, _ = of_keys.args
    beside = [user for user in slots.users if user is not of_keys and _stores(user)]
    if len(beside) != 1:
        return f"{len(beside)} other tensors, not one, are stored where {of_keys.name} stores keys"
    (of_values,) = beside
    value_cache, v = of_values.args[0], of_values.args[3]
    if reason := _unfit(pair, of_keys, of_values):
        return reason
    named = pair.op.bind(*pair.args, **pair.kwargs)
    normed = pair.op is qk_norm_rope
    heads = (named["q"], named["k"], v, named["cos"], named["sin"])
    weights = (named["q_weight"], named["k_weight"]) if normed else ()
    return Match(
        pattern="",
        op=rope_cache_write,
        args=(*heads, key_cache, value_cache, slots, *weights),
        kwargs={name: named[name] for name in (*_STYLE, *(_NORM if normed else ()))},
        outputs=(q_out,),
        interior=pair.interior | {of_keys, of_values},
        parts=(pair,),
    )


def _stores(node: fx.Node, rows: fx.Node | None = None) -> bool:
    """Whether `node` is `cache.index_copy_(2, slots, rows)` of a cache of heads."""
    called = node.op == "call_method" and node.target == "index_copy_"
    if not called or len(node.args) != 4 or node.kwargs or node.args[1] not in (2, -2):
        return False
    cache, slots, stored = node.args[0], node.args[2], node.args[3]
    nodes = all(isinstance(each, fx.Node) for each in (cache, slots, stored))
    return nodes and ndim(cache) == 4 and (rows is None or stored is rows)


def _unfit(pair: Match, of_keys: fx.Node, of_values: fx.Node) -> str | None:
    if pair.kwargs.get("transposed"):
        return "the rotation is a backward one"
    rotated = of_keys.args[3]
    assert isinstance(rotated, fx.Node)
    if outside := readers(rotated, pair.interior | {of_keys}):
        return f"{rotated.name} is read by {outside[0].name} too"
    for store in (of_keys, of_values):
        if store.users:
            return f"{store.name} is read itself, by {next(iter(store.users)).name}"
    caches: Any = of_keys.args[0], of_values.args[0]
    if storages(caches[0]) & storages(caches[1]):
        return f"{caches[0].name} and {caches[1].name} share their memory"
    heads = tensor(of_values.args[3])
    if heads is None or heads.dim() != 4:
        return f"{of_values.name} stores no heads"
    return None
