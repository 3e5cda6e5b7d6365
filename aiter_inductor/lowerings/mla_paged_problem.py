"""What latent attention over pages is asked to compute, and what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, ROW_DTYPES, short_name
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import Dim, dim, fixed
from aiter_inductor.lowerings.arguments import apart, no_scale
from aiter_inductor.lowerings.mla_problem import HOPPER_RANK, HOPPER_ROPE, MAX_RANK, MAX_ROPE
from aiter_inductor.lowerings.paged_attention_problem import MAX_PAGE_SIZE, unfit_tables

HOPPER_PART_PAGES = (8, 16, 32)  # smaller pages would be copied by too many instructions


@dataclass(frozen=True)
class MlaPagedProblem:
    """One absorbed query a sequence over latent rows in pages.

    Attributes:
        num_seqs: sequences.
        num_heads: query heads.
        rank: latent numbers of a row.
        rope: rotated numbers of a row.
        page_size: tokens a page holds.
        max_pages: pages a sequence may have.
        dtype: of the queries.
        cache_dtype: of the rows.
        scaled: whether rows have a scale.
        mismatch: why the arguments do not fit together; empty if they do.
    """

    num_seqs: Dim
    num_heads: Dim
    rank: int
    rope: Dim
    page_size: Dim
    max_pages: Dim
    dtype: torch.dtype
    cache_dtype: torch.dtype
    scaled: bool = False
    mismatch: str = ""

    @classmethod
    def of(
        cls,
        q: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        kv_scale: Tensor | None = None,
        *,
        scale: float,
        rank: int = 512,
    ) -> MlaPagedProblem:
        """From the arguments of `mla_paged_decode`."""
        num_seqs, num_heads, width = map(dim, q.shape)
        return cls(
            num_seqs=num_seqs,
            num_heads=num_heads,
            rank=rank,
            rope=width - rank,
            page_size=dim(cache.shape[1]),
            max_pages=dim(block_tables.shape[-1]),
            dtype=q.dtype,
            cache_dtype=cache.dtype,
            scaled=kv_scale is not None,
            mismatch=_mismatch(q, cache, block_tables, seq_lens, kv_scale),
        )

    def bytes_moved(self) -> Dim:
        """Queries, results and tables once, and the rows of full tables once."""
        tables = self.num_seqs * (self.max_pages + 1) * 4
        cached = self.num_seqs * self.max_pages * self.page_size * (self.rank + self.rope)
        rows = self.num_seqs * self.num_heads * (2 * self.rank + self.rope)
        return cached * self.cache_dtype.itemsize + rows * self.dtype.itemsize + tables

    def flops(self) -> Dim:
        """Two a multiply-add, of full tables."""
        tokens = self.num_seqs * self.max_pages * self.page_size
        return 2 * tokens * self.num_heads * (2 * self.rank + self.rope)

    def sample(self, *, seed: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random queries and rows; lengths from none to full, pages in random order.

        Table entries beyond a length are -1, which must not be read.
        """
        generator = torch.Generator(device).manual_seed(seed)
        width = self.rank + self.rope

        def normal(*shape: Dim) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        num_pages = self.num_seqs * self.max_pages
        order = torch.randperm(num_pages, generator=generator, device=device)
        tables = order.view(self.num_seqs, self.max_pages).to(torch.int32)
        lengths = torch.linspace(self.max_pages * self.page_size, 0, max(self.num_seqs, 1))
        lengths = lengths[: self.num_seqs].to(device, torch.int32)
        used = torch.arange(self.max_pages, device=device) * self.page_size < lengths[:, None]
        args = (
            normal(self.num_seqs, self.num_heads, width).to(self.dtype),
            normal(num_pages, self.page_size, width).to(self.cache_dtype),
            tables.masked_fill(~used, -1),
            lengths,
            torch.full((1,), 0.5, device=device) if self.scaled else None,
        )
        return args, {"scale": width**-0.5, "rank": self.rank}


def split_mla_paged_unsupported(problem: MlaPagedProblem, use: Use) -> str | None:
    """What the split-KV kernel does not take."""
    if problem.mismatch:
        return problem.mismatch
    if problem.dtype not in ROW_DTYPES:
        return f"queries are {short_name(problem.dtype)}; kernels take bfloat16, float16, float32"
    if problem.cache_dtype not in (problem.dtype, *FP8_DTYPES):
        names = short_name(problem.dtype), short_name(problem.cache_dtype)
        return f"queries are {names[0]} and the cache {names[1]}, neither the same nor fp8"
    if problem.cache_dtype in FP8_DTYPES and problem.cache_dtype not in use.arch.fp8_dtypes:
        return f"{use.arch} has no instructions for {short_name(problem.cache_dtype)}"
    for name, most in (("rank", MAX_RANK), ("rope", MAX_ROPE), ("page_size", MAX_PAGE_SIZE)):
        width = fixed(getattr(problem, name))
        if width is None or not 1 <= width <= most:
            return f"{name}={getattr(problem, name)} is not a number up to {most}"
    if fixed(problem.num_heads) is None:
        return f"num_heads={problem.num_heads} is not known when compiling"
    return None


def hopper_mla_paged_unsupported(problem: MlaPagedProblem, use: Use) -> str | None:
    """What the CUDA kernel does not take: tiles of DeepSeek's latent rows, bf16 or e4m3."""
    if reason := split_mla_paged_unsupported(problem, use):
        return reason
    if problem.dtype != torch.bfloat16:
        return f"queries are {short_name(problem.dtype)}, not bfloat16"
    if problem.scaled and problem.cache_dtype == torch.bfloat16:
        return "it reads no scale of bfloat16 rows"
    for name, width in (("rank", HOPPER_RANK), ("rope", HOPPER_ROPE)):
        if fixed(getattr(problem, name)) != width:
            return f"{name}={getattr(problem, name)} is not {width}"
    size = fixed(problem.page_size)
    if size not in HOPPER_PART_PAGES and (size is None or size % 64):
        return f"page_size={problem.page_size} is not 8, 16, 32 or a multiple of 64"
    return None


def _mismatch(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_scale: Tensor | None,
) -> str:
    if cache.dim() != 3:
        return f"the cache has {cache.dim()} dimensions, not 3"
    if block_tables.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        names = short_name(block_tables.dtype), short_name(seq_lens.dtype)
        return f"block_tables are {names[0]} and seq_lens {names[1]}, not int32"
    if dim(cache.shape[-1]) != dim(q.shape[-1]):
        return f"queries have {dim(q.shape[-1])} numbers and rows {dim(cache.shape[-1])}"
    return (
        unfit_tables(q, block_tables, seq_lens)
        or no_scale("kv_scale", kv_scale)
        or apart(q, cache, block_tables, seq_lens, kv_scale)
    )
