"""What is written into a key-value cache, how the cache is laid out, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, differ, misshapen, no_scale, no_vector

LAYOUTS = ("paged", "packed", "transposed")
PACK_BYTES = 16
MAX_HEAD_DIM = 1024
CACHE_RANKS = {"paged": (4, 4), "packed": (5, 5), "transposed": (5, 4)}
"""Dimensions of keys and of values."""


def pack_of(cache: Tensor) -> int:
    """Elements that lie side by side in packed keys and values: 16 bytes."""
    return PACK_BYTES // cache.element_size()


def page_size_of(key_cache: Tensor, layout: str) -> int:
    """Slots of a page."""
    return key_cache.shape[1 if layout == "paged" else 3]


@dataclass(frozen=True)
class KvCacheProblem:
    """Rows of keys and values, one of each a token and head, and the pages they go to.

    Attributes:
        num_tokens: new tokens.
        num_kv_heads: heads of keys and of values.
        head_dim: elements of a key.
        v_head_dim: elements of a value.
        num_pages: pages of the cache.
        page_size: slots of a page.
        dtype: of the new rows.
        cache_dtype: of the cache.
        layout: `paged`, `packed` or `transposed`.
        scaled: rows are divided by given scales.
        slot_dtype: of the slot numbers.
        obstacle: what no kernel takes about these tensors, or None.
    """

    num_tokens: Dim
    num_kv_heads: Dim
    head_dim: Dim
    v_head_dim: Dim
    num_pages: Dim
    page_size: Dim
    dtype: torch.dtype
    cache_dtype: torch.dtype
    layout: str = "paged"
    scaled: bool = False
    slot_dtype: torch.dtype = torch.int64
    obstacle: str | None = None

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        *,
        layout: str = "paged",
    ) -> KvCacheProblem:
        """From the arguments of `kv_cache_write`."""
        return cls(
            num_tokens=dim(key.shape[0]),
            num_kv_heads=dim(key.shape[1]),
            head_dim=dim(key.shape[2]),
            v_head_dim=dim(value.shape[2]),
            num_pages=dim(key_cache.shape[0]),
            page_size=dim(page_size_of(key_cache, layout)),
            dtype=key.dtype,
            cache_dtype=key_cache.dtype,
            layout=layout,
            scaled=key_scale is not None,
            slot_dtype=slots.dtype,
            obstacle=_mixed_dtypes(key, value, key_cache, value_cache)
            or _unfit_scales(key_scale, value_scale)
            or _unfit_cache("key", key, key_cache, layout)
            or _unfit_cache("value", value, value_cache, layout)
            or _unfit_rows(key, value, key_cache, value_cache, layout)
            or no_vector("slots", slots, key.shape[0])
            or apart(key, value, key_cache, value_cache, slots, key_scale, value_scale)
            or None,
        )

    def bytes_moved(self) -> Dim:
        """Every new row read and written once, its slot number read once."""
        rows = self.num_tokens * self.num_kv_heads * (self.head_dim + self.v_head_dim)
        slots = self.num_tokens * self.slot_dtype.itemsize
        return rows * (self.dtype.itemsize + self.cache_dtype.itemsize) + slots

    def flops(self) -> Dim:
        """One division for each element."""
        return self.num_tokens * self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random rows, a random cache, and slots in random order."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: Dim) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        rows = self.num_tokens, self.num_kv_heads
        args = (
            normal(*rows, self.head_dim).to(self.dtype),
            normal(*rows, self.v_head_dim).to(self.dtype),
            normal(*cache_shape(self, self.num_pages, is_key=True)).to(self.cache_dtype),
            normal(*cache_shape(self, self.num_pages, is_key=False)).to(self.cache_dtype),
            self.sample_slots(generator, device),
            torch.full((1,), 0.5, device=device) if self.scaled else None,
            torch.full((1,), 0.25, device=device) if self.scaled else None,
        )
        return args, {"layout": self.layout}

    def sample_slots(self, generator: torch.Generator, device: str) -> Tensor:
        """[num_tokens], all different; those beyond the cache, if it is small, are not stored."""
        most = max(self.num_pages * self.page_size, self.num_tokens)
        order = torch.randperm(most, generator=generator, device=device)
        return order[: self.num_tokens].to(self.slot_dtype)


def cache_shape(problem: Any, pages: Dim, *, is_key: bool) -> tuple[Dim, ...]:
    """The shape of the keys or of the values of a problem, whose heads lie in so many pages."""
    size, heads = problem.page_size, problem.num_kv_heads
    head_dim = problem.head_dim if is_key else problem.v_head_dim
    if problem.layout == "paged":
        return pages, size, heads, head_dim
    pack = PACK_BYTES // problem.cache_dtype.itemsize
    if is_key:
        return pages, heads, head_dim // pack, size, pack
    if problem.layout == "transposed":
        return pages, heads, head_dim, size
    return pages, heads, size // pack, head_dim, pack


def kv_cache_unsupported(problem: Any, use: Use) -> str | None:
    """What no kernel that writes a cache takes."""
    if problem.obstacle:
        return str(problem.obstacle)
    if problem.dtype not in ROW_DTYPES:
        return f"keys are {short_name(problem.dtype)}; kernels take bfloat16, float16, float32"
    if problem.cache_dtype not in (*ROW_DTYPES, *FP8_DTYPES):
        return f"the cache is {short_name(problem.cache_dtype)}, neither float nor fp8"
    if problem.scaled != (problem.cache_dtype in FP8_DTYPES):
        given = "given" if problem.scaled else "missing"
        return f"scales are {given} for a cache of {short_name(problem.cache_dtype)}"
    if problem.slot_dtype not in (torch.int32, torch.int64):
        return f"slots are {short_name(problem.slot_dtype)}; kernels take int32 and int64"
    for name in ("num_kv_heads", "head_dim", "v_head_dim", "page_size"):
        size = getattr(problem, name)
        if fixed(size) is None:
            return f"{name} {size} is not known when compiling"
        if size < 1 or ("head_dim" in name and size > MAX_HEAD_DIM):
            return f"{name}={size} is outside 1 to {MAX_HEAD_DIM}"
    return None


def _mixed_dtypes(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> str | None:
    for ours, theirs, what in ((key, value, "key"), (key_cache, value_cache, "key_cache")):
        if ours.dtype != theirs.dtype:
            one, other = short_name(ours.dtype), short_name(theirs.dtype)
            return f"{what} is {one} but its value is {other}; one launch writes one dtype"
    return None


def _unfit_scales(key_scale: Tensor | None, value_scale: Tensor | None) -> str | None:
    if (key_scale is None) != (value_scale is None):
        return "one of keys and values has a scale and the other none"
    return no_scale("key_scale", key_scale) or no_scale("value_scale", value_scale)


def _unfit_rows(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, layout: str
) -> str:
    pages, slots = key_cache.shape[0], page_size_of(key_cache, layout)
    found = value_cache.shape[0], _value_page_size(value_cache, layout)
    if differ(dim(found[0]), dim(pages)) or differ(dim(found[1]), dim(slots)):
        return (
            f"key_cache has {pages} pages of {slots} tokens, value_cache {found[0]} of {found[1]}"
        )
    return misshapen("value", value, (*map(dim, key.shape[:2]), dim(value.shape[2])))


def _value_page_size(value_cache: Tensor, layout: str) -> int:
    if layout == "packed":
        return value_cache.shape[2] * value_cache.shape[4]
    return value_cache.shape[1 if layout == "paged" else 3]


def _unfit_cache(name: str, rows: Tensor, cache: Tensor, layout: str) -> str | None:
    if layout not in LAYOUTS:
        return f"layout {layout!r} is not one of {', '.join(LAYOUTS)}"
    if rows.dim() != 3 or dim(rows.stride(-1)) != 1:
        return (
            f"{name} of shape {list(rows.shape)} and strides {rows.stride()} is not "
            f"[num_tokens, num_kv_heads, head_dim] with contiguous heads"
        )
    heads, width = dim(rows.shape[1]), dim(rows.shape[2])
    expected = CACHE_RANKS[layout][name == "value"]
    if cache.dim() != expected:
        return f"{name}_cache has {cache.dim()} dimensions; the {layout} layout has {expected}"
    if layout == "paged":
        found = dim(cache.shape[2]), dim(cache.shape[3])
    elif name == "key":
        found = dim(cache.shape[1]), dim(cache.shape[2]) * dim(cache.shape[4])
    else:
        found = dim(cache.shape[1]), dim(cache.shape[2 if layout == "transposed" else 3])
    if found != (heads, width):
        return f"{name}_cache holds heads {found} but {name} has {(heads, width)}"
    return _unfit_strides(name, cache, layout)


def _unfit_strides(name: str, cache: Tensor, layout: str) -> str | None:
    if layout == "paged":
        if dim(cache.stride(-1)) == 1:
            return None
        return f"{name}_cache has last stride {cache.stride(-1)}; kernels write with stride 1"
    if cache.dim() == 5 and dim(cache.shape[-1]) != pack_of(cache):
        return f"{name}_cache packs {cache.shape[-1]} elements, not {PACK_BYTES} bytes"
    dense: Dim = 1
    for size, stride in reversed(list(zip(cache.shape[2:], cache.stride()[2:], strict=True))):
        if dim(size) != 1 and dim(stride) != dense:
            return f"{name}_cache with strides {cache.stride()} is not contiguous within a head"
        dense = dense * dim(size)
    return None
