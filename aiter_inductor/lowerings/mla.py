"""Multi-head latent attention over a cache of latent rows (DeepSeek-V2, V3 and kin)."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.mla_problem import (
    MlaProblem,
    hopper_mla_unsupported,
    mla_unsupported,
    split_mla_unsupported,
)
from aiter_inductor.lowerings.providers import add_cuda, add_triton


@op(problem=MlaProblem.of)
def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    mask: Tensor | None,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Attend with keys and values that `kv_b_weight` makes from one latent row a token.

    The formula is the model's: it makes the keys and values of every head. Providers multiply the
    weight into the queries and into the result instead and read only the latent rows.

    Args:
        q_nope: [batch, num_heads, q_len, qk_nope_head_dim], any float dtype.
        q_rope: [batch, num_heads, q_len, qk_rope_head_dim], rotated.
        latent: [batch, kv_len, kv_lora_rank], normalised; dtype of `q_nope`, or fp8.
        k_rope: [batch, kv_len, qk_rope_head_dim], rotated, the same for every head.
        kv_b_weight: [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank].
        mask: broadcasts to [batch, num_heads, q_len, kv_len]: bool, True where a key is seen, or
            float, added to the scores. A row that sees no key gives zeros.
        kv_scale: [] or [1], fp32: latent rows are `latent * kv_scale` and rotated parts
            `k_rope * kv_scale`; None is 1. fp8 rows need one.
        scale: factor on the scores.
        causal: query i sees keys 0 to i only.

    Returns:
        [batch, num_heads, q_len, v_head_dim], dtype of `q_nope`.
    """
    acc = accumulate_dtype(q_nope.dtype)
    nope = q_nope.shape[-1]
    weight = kv_b_weight.to(acc).unflatten(0, (q_nope.shape[1], -1))
    latent, k_rope = latent.to(acc), k_rope.to(acc)
    if kv_scale is not None:
        latent, k_rope = latent * kv_scale.to(acc), k_rope * kv_scale.to(acc)
    expanded = torch.einsum("btr,hdr->bhtd", latent, weight)
    key, value = expanded[..., :nope], expanded[..., nope:]
    scores = q_nope.to(acc) @ key.mT + q_rope.to(acc) @ k_rope.unsqueeze(1).mT
    return (_seen_softmax(scores * scale, mask, causal) @ value).to(q_nope.dtype)


def _seen_softmax(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax over the keys that are seen; rows without any are zero."""
    if mask is None and not causal:
        return scores.softmax(-1)
    if causal:
        q_len, kv_len = scores.shape[-2:]
        row = torch.arange(q_len, device=scores.device).unsqueeze(-1)
        hidden = torch.arange(kv_len, device=scores.device) > row
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(unseen, 0.0)


add_cuda(mla_decode, "mla", refuse=hopper_mla_unsupported)
add_triton(mla_decode, "mla", refuse=split_mla_unsupported)


@mla_decode.provider("torch", refuse=mla_unsupported, traceable=True)
def _(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    mask: Tensor | None,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """The absorbed form; scores and sums over keys in fp32, as the program's attention has them."""
    acc = accumulate_dtype(q_nope.dtype)
    _, num_heads, q_len, nope = q_nope.shape
    weight = kv_b_weight.unflatten(0, (num_heads, -1))
    w_key, w_value = weight[:, :nope], weight[:, nope:]
    q_latent = torch.einsum("bhsd,hdr->bhsr", q_nope, w_key).flatten(1, 2).to(acc)
    keys, rotated = latent.to(acc), k_rope.to(acc)
    if kv_scale is not None:
        keys, rotated = keys * kv_scale.to(acc), rotated * kv_scale.to(acc)
    scores = q_latent @ keys.mT + q_rope.flatten(1, 2).to(acc) @ rotated.mT
    scores = (scores * scale).unflatten(1, (num_heads, q_len))
    p = _seen_softmax(scores, mask, causal).flatten(1, 2)
    out = (p @ keys).unflatten(1, (num_heads, q_len)).to(q_nope.dtype)
    return torch.einsum("bhsr,hdr->bhsd", out, w_value).contiguous()
