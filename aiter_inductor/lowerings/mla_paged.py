"""Latent attention of one new token a sequence over rows that lie in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.mla_paged_problem import (
    MlaPagedProblem,
    hopper_mla_paged_unsupported,
    split_mla_paged_unsupported,
)
from aiter_inductor.lowerings.providers import add_cuda, add_triton


@op(problem=MlaPagedProblem.of)
def mla_paged_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_scale: Tensor | None = None,
    *,
    scale: float,
    rank: int = 512,
) -> Tensor:
    """Attend from one absorbed query a sequence to the latent rows that its pages hold.

    Args:
        q: [num_seqs, num_heads, rank + rope]: the query times W_UK, and its rotated part. Its token
            is the last of its sequence, already stored.
        cache: [num_pages, page_size, rank + rope], one row a token for all heads, the latent
            numbers first; dtype of `q`, or fp8 where a scale is given.
        block_tables: [num_seqs, max_pages], int32: the pages of each sequence in order. Entries
            beyond its length are not read.
        seq_lens: [num_seqs], int32: tokens of each sequence. One of no tokens gives zeros.
        kv_scale: [] or [1], fp32: rows are `cache * kv_scale`; None is 1.
        scale: factor on the scores.
        rank: latent numbers of a row, which are the values too.

    Returns:
        [num_seqs, num_heads, rank], dtype of `q`: sums of latent rows, to be multiplied by W_UV.
    """
    acc = accumulate_dtype(q.dtype)
    pages = block_tables.long().clamp(0, max(cache.shape[0] - 1, 0))
    narrow = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    rows = narrow[pages.flatten()].view(cache.dtype).to(acc)
    rows = rows.unflatten(0, pages.shape).flatten(1, 2)
    seen = torch.arange(rows.shape[1], device=q.device) < seq_lens.unsqueeze(-1)
    # Places that are not seen may hold anything, NaN included.
    rows = rows.masked_fill(~seen.unsqueeze(-1), 0.0)
    if kv_scale is not None:
        rows = rows * kv_scale.to(acc)
    scores = torch.einsum("shd,std->sht", q.to(acc), rows) * scale
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    p = scores.softmax(-1).masked_fill((seq_lens < 1)[:, None, None], 0.0)
    return torch.einsum("sht,str->shr", p, rows[..., :rank]).to(q.dtype)


add_cuda(mla_paged_decode, "mla_paged", refuse=hopper_mla_paged_unsupported)
add_triton(mla_paged_decode, "mla_paged", refuse=split_mla_paged_unsupported)
