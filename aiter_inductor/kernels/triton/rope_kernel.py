"""The device code of rotary embeddings.

A tile is SHAPE = (tokens, heads, pairs of a head). Lanes run along the pairs, so every access is of
16 bytes wherever the layout of the pairs and the strides allow it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aiter_inductor.kernels.triton.launch import single


@triton.jit
def load_pairs(
    pointers, live, stride, SHAPE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second elements of the pairs, [SHAPE[0], SHAPE[1], SHAPE[2]] each."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * SHAPE[2])[None, None, :]
        both = tl.load(pointers + d * stride, live & (d < 2 * HALF), 0.0)
        first, second = tl.split(tl.reshape(both, (SHAPE[0], SHAPE[1], SHAPE[2], 2)))
    else:
        d = tl.arange(0, SHAPE[2])[None, None, :]
        first = tl.load(pointers + d * stride, live & (d < HALF), 0.0)
        second = tl.load(pointers + (d + HALF) * stride, live & (d < HALF), 0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_tables(
    table,
    live,
    stride,
    SHAPE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
):
    """What multiplies the first and the second elements of the pairs.

    `table` and `live` have SHAPE's first two sizes: a table loaded once for all heads would reach
    the lanes of the other heads through shared memory, with a barrier.
    """
    if FULL:
        return load_pairs(table, live, stride, SHAPE, HALF, INTERLEAVED)
    d = tl.arange(0, SHAPE[2])[None, None, :]
    angle = tl.load(table + d * stride, live & (d < HALF), 0.0).to(tl.float32)
    return angle, angle


@triton.jit
def store_pairs(
    pointers,
    live,
    first,
    second,
    SHAPE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Round the elements of the pairs to the dtype behind `pointers` and store them."""
    first = first.to(pointers.dtype.element_ty)
    second = second.to(pointers.dtype.element_ty)
    if INTERLEAVED:
        d = tl.arange(0, 2 * SHAPE[2])[None, None, :]
        both = tl.reshape(tl.join(first, second), (SHAPE[0], SHAPE[1], 2 * SHAPE[2]))
        tl.store(pointers + d, both, live & (d < 2 * HALF))
    else:
        d = tl.arange(0, SHAPE[2])[None, None, :]
        tl.store(pointers + d, first, live & (d < HALF))
        tl.store(pointers + d + HALF, second, live & (d < HALF))


