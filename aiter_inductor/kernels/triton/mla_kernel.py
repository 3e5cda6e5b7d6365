"""Split-KV attention over latent rows: one pass over part of the keys, and the reduction of parts.

The rows of a sequence lie one after the other, or in pages that a table lists.

All heads of a token share one latent row, which is both key and value, so a program reads a tile of
rows once for a block of heads.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from aiter_inductor.kernels.triton.launch import single

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mla_split_kernel(
    q_latent,  # [batch, heads, q_len, R], contiguous
    q_rope,  # [batch, heads, q_len, ROPE], contiguous
    latent,  # [batch, kv_len, R], or [num_pages, PAGE, R]
    k_rope,  # [batch, kv_len, ROPE], or [num_pages, PAGE, ROPE]
    tables,  # [batch, max_pages], int32, where the rows lie in pages
    lengths,  # [batch], int32: kv_len of each sequence, the same
    mask,  # [batch, heads, q_len, kv_len]: uint8, float or None
    kv_scale,  # [1], fp32: what a latent number counts; None is 1
    partial,  # [splits, batch * heads * q_len, R], fp32
    lse,  # [splits, batch * heads * q_len], fp32, base 2
    scale,  # of the scores, times log2(e)
    num_heads,
    q_len,
    kv_len,
    num_rows,
    latent_batch,
    latent_row,
    rope_batch,
    rope_row,
    tables_batch,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,  # 0 where the rows of a sequence lie one after the other
    R: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of heads of one token over one split of the keys: sums, and their log-sum-exp."""
    token, split = tl.program_id(0), tl.program_id(2)
    batch, query = (token // q_len).to(tl.int64), token % q_len
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    r, d, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_ROPE), tl.arange(0, BLOCK_N)
    row = (batch * num_heads + head) * q_len + query
    heads = head < num_heads
    of_r, of_d = heads[:, None] & (r < R)[None, :], heads[:, None] & (d < ROPE)[None, :]
    q = tl.load(q_latent + row[:, None] * R + r[None, :], mask=of_r, other=0.0)
    qr = tl.load(q_rope + row[:, None] * ROPE + d[None, :], mask=of_d, other=0.0)
    peak = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    scale = single(scale)
    if kv_scale is not None:
        scale *= tl.load(kv_scale)
    acc = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    if PAGE > 0:
        kv_len = tl.load(lengths + batch)
    length = tl.cdiv(tl.cdiv(kv_len, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    for start in range(split * length, tl.minimum(split * length + length, kv_len), BLOCK_N):
        key = start + n
        inside = key < kv_len
        block, place = batch, key.to(tl.int64)
        if PAGE > 0:
            at = tables + batch * tables_batch + key // PAGE
            block, place = tl.load(at, mask=inside, other=0).to(tl.int64), place % PAGE
        at = latent + (block * latent_batch + place * latent_row)[:, None] + r[None, :]
        k = tl.load(at, mask=inside[:, None] & (r < R)[None, :], other=0.0)
        at = k_rope + (block * rope_batch + place * rope_row)[:, None] + d[None, :]
        kr = tl.load(at, mask=inside[:, None] & (d < ROPE)[None, :], other=0.0)
        k, kr = k.to(q.dtype), kr.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.dot(qr, tl.trans(kr), scores, input_precision="ieee") * scale
        seen = heads[:, None] & inside[None, :]
        if mask is not None:
            # Every product in 64 bits: 128 heads of 4096 x 4096 pairs are 2^31 elements.
            at = mask + batch * mask_batch + query.to(tl.int64) * mask_query
            at += head[:, None].to(tl.int64) * mask_head + key[None, :].to(tl.int64) * mask_key
            if mask.dtype.element_ty == tl.uint8:
                seen = seen & (tl.load(at, mask=seen, other=0) != 0)
            else:
                scores += tl.load(at, mask=seen, other=0.0).to(tl.float32) * LOG2_E
        if CAUSAL:
            seen = seen & (key <= query)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * decay[:, None], input_precision="ieee")
        peak = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    found = tl.where(total == 0.0, -float("inf"), peak + tl.log2(divisor))
    if kv_scale is not None:
        acc *= tl.load(kv_scale)
    at = split * tl.cast(num_rows, tl.int64) + row
    tl.store(partial + at[:, None] * R + r[None, :], acc / divisor[:, None], mask=of_r)
    tl.store(lse + at, found, mask=heads)


@triton.jit
def mla_reduce_kernel(
    partial,  # [splits, num_rows, R], fp32
    lse,  # [splits, num_rows], fp32
    out,  # [num_rows, R]
    num_rows,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One row over all splits; zeros where none saw a key."""
    row = tl.program_id(0).to(tl.int64)
    r, every = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_SPLITS)
    known = tl.load(lse + every * num_rows + row, mask=every < SPLITS, other=-float("inf"))
    peak = tl.max(known)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp2(known - base))
    acc = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(SPLITS):
        at = split * num_rows + row
        weight = tl.exp2(tl.load(lse + at) - base)
        acc += weight * tl.load(partial + at * R + r, mask=r < R, other=0.0)
    value = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * R + r, value.to(out.dtype.element_ty), mask=r < R)
