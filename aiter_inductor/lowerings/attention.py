"""Scaled dot-product attention over grouped heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.attention_decode import (
    one_query_unsupported,
    sdpa_decodes_faster,
)
from aiter_inductor.lowerings.attention_hopper import others_attend_faster, wgmma_unsupported
from aiter_inductor.lowerings.attention_problem import (
    AttentionProblem,
    flash_unsupported,
    sdpa_has_nothing_to_add,
    sdpa_is_faster,
    sdpa_unsupported,
)
from aiter_inductor.lowerings.providers import add_cuda, add_hip, add_triton


@op(problem=AttentionProblem.of)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    first_keys: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
) -> Tensor:
    """`softmax(q k^T * scale) v`, each key and value head shared by a group of query heads.

    A query that sees no key gives zeros.

    Args:
        q: [B, H, S, Dqk], any float dtype.
        k: [B, KVH, T, Dqk], H a multiple of KVH.
        v: [B, KVH, T, Dv].
        mask: [B or 1, H or 1, S or 1, T or 1] or None; bool (True is seen) or float (added to the
            scaled scores).
        sinks: [H] or None, one more logit a head whose probability goes nowhere.
        first_keys: [B, S], int32, or None: the first key that a query sees, where documents lie
            packed in a row its document's; never before that of the query before it.
        scale: factor on the scores.
        causal: `top_left` lets query i see the keys up to i, `bottom_right` those up to
            i + T - S, `none` all.
        window: how many keys a query sees, its own position included, or None.
        softcap: c in `c * tanh(scores / c)`, applied before any mask, or None.
        layout: order of the result in memory, `bhsd` or `bshd`.

    Returns:
        [B, H, S, Dv], dtype of q, dense in the order of `layout`.
    """
    scores = masked(capped_scores(q, k, scale, softcap), mask, causal, window, first_keys)
    probabilities = _softmax(scores, sinks)
    grouped = probabilities.unflatten(1, (v.shape[1], q.shape[1] // v.shape[1]))
    out = (grouped @ v.to(scores.dtype).unsqueeze(2)).flatten(1, 2).to(q.dtype)
    return in_layout(out, layout)


def capped_scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[B, H, S, T]: every query against every key, in float32 or float64."""
    acc = accumulate_dtype(q.dtype)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    scores = q.to(acc).unflatten(1, groups) @ k.to(acc).unsqueeze(2).transpose(-1, -2) * scale
    scores = scores.flatten(1, 2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked(
    scores: Tensor,
    mask: Tensor | None,
    causal: str,
    window: int | None,
    first_keys: Tensor | None = None,
) -> Tensor:
    """`scores` with a float mask added, and minus infinity where a key is hidden."""
    hidden = _hidden(scores, causal, window)
    if first_keys is not None:
        before = torch.arange(scores.shape[-1], device=scores.device) < first_keys[:, None, :, None]
        hidden = before if hidden is None else hidden | before
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask if hidden is None else hidden | ~mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def in_layout(out: Tensor, layout: str) -> Tensor:
    """`out` [B, H, S, D], dense in the order `bhsd` or `bshd`; copied only if it is not."""
    if layout == "bshd":
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


add_hip(attention, "attention", refuse=one_query_unsupported, decline=sdpa_decodes_faster)
add_cuda(attention, "attention", refuse=wgmma_unsupported, decline=others_attend_faster)
add_triton(attention, "attention", refuse=flash_unsupported, decline=sdpa_is_faster)


@attention.provider(
    "torch", refuse=sdpa_unsupported, decline=sdpa_has_nothing_to_add, traceable=True
)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    first_keys: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
) -> Tensor:
    """SDPA without a mask to read and without copies of keys and values.

    The CPU's flash kernel wants heads of one width. Values padded with zeros get it: 16 heads of
    48 and 32, 1024 tokens, causal, two cores: 77 ms in fp32 and 97 ms in bf16, where the unfused
    product takes 288 and 365.
    """
    v_dim, widened = v.shape[-1], v
    if q.device.type == "cpu" and v_dim < q.shape[-1]:
        widened = F.pad(v, (0, q.shape[-1] - v_dim))
    out = F.scaled_dot_product_attention(
        q,
        k,
        widened,
        attn_mask=mask,
        is_causal=causal != "none",
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return in_layout(out[..., :v_dim], layout)


def _hidden(scores: Tensor, causal: str, window: int | None) -> Tensor | None:
    """[S, T] bool: the keys that lie ahead of a query or behind its window."""
    if causal == "none" and window is None:
        return None
    S, T = scores.shape[-2:]
    shift = T - S if causal == "bottom_right" else 0
    query = torch.arange(S, device=scores.device)[:, None] + shift
    key = torch.arange(T, device=scores.device)
    ahead, behind = key > query, key <= query - (window or 0)
    if window is None:
        return ahead
    return behind if causal == "none" else ahead | behind


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities of the keys; zeros where every key is hidden."""
    num_keys = scores.shape[-1]
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(unseen, 0.0)[..., :num_keys]
