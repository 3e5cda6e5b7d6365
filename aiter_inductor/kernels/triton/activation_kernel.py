"""The device code of gated activations.

A tile is SPANS pieces of rows by SPAN columns. Pieces are counted through all rows; where a group
or a row shares a scale, it is one piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
):
    """QUANT: none; static, by one scale; dynamic, with a scale a piece."""
    piece = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)[:, None]
    row = piece // PIECES
    lane = tl.arange(0, SPAN)[None, :]
    cols = (piece % PIECES).to(tl.int32) * WIDTH + lane
    live = piece < num_pieces
    mask = live
    if N % WIDTH != 0:
        mask = mask & (cols < N)
    if WIDTH != SPAN:
        mask = mask & (lane < WIDTH)
    gate_row = gate_ptr + row_offsets(row, inner, gate_outer, gate_inner, NESTED)
    up_row = up_ptr + row_offsets(row, inner, up_outer, up_inner, NESTED)
    g = tl.load(gate_row + cols * gate_step, mask, 0.0).to(tl.float32)
    u = tl.load(up_row + cols * up_step, mask, 0.0).to(tl.float32)
    y = act_times_up(g, u, gate_ptr.dtype.element_ty, alpha, limit, ACTIVATION)
    if QUANT == "dynamic":
        amax = tl.reduce(tl.abs(y), 1, larger, keep_dims=True)
        scale = scale_of(amax, amax_min, QMAX)
        scale_row = scale_ptr + row_offsets(row, inner, scale_outer, scale_inner, NESTED)
        tl.store(scale_row + piece % PIECES, scale, live)
        y = y * inverse_of(scale)
    elif QUANT == "static":
        y = clamp(y * inverse_of(tl.load(scale_ptr)), QMAX)
    out_row = out_ptr + row_offsets(row, inner, out_outer, out_inner, NESTED)
    tl.store(out_row + cols, cast_to(y, out_ptr.dtype.element_ty), mask)


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
