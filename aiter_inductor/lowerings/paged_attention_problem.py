"""What attention over pages is asked to compute, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, misshapen, no_vector
from aiter_inductor.lowerings.kv_cache_problem import (
    CACHE_RANKS,
    LAYOUTS,
    PACK_BYTES,
    cache_shape,
)

MAX_HEAD_DIM = 256
MAX_PAGE_SIZE = 1 << 16
MAX_SPAN = 2**31 - 1
MAX_GRID_Z = 65535


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
        layout: `paged`, `packed` or `transposed`.
        window: how many tokens are seen, or None.
        softcap: of the scores; 0 is none.
        sinks: each head has a further score.
        aligned: each head's row of a token, and each pack, begins at a multiple of 16 bytes.
        whole: each head of a packed page is one piece of memory.
        per_token: each token has a scale of its own for each head.
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
    whole: bool = True
    per_token: bool = False
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
        num_seqs, num_heads, head_dim = map(dim, q.shape)
        fits = layout in LAYOUTS and (key_cache.dim(), value_cache.dim()) == CACHE_RANKS[layout]
        page_size, kv_heads = (1, 2) if layout == "paged" else (3, 1)
        v_head_dim = 2 if layout == "transposed" else 3
        mismatch = _mismatch(q, key_cache, value_cache, block_tables, seq_lens, layout)
        whole = fits and _is_whole(key_cache) and _is_whole(value_cache)
        scales = key_scale, value_scale
        return cls(
            num_seqs=num_seqs,
            num_heads=num_heads,
            num_kv_heads=dim(key_cache.shape[kv_heads]) if fits else 0,
            head_dim=head_dim,
            v_head_dim=dim(value_cache.shape[v_head_dim]) if fits else 0,
            page_size=dim(key_cache.shape[page_size]) if fits else 0,
            max_pages=dim(block_tables.shape[-1]),
            dtype=q.dtype,
            cache_dtype=key_cache.dtype,
            layout=layout,
            window=window,
            softcap=softcap,
            sinks=sinks is not None,
            aligned=fits and _is_aligned(key_cache) and _is_aligned(value_cache),
            whole=layout == "paged" or whole,
            per_token=any(x is not None and dim(x.numel()) != 1 for x in scales),
            mismatch=mismatch
            or unfit_tables(q, block_tables, seq_lens)
            or _unfit_scales(key_cache, *scales, layout)
            or no_vector("sinks", sinks, num_heads)
            or apart(q, key_cache, value_cache, block_tables, seq_lens, *scales, sinks),
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
        steps = 40.0 if self.cache_dtype == torch.int8 else 1.0
        shapes = (cache_shape(self, num_pages, is_key=is_key) for is_key in (True, False))
        caches = [steps * normal(*shape) for shape in shapes]
        scales: list[Tensor | None] = [None, None]
        if self.per_token:
            each = num_pages, self.num_kv_heads, self.page_size
            scales = [(normal(*each).abs() + 0.1) / steps for _ in range(2)]
        elif self.cache_dtype in (*FP8_DTYPES, torch.int8):
            scales = [torch.full((1,), x / steps, device=device) for x in (0.5, 0.25)]
        args = (
            normal(self.num_seqs, self.num_heads, self.head_dim).to(self.dtype),
            *(x.to(self.cache_dtype) for x in caches),
            tables.masked_fill(~used, -1),
            lengths,
            *scales,
            normal(self.num_heads).to(self.dtype) if self.sinks else None,
        )
        return args, {
            "scale": self.head_dim**-0.5,
            "layout": self.layout,
            "window": self.window,
            "softcap": self.softcap,
        }


def paged_attention_unsupported(problem: PagedAttentionProblem, use: Use) -> str | None:
    """What no kernel over pages takes."""
    if problem.mismatch:
        return problem.mismatch
    if problem.dtype not in ROW_DTYPES:
        return f"queries are {short_name(problem.dtype)}; kernels take bfloat16, float16, float32"
    if problem.cache_dtype not in (problem.dtype, torch.int8, *FP8_DTYPES):
        names = short_name(problem.dtype), short_name(problem.cache_dtype)
        return f"queries are {names[0]} and the cache {names[1]}, neither the same, fp8 nor int8"
    if problem.cache_dtype in FP8_DTYPES and problem.cache_dtype not in use.arch.fp8_dtypes:
        return f"{use.arch} has no instructions for {short_name(problem.cache_dtype)}"
    for name in ("head_dim", "v_head_dim"):
        width = fixed(getattr(problem, name))
        if width is None or not 1 <= width <= MAX_HEAD_DIM:
            return f"{name}={getattr(problem, name)} is not a number up to {MAX_HEAD_DIM}"
    size = fixed(problem.page_size)
    if size is None or not 1 <= size <= MAX_PAGE_SIZE:
        return f"page_size={problem.page_size} is not a number up to {MAX_PAGE_SIZE}"
    pack = PACK_BYTES // problem.cache_dtype.itemsize
    if problem.layout != "paged" and size % pack:
        return f"page_size={size} is no multiple of the {pack} in 16 bytes"
    if problem.layout != "paged" and not problem.aligned:
        return "packs of the cache do not begin at multiples of 16 bytes"
    heads, kv_heads = fixed(problem.num_heads), fixed(problem.num_kv_heads)
    if not heads or not kv_heads or heads % kv_heads:
        return f"{problem.num_heads} query heads are no multiple of {problem.num_kv_heads} kv heads"
    return None


def paged_tiles_unsupported(problem: PagedAttentionProblem, use: Use) -> str | None:
    """What the kernel whose third grid dimension is the sequences does not take."""
    if (fixed(problem.num_seqs) or 0) > MAX_GRID_Z:
        return f"{problem.num_seqs} sequences exceed {MAX_GRID_Z}, the grid's third dimension"
    return paged_attention_unsupported(problem, use)


def paged_vectors_unsupported(problem: PagedAttentionProblem, use: Use) -> str | None:
    """What the kernel that reads caches in vectors of 16 bytes does not take."""
    reason = paged_attention_unsupported(problem, use)
    if reason is not None:
        return reason
    if problem.dtype == torch.float32:
        return "queries are float32; the kernel multiplies bfloat16 and float16"
    if problem.cache_dtype == torch.int8:
        return "the cache is int8; the kernel converts fp8"
    if problem.per_token:
        return "tokens have scales of their own; the kernel takes one of all keys and of all values"
    pack = PACK_BYTES // problem.cache_dtype.itemsize
    for name in ("head_dim", "v_head_dim"):
        if getattr(problem, name) % pack:
            return f"{name}={getattr(problem, name)} is no multiple of the {pack} in 16 bytes"
    if not problem.aligned:
        return "rows of the cache do not begin at multiples of 16 bytes"
    return _no_packs(problem) if use.arch.wave_size == 32 else None


def _no_packs(problem: PagedAttentionProblem) -> str | None:
    """Why TMA cannot copy packs of values as they are needed."""
    if not problem.whole:
        return "heads of packed pages are not each one piece of memory, as TMA copies them"
    pack = PACK_BYTES // problem.cache_dtype.itemsize
    if problem.layout == "transposed" and problem.page_size != pack:
        return f"values of {problem.page_size} tokens side by side are no packs of {pack}"
    return None


def _is_aligned(cache: Tensor) -> bool:
    """Whether all strides but the last, which is 1, and the offset are whole vectors."""
    *outer, last = (fixed(dim(stride)) for stride in cache.stride())
    pack = PACK_BYTES // cache.element_size()
    starts = (*outer, fixed(dim(cache.storage_offset())))
    return last == 1 and all(start is not None and start % pack == 0 for start in starts)


def _is_whole(cache: Tensor) -> bool:
    """Whether all dimensions but pages and heads lie as if they were alone."""
    dense = 1
    for size, stride in zip(reversed(cache.shape[2:]), reversed(cache.stride()[2:]), strict=True):
        width = fixed(dim(size))
        if width is None or (width != 1 and fixed(dim(stride)) != dense):
            return False
        dense *= width
    return True


def _mismatch(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    layout: str,
) -> str:
    if layout not in LAYOUTS:
        return f"layout is {layout!r}; it may be 'paged', 'packed' or 'transposed'"
    for name, cache, rank in zip(
        ("key", "value"), (key_cache, value_cache), CACHE_RANKS[layout], strict=True
    ):
        if cache.dim() != rank:
            return f"{name}_cache has {cache.dim()} dimensions; {layout!r} has {rank}"
    if key_cache.dtype != value_cache.dtype:
        names = short_name(key_cache.dtype), short_name(value_cache.dtype)
        return f"keys are {names[0]} and values {names[1]}"
    if block_tables.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        names = short_name(block_tables.dtype), short_name(seq_lens.dtype)
        return f"block_tables are {names[0]} and seq_lens {names[1]}, not int32"
    return _unfit_heads(q, key_cache, value_cache, layout)


def _unfit_heads(q: Tensor, key_cache: Tensor, value_cache: Tensor, layout: str) -> str:
    keys, values = ([dim(size) for size in x.shape] for x in (key_cache, value_cache))
    if layout == "paged":
        head_dim, page_size, of_values = keys[3], keys[1], (values[2], values[1])
        of_keys = keys[2], page_size
    else:
        pack = PACK_BYTES // key_cache.element_size()
        for name, packed in (("keys", keys), ("values", values)):
            if len(packed) == 5 and packed[4] != pack:
                return f"{name} are packs of {packed[4]}; 16 bytes hold {pack}"
        head_dim, of_keys = keys[2] * keys[4], (keys[1], keys[3])
        tokens = values[3] if layout == "transposed" else values[2] * values[4]
        of_values = values[1], tokens
    if head_dim != dim(q.shape[-1]):
        return f"queries have {dim(q.shape[-1])} elements a head and keys {head_dim}"
    if of_keys != of_values:
        return f"keys have (heads, page_size) {of_keys} and values {of_values}"
    return _unfit_pages("keys", key_cache, layout) or _unfit_pages("values", value_cache, layout)


def _unfit_pages(name: str, cache: Tensor, layout: str) -> str:
    if layout == "paged" and fixed(dim(cache.stride(-1))) not in (1, None):
        return f"{name} have last stride {cache.stride(-1)}; kernels read heads with stride 1"
    inner = zip(cache.shape[1:], cache.stride()[1:], strict=True)
    span = sum((dim(size) - 1) * dim(stride) for size, stride in inner)
    if (fixed(span) or 0) > MAX_SPAN:
        return f"a page's {name} lie {span} elements apart; kernels count up to {MAX_SPAN}"
    return ""


def unfit_tables(q: Tensor, block_tables: Tensor, seq_lens: Tensor) -> str:
    """Why tables and lengths are not those of the queries' sequences, or nothing."""
    num_seqs = dim(q.shape[0])
    wanted = num_seqs, dim(block_tables.shape[-1])
    return misshapen("block_tables", block_tables, wanted) or misshapen(
        "seq_lens", seq_lens, (num_seqs,)
    )


def _unfit_scales(
    key_cache: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, layout: str
) -> str:
    """Both are one number, or one of each token and head."""
    page_size, kv_heads = (1, 2) if layout == "paged" else (3, 1)
    each = tuple(dim(key_cache.shape[i]) for i in (0, kv_heads, page_size))
    kinds = []
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale is None:
            continue
        if scale.dtype != torch.float32:
            return f"{name} is {short_name(scale.dtype)}, not float32"
        found = tuple(map(dim, scale.shape))
        if dim(scale.numel()) != 1 and found != each:
            return f"{name} has shape {found}, neither one number nor {each}"
        kinds.append(dim(scale.numel()) != 1)
    if len(set(kinds)) > 1 or (any(kinds) and len(kinds) == 1):
        return "one of keys and values has a scale for each token and head, and the other has not"
    return ""
