"""Flash attention, backward: the gradients of keys and values, and that of queries.

Probabilities are computed anew from the log-sum-exp of the forward pass. Two kernels, each of which
owns what it writes: nothing is added atomically, so that results repeat to the last bit.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from aiter_inductor.kernels.triton.attention_tiles import (
    LOG2E,
    blocks_of,
    capped,
    in_sequence,
    keys_of,
    load_head,
    masked,
    queries_of,
    store_head,
    visible,
)
from aiter_inductor.kernels.triton.launch import single


@triton.jit
def product(a, a_rest, b, b_rest, REST: tl.constexpr):
    """`a b^T` over the columns of both tiles."""
    found = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST > 0:
        found = tl.dot(a_rest, tl.trans(b_rest), found, input_precision="ieee")
    return found


@triton.jit
def exponent(lse):
    """A row's log-sum-exp in units of log2(e); infinite, for no probability, where no key is."""
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def probabilities(scores, scale, softcap, pairs, exists, peak, seen, HIDES: tl.constexpr):
    """Probabilities of a tile of raw scores, and what a softcap leaves of a score's gradient.

    Args:
        pairs: pointers to the mask's tile, or None.
        exists: which pairs of the tile there are.
        peak: `exponent` of each query, broadcast over the tile.
        seen: read where `HIDES`: some pair of the tile may be hidden.
    """
    scores = capped(scores, scale, softcap, True)
    slope = scale
    if softcap is not None:
        share = scores / (single(softcap) * LOG2E)
        slope = scale * (1.0 - share * share)
    if pairs is not None:
        scores = masked(scores, pairs, exists)
    p = tl.exp2(scores - peak)
    if HIDES:
        p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def gather_from_queries(
    dk,  # [N, BLOCK_D], and its other columns
    dk_rest,
    dv,  # [N, BLOCK_DV], and its other columns
    dv_rest,
    keys,
    keys_rest,
    values,
    values_rest,
    q,
    grad,
    lse,
    delta,
    mask,  # pointer to the pair of row 0 and the first key, or None
    first_keys,  # [S], the first key that each row sees, or None
    begin,
    end,
    S,
    shift,
    first_key,
    T,
    window,
    scale,
    softcap,
    q_row,
    grad_row,
    mask_query,
    mask_key,
    HIDES: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    REST_D: tl.constexpr,
    REST_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add what the rows `begin` to `end` of one head contribute; tiles are [key, query]."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, keys.shape[0])
    for start in tl.range(begin, end, BLOCK_M):
        row = start + m
        live, offset = row < S, tl.cast(start, tl.int64)
        queries, queries_rest = load_head(
            q + offset * q_row, m, q_row, live, D, keys.shape[1], REST_D
        )
        peak = exponent(tl.load(lse + row, mask=live, other=-float("inf")))[None, :]
        scores = product(keys, keys_rest, queries, queries_rest, REST_D)
        pairs, exists = mask, live[None, :] & (first_key + n < T)[:, None]
        if mask is not None:
            pairs = mask + offset * mask_query + m[None, :] * mask_query + n[:, None] * mask_key
        seen = visible((row + shift)[None, :], (first_key + n)[:, None], T, window, CAUSAL)
        if HIDES and first_keys is not None:
            oldest = tl.load(first_keys + row, mask=live, other=0)
            seen = seen & ((first_key + n)[:, None] >= oldest[None, :])
        p, slope = probabilities(scores, scale, softcap, pairs, exists, peak, seen, HIDES)
        grads, grads_rest = load_head(
            grad + offset * grad_row, m, grad_row, live, DV, values.shape[1], REST_DV
        )
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision="ieee")
        if REST_DV > 0:
            dv_rest = tl.dot(p.to(grads.dtype), grads_rest, dv_rest, input_precision="ieee")
        dp = product(values, values_rest, grads, grads_rest, REST_DV)
        shared = tl.load(delta + row, mask=live, other=0.0)[None, :]
        ds = (p * (dp - shared) * slope).to(queries.dtype)
        dk = tl.dot(ds, queries, dk, input_precision="ieee")
        if REST_D > 0:
            dk_rest = tl.dot(ds, queries_rest, dk_rest, input_precision="ieee")
    return dk, dk_rest, dv, dv_rest


