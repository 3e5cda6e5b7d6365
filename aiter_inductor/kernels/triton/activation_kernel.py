"""The device code of gated activations.

A tile is SPANS pieces of rows by CHUNKS times SPAN columns. Pieces are counted through all rows;
where a group or a row shares a scale, it is one piece. A piece wider than SPAN lies in registers as
chunks, whose number need not be a power of two: 18432 is 9 chunks of 2048, but 32768 lanes at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aiter_inductor.kernels.triton.launch import single
from aiter_inductor.kernels.triton.quantise import (
    cast_to,
    clamp,
    inverse_of,
    larger,
    scale_of,
)
from aiter_inductor.kernels.triton.rows import row_offsets

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
RSQRT_2_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """`y` in float32, after the rounding that storing it as `dtype` brings."""
    return y.to(dtype).to(tl.float32)


@triton.jit
def tanh(y):
    """The hyperbolic tangent, exact to a few float32 ulps of 1; NaN stays NaN."""
    return 2 * tl.sigmoid(2 * y) - 1


@triton.jit
def gelu_tanh_argument(g):
    """What the tanh in the approximated GELU is taken of."""
    return (g + g * g * g * CUBIC) * SQRT_2_OVER_PI


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """The activation of a float32 gate."""
    if ACTIVATION == "silu":
        y = g * tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        y = 0.5 * g * (1 + tl.erf(g * SQRT_HALF))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "an activation that has no formula here")
        y = 0.5 * g * (1 + tanh(gelu_tanh_argument(g)))
    return y


@triton.jit
def activation_slope(g, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        slope = s * (1 + g * (1 - s))
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1 + tl.erf(g * SQRT_HALF)) + g * tl.exp(-0.5 * g * g) * RSQRT_2_PI
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "an activation that has no formula here")
        t = tanh(gelu_tanh_argument(g))
        inner_slope = (1 + g * g * (3 * CUBIC)) * SQRT_2_OVER_PI
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * inner_slope
    return slope


@triton.jit
def at_most(y, limit):
    """The smaller of two, or NaN where `y` is."""
    return tl.minimum(y, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def act_times_up(g, u, dtype: tl.constexpr, alpha, limit, ACTIVATION: tl.constexpr):
    """The product in float32, rounded to `dtype` wherever eager PyTorch stores a step."""
    if ACTIVATION == "swiglu":
        g = at_most(g, limit)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        sigmoid = rounded(tl.sigmoid(rounded(g * alpha, dtype)), dtype)
        y = rounded(u + 1, dtype) * rounded(g * sigmoid, dtype)
    else:
        y = rounded(activate(g, ACTIVATION), dtype) * u
    return rounded(y, dtype)


@triton.jit
def piece_mask(live, start, lane, N: tl.constexpr, WIDTH: tl.constexpr, COVERED: tl.constexpr):
    """Which lanes of a chunk hold elements of their piece, and of the row."""
    mask = live
    if N % WIDTH != 0:
        mask = mask & (start + lane < N)
    if WIDTH != COVERED:
        mask = mask & (lane < WIDTH)
    return mask


@triton.jit
def act_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    scale_ptr,
    num_pieces,
    inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    out_outer,
    out_inner,
    scale_outer,
    scale_inner,
    gate_step,
    up_step,
    amax_min,
    alpha,
    limit,
    N: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANT: tl.constexpr,
    QMAX: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """QUANT: none; static, by one scale; dynamic, with a scale a piece."""
    piece = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)[:, None]
    row = piece // PIECES
    start = (piece % PIECES).to(tl.int32) * WIDTH
    live = piece < num_pieces
    gate_row = gate_ptr + row_offsets(row, inner, gate_outer, gate_inner, NESTED)
    up_row = up_ptr + row_offsets(row, inner, up_outer, up_inner, NESTED)
    out_row = out_ptr + row_offsets(row, inner, out_outer, out_inner, NESTED)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    chunks = ()
    for c in tl.static_range(CHUNKS):
        lane = tl.arange(0, SPAN)[None, :] + c * SPAN
        mask = piece_mask(live, start, lane, N, WIDTH, SPAN * CHUNKS)
        g = tl.load(gate_row + (start + lane) * gate_step, mask, 0.0).to(tl.float32)
        u = tl.load(up_row + (start + lane) * up_step, mask, 0.0).to(tl.float32)
        y = act_times_up(g, u, dtype, single(alpha), single(limit), ACTIVATION)
        chunks = chunks + (y.to(dtype),)  # already rounded to it: half the registers of float32
    if QUANT == "dynamic":
        largest = tl.abs(chunks[0].to(tl.float32))
        for c in tl.static_range(1, CHUNKS):
            largest = larger(largest, tl.abs(chunks[c].to(tl.float32)))
        scale = scale_of(tl.reduce(largest, 1, larger, keep_dims=True), amax_min, QMAX)
        scale_row = scale_ptr + row_offsets(row, inner, scale_outer, scale_inner, NESTED)
        tl.store(scale_row + piece % PIECES, scale, live)
        inverse = inverse_of(scale)
    elif QUANT == "static":
        inverse = inverse_of(tl.load(scale_ptr))
    for c in tl.static_range(CHUNKS):
        lane = tl.arange(0, SPAN)[None, :] + c * SPAN
        mask = piece_mask(live, start, lane, N, WIDTH, SPAN * CHUNKS)
        y = chunks[c].to(tl.float32)
        if QUANT == "dynamic":
            y = y * inverse
        elif QUANT == "static":
            y = clamp(y * inverse, QMAX)
        tl.store(out_row + start + lane, cast_to(y, out_ptr.dtype.element_ty), mask)


@triton.jit
def act_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    num_pieces,
    inner,
    grad_outer,
    grad_inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    dgate_outer,
    dgate_inner,
    dup_outer,
    dup_inner,
    grad_step,
    gate_step,
    up_step,
    alpha,
    limit,
    N: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Gradients by gate and up of one piece each row of the tile."""
    piece = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)[:, None]
    row = piece // PIECES
    cols = (piece % PIECES).to(tl.int32) * WIDTH + tl.arange(0, SPAN)[None, :]
    mask = piece < num_pieces
    if N % WIDTH != 0:
        mask = mask & (cols < N)
    grad_row = grad_ptr + row_offsets(row, inner, grad_outer, grad_inner, NESTED)
    gate_row = gate_ptr + row_offsets(row, inner, gate_outer, gate_inner, NESTED)
    up_row = up_ptr + row_offsets(row, inner, up_outer, up_inner, NESTED)
    d = tl.load(grad_row + cols * grad_step, mask, 0.0).to(tl.float32)
    g = tl.load(gate_row + cols * gate_step, mask, 0.0).to(tl.float32)
    u = tl.load(up_row + cols * up_step, mask, 0.0).to(tl.float32)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    if ACTIVATION == "swiglu":
        alpha, limit = single(alpha), single(limit)
        inside_g, inside_u = g <= limit, tl.abs(u) <= limit
        g = at_most(g, limit)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        s = tl.sigmoid(alpha * g)
        dgate = tl.where(inside_g, d * (u + 1) * (s + alpha * g * s * (1 - s)), 0.0)
        dup = tl.where(inside_u, d * g * s, 0.0)
    else:
        dgate = rounded(d * u, dtype) * activation_slope(g, ACTIVATION)
        dup = d * rounded(activate(g, ACTIVATION), dtype)
    dgate_row = dgate_ptr + row_offsets(row, inner, dgate_outer, dgate_inner, NESTED)
    dup_row = dup_ptr + row_offsets(row, inner, dup_outer, dup_inner, NESTED)
    tl.store(dgate_row + cols, dgate.to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_row + cols, dup.to(dup_ptr.dtype.element_ty), mask)
