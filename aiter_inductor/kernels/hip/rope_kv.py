"""Rotated q, and rotated k and v into a cache of pages; the Python side of rope_kv.hip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, i32, i64, pointer
from aiter_inductor.kernels.hip.kv_cache import (
    CacheStyle,
    cache_pointers,
    cache_strides,
    cache_style,
    common_vector,
)
from aiter_inductor.kernels.hip.loading import (
    CPP_TYPES,
    arch_name,
    hip_module,
    load_kernel,
    wave_size,
)
from aiter_inductor.kernels.hip.rope import RopeStyle, rope_style
from aiter_inductor.kernels.hip.rows import SMALL_BLOCK, LaunchPlan
from aiter_inductor.kernels.prepared import Plans, facts_of

_MAX_HEADS_IN_ALL = 2**31 - 1


@dataclass(frozen=True)
class RopeKvVariant:
    """One compilation of rope_kv.hip: `vec` pairs in each of a lane's `units`."""

    style: RopeStyle
    cache: CacheStyle
    dtype: torch.dtype
    table_dtype: torch.dtype
    vec: int
    lanes: int
    units: int

    def module(self) -> Module:
        """rope_kv.hip with these definitions."""
        style = self.style
        return hip_module(
            "rope_kv",
            "rope_kv.hip",
            X=CPP_TYPES[self.dtype],
            C=CPP_TYPES[self.table_dtype],
            HALF=style.rotary_dim // 2,
            TAIL=style.head_dim - style.rotary_dim,
            IN_PAIRS=style.pairs_in,
            OUT_PAIRS=style.pairs_out,
            FULL_TABLE=style.full_table,
            TABLE_PAIRS=style.pairs_out,
            TRANSPOSED=False,
            THREADS=SMALL_BLOCK,
            LANES=self.lanes,
            UNITS=self.units,
            VEC=self.vec,
            **self.cache.defines(),
        )

    def signature(self) -> KernelSignature:
        """rope_kv_cache_write_kernel's parameters."""
        heads = [i64(f"{x}_{s}") for x in ("q", "k", "v") for s in ("token", "head")]
        return KernelSignature(
            "rope_kv_cache_write_kernel",
            (
                *(pointer(name, self.dtype) for name in ("q", "k", "v", "q_out")),
                *(pointer(name, self.table_dtype) for name in ("cos", "sin")),
                pointer("positions", torch.int64, optional=True),
                *cache_pointers(self.cache),
                *(i32(name) for name in ("num_rows", "num_heads", "num_kv_heads")),
                i64("num_slots"),
                *heads,
                *(i64(name) for name in ("cos_token", "sin_token")),
                *cache_strides(),
            ),
            waits=True,
        )


def rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    layout: str = "paged",
    interleaved_in: bool = False,
    interleaved_out: bool = False,
    rotary_dim: int | None = None,
) -> Tensor:
    """Rotate `q` and `k` [num_tokens, heads, head_dim]; see the op of this name.

    Raises:
        ValueError: for shapes or strides that the kernel does not take.
    """
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.shape[0] == 0:
        return q_out
    rows, caches = (q, k, v, q_out, cos, sin), (key_cache, value_cache)
    tensors = (*rows, positions, *caches, slots, key_scale, value_scale)
    style = rope_style(q, cos, rotary_dim, interleaved_in, interleaved_out)
    key = layout, style, facts_of(*tensors)
    plan = _PLANS.get(key)
    if plan is None:
        cache = cache_style(key_cache, slots, key_scale, layout)
        plan = _PLANS.keep(key, _plan(rows, caches, style, cache))
    plan.launch(plan.grid, plan.threads, 0, *tensors, *plan.sizes, *plan.strides)
    return q_out


_PLANS = Plans[LaunchPlan]()


def _plan(
    rows: tuple[Tensor, ...], caches: tuple[Tensor, ...], style: RopeStyle, cache: CacheStyle
) -> LaunchPlan:
    q, k, v, _, cos, sin = rows
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, arch = k.shape[1], arch_name(q.device)
    num_rows = num_tokens * (num_heads + 2 * num_kv_heads)
    if num_rows > _MAX_HEADS_IN_ALL:
        raise ValueError(f"{num_rows} heads in all exceed {_MAX_HEADS_IN_ALL}")
    strides = [s for x in (q, k, v) for s in x.stride()[:2]] + [cos.stride(0), sin.stride(0)]
    pages = [stride for each in caches for stride in cache.strides(each)]
    for tensor in (*rows, *(() if cache.packed else caches)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"rows with last stride {tensor.stride(-1)} are not contiguous")
    vec = _pairs_in_a_unit(rows, caches, style, [*strides, *pages])
    num_units = style.rotary_dim // 2 // vec + (style.head_dim - style.rotary_dim) // vec
    lanes = min(1 << (num_units - 1).bit_length(), wave_size(arch))
    units = -(-num_units // lanes)
    variant = RopeKvVariant(style, cache, q.dtype, cos.dtype, vec, lanes, units)
    return LaunchPlan(
        load_kernel(variant, arch, q.device.type).launch,
        (-(-num_rows // (SMALL_BLOCK // lanes)), 1),
        SMALL_BLOCK,
        (num_rows, num_heads, num_kv_heads, caches[0].shape[0] * cache.page_size),
        (*strides, *pages),
    )


def _pairs_in_a_unit(
    rows: tuple[Tensor, ...], caches: tuple[Tensor, ...], style: RopeStyle, strides: list[int]
) -> int:
    """Both elements of a pair are one access where they lie side by side, else two."""
    half, tail = style.rotary_dim // 2, style.head_dim - style.rotary_dim
    if not (style.pairs_in or style.pairs_out):
        return common_vector([half, tail, *strides], [*rows], [*caches])
    elements = common_vector([2 * half, 2 * tail, *strides], [*rows], [*caches])
    if elements == 1:
        raise ValueError(f"pairs that lie side by side are not aligned at strides {strides}")
    return elements // 2