@triton.jit
def attention_backward_keys_kernel(
    grad,  # [batch, num_heads, S, DV]
    q,  # [batch, num_heads, S, D]
    k,  # [batch, num_kv_heads, T, D]
    v,  # [batch, num_kv_heads, T, DV]
    mask,  # [batch, num_heads, S, T]: uint8, float or None
    lse,  # [batch, num_heads, S], contiguous, fp32
    delta,  # the same: the sum of each row of out * grad
    first_keys,  # [batch, S], int32, contiguous, or None
    cu_seqlens_q,  # [num_sequences + 1], where sequences are packed in one batch, or None
    cu_seqlens_k,
    num_sequences,
    dk,  # [batch, num_kv_heads, T, D]
    dv,  # [batch, num_kv_heads, T, DV]
    scale,
    softcap,
    window,
    num_heads,
    groups,
    S,
    T,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
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
):
    """A block of keys of one head, over all queries of the heads that share it.

    All rows of the middle part see all keys; the last one is for windows and first keys.
    """
    num_kv_heads, all_rows = num_heads // groups, S
    num_blocks = blocks_of(T, cu_seqlens_k, num_sequences, BLOCK_N)
    block, at = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    batch, kv_head = (at // num_kv_heads).to(tl.int64), (at % num_kv_heads).to(tl.int64)
    first_key, q_first, S, k_first, T = in_sequence(
        block, S, T, cu_seqlens_q, cu_seqlens_k, num_sequences, True, BLOCK_N
    )
    if first_key >= T:
        return
    q, grad = q + q_first * q_row, grad + q_first * grad_row
    n, offset = tl.arange(0, BLOCK_N), tl.cast(first_key, tl.int64) + k_first
    inside, scale = n < T - first_key, single(scale)
    shift, last_key = T - S if FROM_END else 0, tl.minimum(first_key + BLOCK_N, T) - 1
    first_keys = first_keys if first_keys is None else first_keys + batch * S
    ranges = queries_of(first_key, last_key, S, shift, window, first_keys, CAUSAL, BLOCK_M)
    k += batch * k_batch + kv_head * k_head + offset * k_row
    v += batch * v_batch + kv_head * v_head + offset * v_row
    keys, keys_rest = load_head(k, n, k_row, inside, D, BLOCK_D, REST_D)
    values, values_rest = load_head(v, n, v_row, inside, DV, BLOCK_DV, REST_DV)
    dks, dvs = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    dks_rest = tl.zeros((BLOCK_N, REST_D if REST_D > 0 else 1), tl.float32)
    dvs_rest = tl.zeros((BLOCK_N, REST_DV if REST_DV > 0 else 1), tl.float32)
    for member in range(groups):
        head = kv_head * groups + member
        of_head = (batch * num_heads + head) * all_rows + q_first
        of_mask = batch * mask_batch + head * mask_head + offset * mask_key
        mask_at = mask if mask is None else mask + of_mask
        for part in tl.static_range(3):
            behind = part == 2 and (window is not None or first_keys is not None)
            if part == 1 or (part == 0 and CAUSAL) or behind:
                dks, dks_rest, dvs, dvs_rest = gather_from_queries(
                    dks,
                    dks_rest,
                    dvs,
                    dvs_rest,
                    keys,
                    keys_rest,
                    values,
                    values_rest,
                    q + batch * q_batch + head * q_head,
                    grad + batch * grad_batch + head * grad_head,
                    lse + of_head,
                    delta + of_head,
                    mask_at,
                    first_keys,
                    (ranges[0], ranges[2], ranges[3])[part],
                    (ranges[2], ranges[3], ranges[1])[part],
                    S,
                    shift,
                    first_key,
                    T,
                    window,
                    scale,
                    softcap,
                    q_row,
                    grad_row,
                    mask_query,
                    mask_key,
                    HIDES=part != 1,
                    CAUSAL=CAUSAL,
                    D=D,
                    DV=DV,
                    REST_D=REST_D,
                    REST_DV=REST_DV,
                    BLOCK_M=BLOCK_M,
                )
    dk += batch * dk_batch + kv_head * dk_head + offset * dk_row
    dv += batch * dv_batch + kv_head * dv_head + offset * dv_row
    store_head(dk, n, dk_row, inside, dks, dks_rest, D, BLOCK_D, REST_D)
    store_head(dv, n, dv_row, inside, dvs, dvs_rest, DV, BLOCK_DV, REST_DV)


@triton.jit
def gather_from_keys(
    dq,  # [M, BLOCK_D], and its other columns
    dq_rest,
    queries,
    queries_rest,
    grads,
    grads_rest,
    peak,  # [M], `exponent` of the rows
    delta,  # [M]
    k,
    v,
    mask,  # pointer to the pair of the first row and key 0, or None
    begin,
    end,
    T,
    first,  # the position of the first row
    first_keys,  # pointer to the first key that the first row sees, or None
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
    """Add what the keys `begin` to `end` contribute; tiles are [query, key]."""
    m, n = tl.arange(0, queries.shape[0]), tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        offset, inside = tl.cast(start, tl.int64), n < T - start
        keys, keys_rest = load_head(
            k + offset * k_row, n, k_row, inside, D, queries.shape[1], REST_D
        )
        scores = product(queries, queries_rest, keys, keys_rest, REST_D)
        pairs, exists = mask, live[:, None] & inside[None, :]
        if mask is not None:
            pairs = mask + offset * mask_key + m[:, None] * mask_query + n[None, :] * mask_key
        seen = visible((first + m)[:, None], (start + n)[None, :], T, window, CAUSAL)
        if HIDES and first_keys is not None:
            oldest = tl.load(first_keys + m, mask=live, other=0)
            seen = seen & ((start + n)[None, :] >= oldest[:, None])
        p, slope = probabilities(scores, scale, softcap, pairs, exists, peak[:, None], seen, HIDES)
        values, values_rest = load_head(
            v + offset * v_row, n, v_row, inside, DV, grads.shape[1], REST_DV
        )
        dp = product(grads, grads_rest, values, values_rest, REST_DV)
        ds = (p * (dp - delta[:, None]) * slope).to(keys.dtype)
        dq = tl.dot(ds, keys, dq, input_precision="ieee")
        if REST_D > 0:
            dq_rest = tl.dot(ds, keys_rest, dq_rest, input_precision="ieee")
    return dq, dq_rest


@triton.jit
def attention_backward_queries_kernel(
    grad,  # [batch, num_heads, S, DV]
    q,  # [batch, num_heads, S, D]
    k,  # [batch, num_kv_heads, T, D]
    v,  # [batch, num_kv_heads, T, DV]
    mask,  # [batch, num_heads, S, T]: uint8, float or None
    lse,  # [batch, num_heads, S], contiguous, fp32
    delta,  # the same: the sum of each row of out * grad
    first_keys,  # [batch, S], int32, contiguous, or None
    cu_seqlens_q,  # [num_sequences + 1], where sequences are packed in one batch, or None
    cu_seqlens_k,
    num_sequences,
    dq,  # [batch, num_heads, S, D]
    scale,
    softcap,
    window,
    num_heads,
    groups,
    S,
    T,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    dq_batch,
    dq_head,
    dq_row,
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
):
    """A block of queries of one head."""
    num_blocks, all_rows = blocks_of(S, cu_seqlens_q, num_sequences, BLOCK_M), S
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    at = tl.program_id(0) // num_blocks
    batch, head = (at // num_heads).to(tl.int64), (at % num_heads).to(tl.int64)
    first_row, q_first, S, k_first, T = in_sequence(
        block, S, T, cu_seqlens_q, cu_seqlens_k, num_sequences, False, BLOCK_M
    )
    if first_row >= S:
        return
    k, v = k + k_first * k_row, v + k_first * v_row
    lse, delta = lse + q_first, delta + q_first
    m, offset = tl.arange(0, BLOCK_M), tl.cast(first_row, tl.int64) + q_first
    live, scale = m < S - first_row, single(scale)
    q += batch * q_batch + head * q_head + offset * q_row
    grad += batch * grad_batch + head * grad_head + offset * grad_row
    queries, queries_rest = load_head(q, m, q_row, live, D, BLOCK_D, REST_D)
    grads, grads_rest = load_head(grad, m, grad_row, live, DV, BLOCK_DV, REST_DV)
    of_rows = (batch * num_heads + head) * all_rows + first_row
    peak = exponent(tl.load(lse + of_rows + m, mask=live, other=-float("inf")))
    shared = tl.load(delta + of_rows + m, mask=live, other=0.0)
    k += batch * k_batch + head // groups * k_head
    v += batch * v_batch + head // groups * v_head
    if mask is not None:
        mask += batch * mask_batch + head * mask_head + offset * mask_query
    first = first_row + (T - S if FROM_END else 0)
    last = first + tl.minimum(BLOCK_M, S - first_row) - 1
    first_keys = first_keys if first_keys is None else first_keys + batch * S + first_row
    ranges = keys_of(first, last, T, window, first_keys, CAUSAL, BLOCK_N)
    dqs = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dqs_rest = tl.zeros((BLOCK_M, REST_D if REST_D > 0 else 1), tl.float32)
    for part in tl.static_range(3):
        # All rows see all keys of the middle part; the first is for windows and first keys only.
        if part > 0 or window is not None or first_keys is not None:
            dqs, dqs_rest = gather_from_keys(
                dqs,
                dqs_rest,
                queries,
                queries_rest,
                grads,
                grads_rest,
                peak,
                shared,
                k,
                v,
                mask,
                (ranges[0], ranges[2], ranges[3])[part],
                (ranges[2], ranges[3], ranges[1])[part],
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
    dq += batch * dq_batch + head * dq_head + offset * dq_row
    store_head(dq, m, dq_row, live, dqs, dqs_rest, D, BLOCK_D, REST_D)
