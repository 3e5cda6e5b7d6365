"""Flash attention, forward: one program walks over the keys that its block of queries sees."""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from aiter_inductor.kernels.triton.attention_tiles import (
    LN2,
    LOG2E,
    capped,
    keys_of,
    load_columns,
    load_head,
    masked,
    sequence,
    store_head,
    visible,
)
from aiter_inductor.kernels.triton.launch import single


@triton.jit
def place(num_blocks, num_heads, HEADS_TOGETHER: tl.constexpr):
    """The block of queries and the head, batches counted on, of this program.

    `HEADS_TOGETHER` heads advance side by side, their last and under a causal mask longest blocks
    first, so that the short ones fill the end of the launch.
    """
    program, together = tl.program_id(0), HEADS_TOGETHER * num_blocks
    first = program // together * HEADS_TOGETHER
    heads = tl.minimum(num_heads - first, HEADS_TOGETHER)
    within = program % together
    return num_blocks - 1 - within // heads, first + within % heads


@triton.jit
def attend(
    peak,  # [M], the largest logit so far, in units of log2(e)
    total,  # [M], the sum of exponentials
    acc,  # [M, BLOCK_DV], the sum of values, and its other columns
    acc_rest,
    queries,  # [M, BLOCK_D], and its other columns
    queries_rest,
    k,
    v,
    mask,  # pointer to the pair of row 0 and key 0, or None
    begin,
    end,
    T,
    first,  # the position of row 0
    first_keys,  # pointer to the first key that row 0 sees, or None
    window,
    scale,
    softcap,
    live,
    k_row,
    v_row,
    mask_query,
    mask_key,
    HIDES: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    REST_D: tl.constexpr,
    REST_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take in the keys `begin` to `end`; without `HIDES`, all rows see all of them."""
    m, n = tl.arange(0, queries.shape[0]), tl.arange(0, BLOCK_N)
    # Logits that are raw scores are scaled in the subtraction of the peak.
    factor = scale * LOG2E if softcap is None and mask is None else 1.0
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        offset = tl.cast(start, tl.int64)
        k_at, v_at, inside = k + offset * k_row, v + offset * v_row, n < T - start
        keys = load_columns(k_at, n, k_row, inside, D, 0, queries.shape[1], not HIDES)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if REST_D > 0:
            keys = load_columns(k_at, n, k_row, inside, D, queries.shape[1], REST_D, not HIDES)
            scores = tl.dot(queries_rest, tl.trans(keys), scores, input_precision="ieee")
        scores = capped(scores, scale, softcap, mask is not None)
        if mask is not None:
            pairs = mask + offset * mask_key + m[:, None] * mask_query + n[None, :] * mask_key
            scores = masked(scores, pairs, live[:, None] & inside[None, :])
        if HIDES:
            seen = visible((first + m)[:, None], (start + n)[None, :], T, window, CAUSAL)
            if first_keys is not None:
                oldest = tl.load(first_keys + m, mask=live, other=0)
                seen = seen & ((start + n)[None, :] >= oldest[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * factor)
        base = higher
        if HIDES or mask is not None:
            base = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(scores * factor - base[:, None])
        decay = tl.exp2(peak - base)
        total, peak = total * decay + tl.sum(p, 1), higher
        values = load_columns(v_at, n, v_row, inside, DV, 0, acc.shape[1], not HIDES)
        weights = p.to(values.dtype)
        acc = tl.dot(weights, values, acc * decay[:, None], input_precision="ieee")
        if REST_DV > 0:
            values = load_columns(v_at, n, v_row, inside, DV, acc.shape[1], REST_DV, not HIDES)
            acc_rest = acc_rest * decay[:, None]
            acc_rest = tl.dot(weights, values, acc_rest, input_precision="ieee")
    return peak, total, acc, acc_rest


@triton.jit
def attention_kernel(
    q,  # [batch, num_heads, S, D]
    k,  # [batch, num_kv_heads, T, D]
    v,  # [batch, num_kv_heads, T, DV]
    mask,  # [batch, num_heads, S, T]: uint8, float or None
    sinks,  # [num_heads] or None
    first_keys,  # [batch, S], int32, contiguous, or None
    cu_seqlens_q,  # [batch + 1], first row of each sequence, where sequences are packed, or None
    cu_seqlens_k,
    out,  # [batch, num_heads, S, DV]
    lse,  # [batch, num_heads, S], fp32, natural logarithm, or None
    scale,
    softcap,
    window,
    num_heads,
    groups,
    S,
    T,
    num_blocks,
    all_heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    CAUSAL: tl.constexpr,
    FROM_END: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REST_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS_TOGETHER: tl.constexpr,
):
    """A block of queries of one head; the strides of the last dimensions are 1."""
    block, at = place(num_blocks, all_heads, HEADS_TOGETHER)
    batch, head = (at // num_heads).to(tl.int64), (at % num_heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // groups * k_head
    v += batch * v_batch + head // groups * v_head
    out += batch * out_batch + head * out_head
    first_row = block * BLOCK_M
    if cu_seqlens_q is not None:
        q_first, S = sequence(cu_seqlens_q, batch)
        k_first, T = sequence(cu_seqlens_k, batch)
        if first_row >= S:
            return
        q, out = q + q_first * q_row, out + q_first * out_row
        k, v = k + k_first * k_row, v + k_first * v_row
        lse = lse + q_first if lse is not None else lse
    m, shift = tl.arange(0, BLOCK_M), T - S if FROM_END else 0
    live, scale = m < S - first_row, single(scale)
    first, last = first_row + shift, tl.minimum(first_row + BLOCK_M, S) - 1 + shift
    first_keys = first_keys if first_keys is None else first_keys + batch * S + first_row
    begin, end, all_begin, all_end = keys_of(first, last, T, window, first_keys, CAUSAL, BLOCK_N)
    offset = tl.cast(first_row, tl.int64)
    q, out = q + offset * q_row, out + offset * out_row
    queries, queries_rest = load_head(q, m, q_row, live, D, BLOCK_D, REST_D)
    of_mask = batch * mask_batch + head * mask_head + offset * mask_query
    mask = mask if mask is None else mask + of_mask
    peak, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        peak = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.where(peak == -float("inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    acc_rest = tl.zeros((BLOCK_M, REST_DV if REST_DV > 0 else 1), tl.float32)
    for part in tl.static_range(3):
        # All rows see all keys of the middle part; the first is for windows and first keys only.
        if part > 0 or window is not None or first_keys is not None:
            peak, total, acc, acc_rest = attend(
                peak,
                total,
                acc,
                acc_rest,
                queries,
                queries_rest,
                k,
                v,
                mask,
                (begin, all_begin, all_end)[part],
                (all_begin, all_end, end)[part],
                T,
                first,
                first_keys,
                window,
                scale,
                softcap,
                live,
                k_row,
                v_row,
                mask_query,
                mask_key,
                HIDES=part != 1,
                CAUSAL=CAUSAL,
                D=D,
                DV=DV,
                REST_D=REST_D,
                REST_DV=REST_DV,
                BLOCK_N=BLOCK_N,
            )
    if lse is not None:
        at_lse = lse + batch * lse_batch + head * lse_head + first_row + m
        tl.store(at_lse, tl.where(total == 0.0, peak, (peak + tl.log2(total)) * LN2), mask=live)
    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    store_head(out, m, out_row, live, acc / divisor, acc_rest / divisor, DV, BLOCK_DV, REST_DV)
