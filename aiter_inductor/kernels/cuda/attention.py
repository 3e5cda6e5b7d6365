"""Flash attention on Hopper's tensor cores; the Python side of attention.cu."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from aiter_inductor.core.launch import tensor_map
from aiter_inductor.kernels.cuda.attention_config import (
    COLUMN,
    WARPGROUP_ROWS,
    AttentionConfig,
    AttentionVariant,
    padded,
)
from aiter_inductor.kernels.cuda.loading import arch_name, load_kernel

L2_BYTES = 20 << 20  # of keys and values that heads advancing together may hold there
NO_MAP = bytes(128)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention without its log-sum-exp; see the op of this name."""
    refuse_extras(mask, softcap)
    out = _heads_like(q, v, layout)
    _attend(q, k, v, sinks, out, None, scale, causal, window, config)
    return out


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "bhsd",
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; see the op of this name."""
    refuse_extras(mask, softcap)
    out = _heads_like(q, v, layout)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    _attend(q, k, v, sinks, out, lse, scale, causal, window, config)
    return out, lse


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: str = "none",
    layout: str = "bhsd",
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention of heads in two parts; see the op of this name."""
    out = _heads_like(q_nope, v, layout)
    rest = q_rope, k_rope
    _attend(q_nope, k_nope, v, None, out, None, scale, causal, None, config, rest)
    return out


def refuse_extras(mask: Tensor | None, softcap: float | None) -> None:
    """Raise ValueError for what these kernels do not compute."""
    if mask is not None:
        raise ValueError(f"the kernel reads no mask, and one of {tuple(mask.shape)} is given")
    if softcap is not None:
        raise ValueError(f"the kernel has no softcap, and softcap={softcap:g} is asked for")


def _heads_like(q: Tensor, v: Tensor, layout: str) -> Tensor:
    """An empty [B, H, S, Dv], dense in the order of `layout`."""
    batch, num_heads, num_queries, _ = q.shape
    if layout == "bshd":
        return q.new_empty(batch, num_queries, num_heads, v.shape[-1]).transpose(1, 2)
    return q.new_empty(batch, num_heads, num_queries, v.shape[-1])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: str,
    window: int | None,
    config: AttentionConfig | None,
    rest: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill `out`, and `lse` if there is one; `rest` are the last columns of queries and keys."""
    if out.numel() == 0:
        return
    if k.shape[2] == 0:
        _see_nothing(out, lse, sinks)
        return
    q, k, v = map(readable, (q, k, v))
    rest = None if rest is None else (readable(rest[0]), readable(rest[1]))
    (batch, num_heads, num_queries, qk_dim), (kv_heads, num_keys) = q.shape, k.shape[1:3]
    v_dim, rest_dim = v.shape[-1], 0 if rest is None else rest[0].shape[-1]
    padded_qk = padded(qk_dim) + padded(rest_dim)
    config = config or AttentionConfig.default(padded_qk, padded(v_dim), num_queries)
    variant = AttentionVariant(
        config,
        padded_qk,
        padded(v_dim),
        causal != "none",
        window is not None,
        q.dtype == torch.float16,
        padded(rest_dim) // COLUMN,
    )
    kernel = load_kernel(variant, arch_name(q.device), q.device.type)
    row_blocks, per_kv = -(-num_queries // config.rows), num_heads // kv_heads
    items, num_sms = batch * num_heads * row_blocks, _num_sms(q.device)
    uneven = (variant.causal or variant.window) and items > num_sms
    together = max(L2_BYTES // max(num_keys * (qk_dim + rest_dim + v_dim) * 2, 1), 1) * per_kv
    sizes = (num_heads, per_kv, batch * num_heads, num_queries, num_keys)
    shift = num_keys - num_queries if causal == "bottom_right" else 0
    order = (shift, window or 0, row_blocks, min(together, batch * num_heads), v_dim)
    kernel.launch(
        min(items, num_sms),
        config.threads,
        config.shared_bytes(variant.qk_dim, variant.v_dim),
        heads_map(q, WARPGROUP_ROWS),
        heads_map(k, config.block_n),
        heads_map(v, config.block_n),
        *_rest_maps(rest, config),
        *(out, lse, None if sinks is None else sinks.float()),
        torch.zeros(1, dtype=torch.int32, device=q.device) if uneven else None,
        *(*sizes, *order, scale, scale * math.log2(math.e), *out.stride()[:3]),
    )


def _rest_maps(rest: tuple[Tensor, Tensor] | None, config: AttentionConfig) -> tuple[bytes, bytes]:
    """By which TMA copies the last columns of queries and keys, if they lie apart."""
    if rest is None:
        return NO_MAP, NO_MAP
    return heads_map(rest[0], WARPGROUP_ROWS), heads_map(rest[1], config.block_n)


def _see_nothing(out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> None:
    """What attention over no keys gives."""
    out.zero_()
    if lse is not None and sinks is not None:
        lse.copy_(sinks[:, None])
    elif lse is not None:
        lse.fill_(-math.inf)


def heads_map(heads: Tensor, rows: int) -> bytes:
    """By which TMA copies `rows` rows of one column of [B, H, S, D]."""
    return NO_MAP if heads.is_meta else tensor_map(heads, (1, 1, rows, COLUMN))


def readable(heads: Tensor) -> Tensor:
    """[B, H, S, D] as TMA can read it: D contiguous, the others 16 bytes or multiples apart."""
    step = 16 // heads.element_size()
    strides = heads.stride()
    fits = strides[-1] == 1 and heads.data_ptr() % 16 == 0
    if fits and all(stride > 0 and stride % step == 0 for stride in strides[:-1]):
        return heads
    return heads.clone(memory_format=torch.contiguous_format)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; on meta tensors an H200's."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
