"""The device code of rotary embeddings whose keys, and values beside them, go into a cache."""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from aiter_inductor.kernels.triton.rope_kernel import rotate_heads


@triton.jit
def copy_heads(
    x,
    out,
    at,  # batch and position of the tokens, and which of them there are
    to,  # where they are stored, and which of them are
    head_block,
    num_heads,
    strides,
    out_strides,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """BLOCK_H heads of some tokens, as they are."""
    head = (head_block * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
    d = tl.arange(0, BLOCK_WIDTH)[None, None, :]
    exists = (head < num_heads) & (d < WIDTH)
    x += at[0] * strides[0] + head * strides[1] + at[1] * strides[2]
    out += at[0] * out_strides[0] + head * out_strides[1] + to[0] * out_strides[2]
    moved = tl.load(x + d, at[2] & exists, 0.0)
    tl.store(out + d, moved.to(out.dtype.element_ty), to[1] & exists)


@triton.jit
def rotate_rows(
    x,
    out,
    weight,
    tables,  # cos and sin at the tokens, and the strides of their last dimensions
    at,  # batch and position of the tokens, and which of them there are
    to,  # where the results lie, and which of them do
    head_block,
    num_heads,
    strides,
    out_strides,
    norm,  # eps and the offset of its weights
    SHAPE: tl.constexpr,
    STYLE: tl.constexpr,
):
    """`rotate_heads` with its arguments in groups."""
    rotate_heads(
        x,
        out,
        weight,
        tables[0],
        tables[1],
        at[0],
        at[1],
        at[2],
        to[0],
        to[1],
        head_block,
        num_heads,
        strides,
        out_strides,
        (tables[2], tables[3]),
        norm[0],
        norm[1],
        SHAPE,
        STYLE[0],
        STYLE[1],
        STYLE[2],
        STYLE[3][0],
        STYLE[3][1],
        STYLE[3][2],
        STYLE[3][3],
        STYLE[4],
        STYLE[5],
    )


@triton.jit
def rope_cache_kernel(
    q,
    k,
    v,
    q_out,
    key_cache,
    value_cache,
    q_weight,
    k_weight,
    cos,
    sin,
    slots,  # [seq_len], where the tokens of each sequence are stored
    num_tokens,
    seq_len,
    num_slots,
    num_heads,
    num_kv_heads,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    v_batch_stride,
    v_head_stride,
    v_token_stride,
    q_out_batch_stride,
    q_out_head_stride,
    q_out_token_stride,
    key_cache_batch_stride,
    key_cache_head_stride,
    key_cache_token_stride,
    value_cache_batch_stride,
    value_cache_head_stride,
    value_cache_token_stride,
    cos_batch_stride,
    cos_token_stride,
    cos_dim_stride,
    sin_batch_stride,
    sin_token_stride,
    sin_dim_stride,
    slot_stride,
    eps,
    offset,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERLEAVED_IN: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    FULL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """BLOCK_H heads of BLOCK_T tokens; the grid is token by head blocks: q's, k's, then v's."""
    SHAPE: tl.constexpr = (BLOCK_T, BLOCK_H, BLOCK_HALF)
    LAYOUT: tl.constexpr = (INTERLEAVED_IN, INTERLEAVED_OUT, FULL, TRANSPOSED)
    STYLE: tl.constexpr = (HALF, HEAD_DIM, BLOCK_TAIL, LAYOUT, NORM, ROUND_FIRST)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_token = (token < num_tokens)[:, None, None]
    batch = (token // seq_len).to(tl.int64)[:, None, None]
    position = (token % seq_len).to(tl.int64)[:, None, None]
    cos += batch * cos_batch_stride + position * cos_token_stride
    sin += batch * sin_batch_stride + position * sin_token_stride
    slot = tl.load(slots + position * slot_stride, live_token, 0).to(tl.int64)
    stored = live_token & (slot >= 0) & (slot < num_slots)
    block = tl.program_id(1)
    q_blocks, kv_blocks = tl.cdiv(num_heads, BLOCK_H), tl.cdiv(num_kv_heads, BLOCK_H)
    tables, at = (cos, sin, cos_dim_stride, sin_dim_stride), (batch, position, live_token)
    if block < q_blocks:
        rotate_rows(
            q,
            q_out,
            q_weight,
            tables,
            at,
            (position, live_token),
            block,
            num_heads,
            (q_batch_stride, q_head_stride, q_token_stride),
            (q_out_batch_stride, q_out_head_stride, q_out_token_stride),
            (eps, offset),
            SHAPE,
            STYLE,
        )
    elif block < q_blocks + kv_blocks:
        rotate_rows(
            k,
            key_cache,
            k_weight,
            tables,
            at,
            (slot, stored),
            block - q_blocks,
            num_kv_heads,
            (k_batch_stride, k_head_stride, k_token_stride),
            (key_cache_batch_stride, key_cache_head_stride, key_cache_token_stride),
            (eps, offset),
            SHAPE,
            STYLE,
        )
    else:
        copy_heads(
            v,
            value_cache,
            at,
            (slot, stored),
            block - q_blocks - kv_blocks,
            num_kv_heads,
            (v_batch_stride, v_head_stride, v_token_stride),
            (value_cache_batch_stride, value_cache_head_stride, value_cache_token_stride),
            V_DIM,
            BLOCK_H,
            BLOCK_V,
        )
