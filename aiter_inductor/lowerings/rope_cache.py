"""Rotary embedding, head norms before it perhaps, and the write of k and v into a static cache."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.op import op
from aiter_inductor.lowerings.measured import decline_rotation_into_cache
from aiter_inductor.lowerings.providers import add_triton
from aiter_inductor.lowerings.rope import qk_norm_rope, rope_qk
from aiter_inductor.lowerings.rope_cache_problem import RopeCacheProblem, rope_cache_unsupported


@op(problem=RopeCacheProblem.of, mutates=("key_cache", "value_cache"))
def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate `q` and `k`, as `rope_qk` or `qk_norm_rope` does, and store k and v.

    It is what `key_cache.index_copy_(2, slots, k)` and its like for values store, as transformers'
    StaticCache does.

    Args:
        q: [B, H, S, D], any float dtype.
        k: [B, KVH, S, D], dtype of `q`.
        v: [B, KVH, S, Dv], dtype of `q`.
        cos, sin: broadcastable to [B, 1, S, rotary_dim or half of it]; see `rope`.
        key_cache: [B, KVH, T, D], dtype of the rotated keys; T tokens fit.
        value_cache: [B, KVH, T, Dv], the same dtype.
        slots: [S], int64, below T and all different: where each token is stored, in every
            sequence.
        q_weight, k_weight: [D], as in `qk_norm_rope`; None where heads are not normalised.
        eps, weight_offset, round_before_weight: of the norm.
        interleaved_in, interleaved_out, rotary_dim, out_dtype: as in `rope`.

    Returns:
        q rotated, as `rope` returns it.
    """
    style = {
        "interleaved_in": interleaved_in,
        "interleaved_out": interleaved_out,
        "rotary_dim": rotary_dim,
        "out_dtype": out_dtype,
    }
    rotated: tuple[Tensor, Tensor]
    if q_weight is None or k_weight is None:
        rotated = rope_qk.reference(q, k, cos, sin, **style)
    else:
        norm = {"weight_offset": weight_offset, "round_before_weight": round_before_weight}
        weights = q_weight, k_weight
        rotated = qk_norm_rope.reference(q, k, *weights, cos, sin, eps, **norm, **style)
    key_cache.index_copy_(2, slots, rotated[1])
    value_cache.index_copy_(2, slots, v.to(value_cache.dtype))
    return rotated[0]


add_triton(
    rope_cache_write,
    "rope_cache",
    refuse=rope_cache_unsupported,
    decline=decline_rotation_into_cache,
)