@triton.jit
def weighted(y, weight, offset, DTYPE: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """A normalised head times the weight, rounded to DTYPE where the separate norm rounds."""
    if ROUND_FIRST:
        # Eager adds the offset and multiplies in the weight's dtype promoted with DTYPE.
        scale = (weight + single(offset)).to(weight.dtype).to(tl.float32)
        return (y.to(DTYPE).to(tl.float32) * scale).to(DTYPE).to(tl.float32)
    return (y * (weight.to(tl.float32) + single(offset))).to(DTYPE).to(tl.float32)


@triton.jit
def norm(
    a,
    b,
    tail,
    weight,
    eps,
    offset,
    SHAPE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """RMSNorm over a head that was loaded as pairs and tail."""
    squares = tl.sum(a * a + b * b, axis=2, keep_dims=True)
    if BLOCK_TAIL > 0:
        squares += tl.sum(tail * tail, axis=2, keep_dims=True)
    scale = tl.rsqrt(squares / HEAD_DIM + single(eps))
    d = tl.arange(0, SHAPE[2])[None, None, :]
    first = 2 * d if INTERLEAVED else d
    second = 2 * d + 1 if INTERLEAVED else d + HALF
    w1 = tl.load(weight + first, d < HALF, 0.0)
    w2 = tl.load(weight + second, d < HALF, 0.0)
    a = weighted(a * scale, w1, offset, DTYPE, ROUND_FIRST)
    b = weighted(b * scale, w2, offset, DTYPE, ROUND_FIRST)
    if BLOCK_TAIL > 0:
        d = 2 * HALF + tl.arange(0, BLOCK_TAIL)[None, None, :]
        w = tl.load(weight + d, d < HEAD_DIM, 0.0)
        tail = weighted(tail * scale, w, offset, DTYPE, ROUND_FIRST)
    return a, b, tail


@triton.jit
def rotate_heads(
    x,
    out,
    weight,
    cos,
    sin,
    batch,
    position,
    live_token,
    row,  # where the results of `position` lie
    stored,  # whether they do
    head_block,
    num_heads,
    strides,
    out_strides,
    table_strides,
    eps,
    offset,
    SHAPE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    INTERLEAVED_IN: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    FULL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Rotate SHAPE[1] heads of SHAPE[0] tokens of one tensor."""
    head = (head_block * SHAPE[1] + tl.arange(0, SHAPE[1])).to(tl.int64)
    live = live_token & (head < num_heads)[None, :, None]
    head = head[None, :, None]
    cos += head * 0
    sin += head * 0
    x += batch * strides[0] + head * strides[1] + position * strides[2]
    out += batch * out_strides[0] + head * out_strides[1] + row * out_strides[2]
    kept = stored & (head < num_heads)
    a, b = load_pairs(x, live, 1, SHAPE, HALF, INTERLEAVED_IN)
    tail = a
    if BLOCK_TAIL > 0:
        t = 2 * HALF + tl.arange(0, BLOCK_TAIL)[None, None, :]
        tail = tl.load(x + t, live & (t < HEAD_DIM), 0.0).to(tl.float32)
    ORDER: tl.constexpr = INTERLEAVED_IN if TRANSPOSED else INTERLEAVED_OUT
    c1, c2 = load_tables(cos, live, table_strides[0], SHAPE, HALF, ORDER, FULL)
    s1, s2 = load_tables(sin, live, table_strides[1], SHAPE, HALF, ORDER, FULL)
    if NORM:
        a, b, tail = norm(
            a,
            b,
            tail,
            weight,
            eps,
            offset,
            SHAPE,
            HALF,
            HEAD_DIM,
            BLOCK_TAIL,
            INTERLEAVED_IN,
            x.dtype.element_ty,
            ROUND_FIRST,
        )
    if TRANSPOSED:
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    store_pairs(out, kept, first, second, SHAPE, HALF, INTERLEAVED_OUT)
    if BLOCK_TAIL > 0:
        t = 2 * HALF + tl.arange(0, BLOCK_TAIL)[None, None, :]
        tl.store(out + t, tail.to(out.dtype.element_ty), kept & (t < HEAD_DIM))


@triton.jit
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    q_weight,
    k_weight,
    cos,
    sin,
    num_tokens,
    seq_len,
    num_heads,
    num_kv_heads,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    q_out_batch_stride,
    q_out_head_stride,
    q_out_token_stride,
    k_out_batch_stride,
    k_out_head_stride,
    k_out_token_stride,
    cos_batch_stride,
    cos_token_stride,
    cos_dim_stride,
    sin_batch_stride,
    sin_token_stride,
    sin_dim_stride,
    eps,
    offset,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    INTERLEAVED_IN: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    FULL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Rotate BLOCK_H heads of BLOCK_T tokens; the grid is token by head blocks, q's first."""
    SHAPE: tl.constexpr = (BLOCK_T, BLOCK_H, BLOCK_HALF)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_token = (token < num_tokens)[:, None, None]
    batch = (token // seq_len).to(tl.int64)[:, None, None]
    position = (token % seq_len).to(tl.int64)[:, None, None]
    cos += batch * cos_batch_stride + position * cos_token_stride
    sin += batch * sin_batch_stride + position * sin_token_stride
    head_block = tl.program_id(1)
    q_blocks = tl.cdiv(num_heads, BLOCK_H)
    if head_block < q_blocks:
        rotate_heads(
            q,
            q_out,
            q_weight,
            cos,
            sin,
            batch,
            position,
            live_token,
            position,
            live_token,
            head_block,
            num_heads,
            (q_batch_stride, q_head_stride, q_token_stride),
            (q_out_batch_stride, q_out_head_stride, q_out_token_stride),
            (cos_dim_stride, sin_dim_stride),
            eps,
            offset,
            SHAPE,
            HALF,
            HEAD_DIM,
            BLOCK_TAIL,
            INTERLEAVED_IN,
            INTERLEAVED_OUT,
            FULL,
            TRANSPOSED,
            NORM,
            ROUND_FIRST,
        )
    else:
        rotate_heads(
            k,
            k_out,
            k_weight,
            cos,
            sin,
            batch,
            position,
            live_token,
            position,
            live_token,
            head_block - q_blocks,
            num_kv_heads,
            (k_batch_stride, k_head_stride, k_token_stride),
            (k_out_batch_stride, k_out_head_stride, k_out_token_stride),
            (cos_dim_stride, sin_dim_stride),
            eps,
            offset,
            SHAPE,
            HALF,
            HEAD_DIM,
            BLOCK_TAIL,
            INTERLEAVED_IN,
            INTERLEAVED_OUT,
            FULL,
            TRANSPOSED,
            NORM,
            ROUND_FIRST,
        )
