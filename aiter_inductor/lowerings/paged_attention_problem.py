"""What attention over pages is asked to compute, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed

MAX_HEAD_DIM = 256
MAX_PAGE_SIZE = 1 << 16
PACK_BYTES = 16
_RANK = {"paged": 4, "packed": 5}


@dataclass(frozen=True)
class PagedAttentionProblem:
    """One query a sequence over keys and values in pages.

    Attributes:
        num_seqs: sequences.
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: elements of a key.
        v_head_dim: elements of a value.
        page_size: tokens a page holds.
        max_pages: pages a sequence may have.
        dtype: of the queries.
        cache_dtype: of keys and values.
        layout: `paged` or `packed`.
        window: how many tokens are seen, or None.
        softcap: of the scores; 0 is none.
        sinks: each head has a further score.
        aligned: each head's row of a token, and each pack, begins at a multiple of 16 bytes.
        mismatch: why the arguments do not fit together; empty if they do.
    """

    num_seqs: Dim
    num_heads: Dim
    num_kv_heads: Dim
    head_dim: Dim
    v_head_dim: Dim
    page_size: Dim
    max_pages: Dim
    dtype: torch.dtype
    cache_dtype: torch.dtype
    layout: str = "paged"
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    aligned: bool = True
    mismatch: str = ""

    @classmethod
    def of(
        cls,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        scale: float,
        layout: str = "paged",
        window: int | None = None,
        softcap: float = 0.0,
    ) -> PagedAttentionProblem:
        """From the arguments of `paged_attention`."""
        packed = layout == "packed"
        num_seqs, num_heads, head_dim = map(dim, q.shape)
        fits = layout in _RANK and key_cache.dim() == value_cache.dim() == _RANK[layout]
        page_size, kv_heads = (3, 1) if packed else (1, 2)
        return cls(
            num_seqs,
            num_heads,
            dim(key_cache.shape[kv_heads]) if fits else 0,
            head_dim,
            dim(value_cache.shape[3]) if fits else 0,
            dim(key_cache.shape[page_size]) if fits else 0,
            dim(block_tables.shape[-1]),
            q.dtype,
            key_cache.dtype,
            layout,
            window,
            softcap,
            sinks is not None,
            fits and _is_aligned(key_cache) and _is_aligned(value_cache),
            _mismatch(q, key_cache, value_cache, block_tables, seq_lens, layout),
        )

    def bytes_moved(self) -> Dim:
        """Queries, results and tables once, and keys and values of full tables once."""
        tables = self.num_seqs * (self.max_pages + 1) * 4
        tokens = self.num_seqs * self.max_pages * self.page_size
        cached = tokens * self.num_kv_heads * (self.head_dim + self.v_head_dim)
        rows = self.num_seqs * self.num_heads * (self.head_dim + self.v_head_dim)
        return cached * self.cache_dtype.itemsize + rows * self.dtype.itemsize + tables

    def flops(self) -> Dim:
        """Two a multiply-add, of full tables."""
        tokens = self.num_seqs * self.max_pages * self.page_size
        return 2 * tokens * self.num_heads * (self.head_dim + self.v_head_dim)

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random queries and a random cache; lengths from none to full, pages in random order.

        Table entries beyond a length are -1, which must not be read.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: Dim) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        num_pages = self.num_seqs * self.max_pages
        order = torch.randperm(num_pages, generator=generator, device=device)
        tables = order.view(self.num_seqs, self.max_pages).to(torch.int32)
        most = self.max_pages * self.page_size
        lengths = torch.linspace(most, 0, max(self.num_seqs, 1), device=device)
        lengths = lengths[: self.num_seqs].to(torch.int32)
        used = torch.arange(self.max_pages, device=device) * self.page_size < lengths[:, None]
        scaled = self.cache_dtype in FP8_DTYPES
        args = (
            normal(self.num_seqs, self.num_heads, self.head_dim).to(self.dtype),
            normal(*self._cache_shape(num_pages, self.head_dim, True)).to(self.cache_dtype),
            normal(*self._cache_shape(num_pages, self.v_head_dim, False)).to(self.cache_dtype),
            tables.masked_fill(~used, -1),
            lengths,
            torch.full((1,), 0.5, device=device) if scaled else None,
            torch.full((1,), 0.25, device=device) if scaled else None,
            normal(self.num_heads).to(self.dtype) if self.sinks else None,
        )
        return args, {
            "scale": self.head_dim**-0.5,
            "layout": self.layout,
            "window": self.window,
            "softcap": self.softcap,
        }

    def _cache_shape(self, num_pages: int, head_dim: Dim, is_key: bool) -> tuple[Dim, ...]:
        heads, size = self.num_kv_heads, self.page_size
        if self.layout == "paged":
            return num_pages, size, heads, head_dim
        pack = PACK_BYTES // self.cache_dtype.itemsize
        if is_key:
            return num_pages, heads, head_dim // pack, size, pack
        return num_pages, heads, size // pack, head_dim, pack


def paged_attention_unsupported(problem: PagedAttentionProblem, use: Use) -> str | None:
    """What no kernel over pages takes."""
    if problem.mismatch:
        return problem.mismatch
    if problem.dtype not in ROW_DTYPES:
        return f"queries are {short_name(problem.dtype)}; kernels take bfloat16, float16, float32"
    if problem.cache_dtype not in (problem.dtype, *FP8_DTYPES):
        names = short_name(problem.dtype), short_name(problem.cache_dtype)
        return f"queries are {names[0]} and the cache {names[1]}, neither the same nor fp8"
    if problem.cache_dtype in FP8_DTYPES and problem.cache_dtype not in use.arch.fp8_dtypes:
        return f"{use.arch} has no instructions for {short_name(problem.cache_dtype)}"
    for name in ("head_dim", "v_head_dim"):
        width = fixed(getattr(problem, name))
        if width is None or not 1 <= width <= MAX_HEAD_DIM:
            return f"{name}={getattr(problem, name)} is not a number up to {MAX_HEAD_DIM}"
    size = fixed(problem.page_size)
    if size is None or not 1 <= size <= MAX_PAGE_SIZE:
        return f"page_size={problem.page_size} is not a number up to {MAX_PAGE_SIZE}"
    heads, kv_heads = fixed(problem.num_heads), fixed(problem.num_kv_heads)
    if not heads or not kv_heads or heads % kv_heads:
        return f"{problem.num_heads} query heads are no multiple of {problem.num_kv_heads} kv heads"
    return None


def paged_vectors_unsupported(problem: PagedAttentionProblem, use: Use) -> str | None:
    """What the kernel that reads caches in vectors of 16 bytes does not take."""
    reason = paged_attention_unsupported(problem, use)
    if reason is not None:
        return reason
    if problem.dtype == torch.float32:
        return "queries are float32; the kernel multiplies bfloat16 and float16"
    pack = PACK_BYTES // problem.cache_dtype.itemsize
    for name in ("head_dim", "v_head_dim"):
        if getattr(problem, name) % pack:
            return f"{name}={getattr(problem, name)} is no multiple of the {pack} in 16 bytes"
    if not problem.aligned:
        return "rows of the cache do not begin at multiples of 16 bytes"
    return None


def _is_aligned(cache: Tensor) -> bool:
    """Whether all strides but the last, which is 1, and the offset are whole vectors."""
    *outer, last = (fixed(dim(stride)) for stride in cache.stride())
    pack = PACK_BYTES // cache.element_size()
    starts = (*outer, fixed(dim(cache.storage_offset())))
    return last == 1 and all(start is not None and start % pack == 0 for start in starts)


def _mismatch(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    layout: str,
) -> str:
    if layout not in _RANK:
        return f"layout is {layout!r}; it may be 'paged' or 'packed'"
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != _RANK[layout]:
            return f"{name} has {cache.dim()} dimensions; {layout!r} has {_RANK[layout]}"
    if key_cache.dtype != value_cache.dtype:
        names = short_name(key_cache.dtype), short_name(value_cache.dtype)
        return f"keys are {names[0]} and values {names[1]}"
    if block_tables.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        names = short_name(block_tables.dtype), short_name(seq_lens.dtype)
        return f"block_tables are {names[0]} and seq_lens {names[1]}, not int32"
    found = key_cache.shape[2] * key_cache.shape[4] if layout == "packed" else key_cache.shape[3]
    if dim(found) != dim(q.shape[-1]):
        return f"queries have {dim(q.shape[-1])} elements a head and keys {dim(found)}"
    return ""
