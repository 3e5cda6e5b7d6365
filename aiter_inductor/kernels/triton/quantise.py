"""The steps of a quantisation, as the row kernels share them."""

from __future__ import annotations

import triton
import triton.language as tl

from aiter_inductor.kernels.triton.launch import single

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 half to even."""


@triton.jit
def larger(a, b):
    """The larger of two, or NaN where either is: an absolute maximum must not lose one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_of(amax, amax_min, QMAX: tl.constexpr):
    """The dequantising factor."""
    return larger(amax, single(amax_min)) / QMAX


@triton.jit
def inverse_of(scale):
    """What to multiply by instead of dividing by `scale`.

    Division costs ten instructions an element on CDNA and more than the memory-bound kernels have
    to spare on sm_90. Capped, because below 2**-128 the inverse of a positive scale overflows and
    the fp8 conversion of CDNA turns infinities into NaN. A scale of 0 stays infinite: 0 / 0 is NaN.
    """
    inverse = 1.0 / scale
    return tl.where(scale > 0, tl.minimum(inverse, FLOAT_MAX, tl.PropagateNan.ALL), inverse)


@triton.jit
def cast_to(y, dtype: tl.constexpr):
    """Round `y`, already within range, to fp8 or int8."""
    if dtype == tl.int8:
        out = round_half_even(y).to(tl.int32).to(tl.int8)
    else:
        out = y.to(dtype)
    return out


@triton.jit
def round_half_even(y):
    """The nearest integer, as float32, for magnitudes below 2**22."""
    return (y + ROUNDER) - ROUNDER


@triton.jit
def clamp(y, QMAX: tl.constexpr, QMIN: tl.constexpr = None):
    """`y` within the range of a quantised dtype, from -QMAX on if no QMIN; NaN stays NaN."""
    LEAST: tl.constexpr = -QMAX if QMIN is None else QMIN
    return tl.clamp(y, LEAST, QMAX, propagate_nan=tl.PropagateNan.ALL)
