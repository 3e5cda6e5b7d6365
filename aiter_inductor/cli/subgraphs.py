"""Stretches of plain PyTorch code that models contain, each beside the op it should become.

These are what the benchmark compiles: code as people write it, with none of this package in it.
Every function takes the arguments of its op and returns what the op returns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, **_: object) -> Tensor:
    """[*, N]; computes in fp32 and rounds once."""
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, **_: object
) -> tuple[Tensor, Tensor]:
    """RMSNorm of a residual sum, and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: object) -> Tensor:
    """[*, N]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def quant(
    x: Tensor, *, dtype: torch.dtype, group_size: int | None = None, **_: object
) -> tuple[Tensor, Tensor]:
    """fp8 with one scale a row, or one for every `group_size` elements of it."""
    limit = torch.finfo(dtype).max
    f = x.float()
    if group_size is not None:
        f = f.unflatten(-1, (-1, group_size))
    scale = f.abs().amax(-1, keepdim=True) / limit
    q = (f / scale).clamp(-limit, limit).to(dtype)
    return (q, scale) if group_size is None else (q.flatten(-2), scale.squeeze(-1))


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, then fp8."""
    return quant(rms_norm(x, weight, eps), dtype=dtype, group_size=group_size)


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of a residual sum, then fp8, and the sum."""
    out, total = add_rms_norm(x, residual, weight, eps)
    return (*quant(out, dtype=dtype, group_size=group_size), total)


def layer_norm_quant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """LayerNorm, then fp8."""
    return quant(layer_norm(x, weight, bias, eps), dtype=dtype, group_size=group_size)


def act_and_mul(gate: Tensor, up: Tensor, **_: object) -> Tensor:
    """SwiGLU's elementwise half."""
    return F.silu(gate) * up


def act_and_mul_quant(
    gate: Tensor, up: Tensor, *, dtype: torch.dtype, group_size: int | None = None, **_: object
) -> tuple[Tensor, Tensor]:
    """SwiGLU's elementwise half, then fp8."""
    return quant(act_and_mul(gate, up), dtype=dtype, group_size=group_size)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, **_: object) -> Tensor:
    """GPT-NeoX style, in the dtype of x."""
    return x * cos + _rotate_half(x) * sin


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """q and k by the same tables."""
    return rope(q, cos, sin), rope(k, cos, sin)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Qwen3's attention input: heads normalised, then rotated."""
    return rope_qk(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    *,
    scale: float,
    **_: object,
) -> Tensor:
    """Causal attention of heads that are put together first, as transformers' DeepSeek does."""
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), -1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def kv_cache_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    **_: object,
) -> None:
    """Rows stored by index, in vLLM's layout; every token has a slot."""
    for x, scale, cache in ((key, key_scale, key_cache), (value, value_scale, value_cache)):
        rows = x if scale is None else x.float() / scale
        if scale is not None:
            limit = torch.finfo(cache.dtype).max
            rows, cache = (
                rows.clamp(-limit, limit).to(cache.dtype).view(torch.uint8),
                cache.view(torch.uint8),
            )
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows)


def rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    **_: object,
) -> Tensor:
    """q and k rotated, k and v stored; tables of a row for each token."""
    tables = cos.unsqueeze(1), sin.unsqueeze(1)
    scales = key_scale, value_scale
    kv_cache_write(rope(k, *tables), v, key_cache, value_cache, slots, *scales)
    return rope(q, *tables)


def moe_route(
    logits: Tensor,
    bias: Tensor,
    *,
    topk: int,
    num_groups: int,
    topk_groups: int,
    eps: float,
    scale: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router behind its GEMM."""
    scores = logits.sigmoid()
    choice = scores + bias
    groups = choice.view(-1, num_groups, logits.shape[1] // num_groups)
    best = groups.topk(2, dim=-1)[0].sum(dim=-1)
    kept = torch.zeros_like(best)
    kept.scatter_(1, best.topk(topk_groups, dim=-1, sorted=False)[1], 1)
    mask = kept.unsqueeze(-1).expand_as(groups).reshape_as(choice)
    choice = choice.masked_fill(~mask.bool(), float("-inf"))
    experts = choice.topk(topk, dim=-1)[1]
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return weights * scale, experts
