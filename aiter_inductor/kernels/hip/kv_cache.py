"""Keys and values of new tokens into a cache of pages; the Python side of kv_cache.hip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, Parameter, i32, i64, pointer
from aiter_inductor.kernels.hip.loading import CPP_TYPES, arch_name, hip_module, load_kernel
from aiter_inductor.kernels.hip.rows import SMALL_BLOCK, VECTOR_BYTES, LaunchPlan
from aiter_inductor.kernels.prepared import Plans, facts_of

SLOT_TYPES = {torch.int32: "i32", torch.int64: "i64"}
_CACHE_STRIDES = ("page", "slot", "head")
_MAX_UNITS = 2**31 - 1


@dataclass(frozen=True)
class CacheStyle:
    """What kv_store.h needs to know of a cache.

    Attributes:
        dtype: of its elements.
        scaled: rows are divided by a scale.
        packed: keys are packed; `paged` is the layout where they are not.
        transposed: values of a page's tokens lie side by side.
        slot_dtype: of the slot numbers.
        page_size: slots of a page.
    """

    dtype: torch.dtype
    scaled: bool
    packed: bool
    transposed: bool
    slot_dtype: torch.dtype
    page_size: int

    def defines(self) -> dict[str, object]:
        """As kv_store.h names them."""
        return {
            "CACHE": CPP_TYPES[self.dtype],
            "QUANT": self.scaled,
            "PACKED": self.packed,
            "BESIDE": self.page_size if self.transposed else VECTOR_BYTES // self.dtype.itemsize,
            "SLOT": SLOT_TYPES[self.slot_dtype],
            "PAGE_SIZE": self.page_size,
        }

    def strides(self, cache: Tensor) -> tuple[int, int, int]:
        """Steps between pages, slots and heads; slots of a packed page have no single one."""
        if self.packed:
            return cache.stride(0), 0, cache.stride(1)
        return cache.stride(0), cache.stride(1), cache.stride(2)


@dataclass(frozen=True)
class KvCacheVariant:
    """One compilation of kv_cache.hip; a thread stores `vec` elements."""

    dtype: torch.dtype
    cache: CacheStyle
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    vec: int

    def module(self) -> Module:
        """kv_cache.hip with these definitions."""
        return hip_module(
            "kv_cache",
            "kv_cache.hip",
            X=CPP_TYPES[self.dtype],
            HEADS=self.num_kv_heads,
            KEY_DIM=self.head_dim,
            VALUE_DIM=self.v_head_dim,
            VEC=self.vec,
            THREADS=SMALL_BLOCK,
            **self.cache.defines(),
        )

    def signature(self) -> KernelSignature:
        """kv_cache_write_kernel's parameters."""
        rows = [i64(f"{x}_{s}") for x in ("key", "value") for s in ("token", "head")]
        return KernelSignature(
            "kv_cache_write_kernel",
            (
                pointer("key", self.dtype),
                pointer("value", self.dtype),
                *cache_pointers(self.cache),
                i32("num_tokens"),
                i64("num_slots"),
                *rows,
                *cache_strides(),
            ),
            waits=True,
        )


def cache_pointers(cache: CacheStyle) -> tuple[Parameter, ...]:
    """Both caches, the slots and both scales."""
    return (
        pointer("key_cache", cache.dtype),
        pointer("value_cache", cache.dtype),
        pointer("slots", cache.slot_dtype),
        pointer("key_scale", torch.float32, optional=True),
        pointer("value_scale", torch.float32, optional=True),
    )


def cache_strides() -> tuple[Parameter, ...]:
    """Strides of both caches."""
    return tuple(i64(f"{x}_cache_{s}") for x in ("key", "value") for s in _CACHE_STRIDES)


def cache_style(key_cache: Tensor, slots: Tensor, scale: Tensor | None, layout: str) -> CacheStyle:
    """Of a cache as the op `kv_cache_write` describes it.

    Raises:
        ValueError: for another layout.
    """
    if layout not in ("paged", "packed", "transposed"):
        raise ValueError(f"layout {layout!r} is none of paged, packed and transposed")
    page_size = key_cache.shape[1 if layout == "paged" else 3]
    kinds = scale is not None, layout != "paged", layout == "transposed"
    return CacheStyle(key_cache.dtype, *kinds, slots.dtype, page_size)


def kv_cache_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    layout: str = "paged",
) -> None:
    """Store `key` and `value` [num_tokens, num_kv_heads, head_dim]; see the op of this name.

    Raises:
        ValueError: for shapes or strides that the kernel does not take.
    """
    if key.shape[0] == 0:
        return
    tensors = (key, value, key_cache, value_cache, slots, key_scale, value_scale)
    facts = layout, facts_of(*tensors)
    plan = _PLANS.get(facts)
    if plan is None:
        style = cache_style(key_cache, slots, key_scale, layout)
        plan = _PLANS.keep(facts, _plan(key, value, key_cache, value_cache, style))
    plan.launch(plan.grid, plan.threads, 0, *tensors, *plan.sizes, *plan.strides)


_PLANS = Plans[LaunchPlan]()


def _plan(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, style: CacheStyle
) -> LaunchPlan:
    num_tokens, num_kv_heads, head_dim = key.shape
    v_head_dim, arch = value.shape[2], arch_name(key.device)
    strides = [*key.stride()[:2], *value.stride()[:2]]
    caches = [*style.strides(key_cache), *style.strides(value_cache)]
    for tensor in (key, value, *(() if style.packed else (key_cache, value_cache))):
        if tensor.stride(-1) != 1:
            raise ValueError(f"heads with last stride {tensor.stride(-1)} are not contiguous")
    vec = common_vector(
        [head_dim, v_head_dim, *strides, *caches], [key, value], [key_cache, value_cache]
    )
    units = num_tokens * num_kv_heads * (head_dim + v_head_dim) // vec
    if units > _MAX_UNITS:
        raise ValueError(f"{units} accesses in all exceed {_MAX_UNITS}")
    variant = KvCacheVariant(key.dtype, style, num_kv_heads, head_dim, v_head_dim, vec)
    return LaunchPlan(
        load_kernel(variant, arch, key.device.type).launch,
        (-(-units // SMALL_BLOCK), 1),
        SMALL_BLOCK,
        (num_tokens, key_cache.shape[0] * style.page_size),
        (*strides, *caches),
    )


def common_vector(counts: list[int], rows: list[Tensor], caches: list[Tensor]) -> int:
    """Elements that one access may hold in rows and caches: at most 16 bytes of the wider."""
    widest = max(tensor.element_size() for tensor in (*rows, *caches))
    vec = VECTOR_BYTES // widest
    while vec > 1:
        aligned = all(t.data_ptr() % (vec * t.element_size()) == 0 for t in (*rows, *caches))
        if aligned and all(count % vec == 0 for count in counts):
            return vec
        vec //= 2
    return 1
