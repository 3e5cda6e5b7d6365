"""Attention of one new token a sequence over keys and values that lie in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.paged_attention_problem import (
    PagedAttentionProblem,
    paged_tiles_unsupported,
    paged_vectors_unsupported,
)
from aiter_inductor.lowerings.providers import add_hip, add_triton


@op(problem=PagedAttentionProblem.of)
def paged_attention(
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
) -> Tensor:
    """Attend from one query a sequence to the tokens that its pages hold.

    Args:
        q: [num_seqs, num_heads, head_dim]; the token is the last of its sequence, already stored.
        key_cache: of the layout below; dtype of `q`, or fp8 or int8 where scales are given.
        value_cache: the same for values.
        block_tables: [num_seqs, max_pages], int32: the pages of each sequence in order. Entries
            beyond its length are not read.
        seq_lens: [num_seqs], int32: tokens of each sequence. One of no tokens gives zeros.
        key_scale: fp32, None is 1: keys are `key_cache * key_scale`. One number, [] or [1], or one
            of each token and head, [num_pages, num_kv_heads, page_size], as AITER's `K_QScale`.
        value_scale: the same for values.
        sinks: [num_heads], any float dtype: a further score of each head, of no value.
        scale: factor on the scores.
        layout: `paged` is vLLM's, AITER's NHD, and with heads and places swapped by a view its HND:
            both [num_pages, page_size, num_kv_heads, head_dim]. `packed` is that of AITER's
            `pa_fwd_asm`: keys [num_pages, num_kv_heads, head_dim / x, page_size, x], values
            [num_pages, num_kv_heads, page_size / x, v_head_dim, x] with x elements in 16 bytes.
            `transposed` is that of `paged_attention_rocm`: the same keys, values [num_pages,
            num_kv_heads, v_head_dim, page_size].
        window: the last so many tokens are seen; None sees all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 leaves them.

    Returns:
        [num_seqs, num_heads, v_head_dim], dtype of `q`.
    """
    acc = accumulate_dtype(q.dtype)
    keys = _rows(key_cache, block_tables, layout, is_key=True).to(acc)
    values = _rows(value_cache, block_tables, layout, is_key=False).to(acc)
    num_seqs, num_heads, _ = q.shape
    position = torch.arange(keys.shape[1], device=q.device)
    length = seq_lens.unsqueeze(-1)
    seen = position < length
    if window is not None:
        seen = seen & (position >= length - window)
    # Places that are not seen may hold anything, NaN included.
    values = values.masked_fill(~seen[:, :, None, None], 0.0)
    grouped = q.to(acc).unflatten(1, (keys.shape[2], -1))
    scores = torch.einsum("shgd,sthd->shgt", grouped, keys) * scale
    if key_scale is not None:
        scores = scores * _of_tokens(key_scale.to(acc), block_tables)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(acc).unflatten(0, (keys.shape[2], -1))
        scores = torch.cat((scores, sink[None, :, :, None].expand(num_seqs, -1, -1, 1)), -1)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    p = scores.softmax(-1).masked_fill(unseen, 0.0)[..., : keys.shape[1]]
    if value_scale is not None:
        scales = _of_tokens(value_scale.to(acc), block_tables)
        p = (p * scales).masked_fill(~seen[:, None, None], 0.0)
    out = torch.einsum("shgt,sthd->shgd", p, values)
    return out.to(q.dtype).reshape(num_seqs, num_heads, values.shape[-1])


def _rows(cache: Tensor, block_tables: Tensor, layout: str, *, is_key: bool) -> Tensor:
    """[num_seqs, max_pages * page_size, num_kv_heads, head_dim] of the pages of each sequence."""
    pages = block_tables.long().clamp(0, max(cache.shape[0] - 1, 0))
    narrow = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    rows = narrow[pages.flatten()].view(cache.dtype)
    if layout != "paged" and is_key:
        rows = rows.permute(0, 3, 1, 2, 4).flatten(-2)
    elif layout == "packed":
        rows = rows.permute(0, 2, 4, 1, 3).flatten(1, 2)
    elif layout == "transposed":
        rows = rows.permute(0, 3, 1, 2)
    found: Tensor = rows.unflatten(0, pages.shape).flatten(1, 2)
    return found


def _of_tokens(scale: Tensor, block_tables: Tensor) -> Tensor:
    """A number for all, or [num_seqs, num_kv_heads, 1, max_pages * page_size]."""
    if scale.numel() == 1:
        return scale
    pages = block_tables.long().clamp(0, max(scale.shape[0] - 1, 0))
    return scale[pages].transpose(1, 2).flatten(2).unsqueeze(2)


add_hip(paged_attention, "paged_attention", refuse=paged_vectors_unsupported)
add_triton(paged_attention, "paged_attention", refuse=paged_tiles_unsupported)
