"""The zeros of an int4 weight as `gemm_w4a16` takes them: what a code of 0 stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aiter_inductor.core.match import Derived
from aiter_inductor.patterns.raising.gemm_operand import Operand
from aiter_inductor.patterns.raising.gemm_scale import Scaling, scaling_of


def read_zeros(weight: Operand, scaling: Scaling) -> tuple[Any, ...] | str:
    """The op's zeros in a tuple, which is empty if there are none; or why no kernel takes them."""
    if scaling.rows.axes and scaling.rows.block != 1:
        return f"int4 is scaled by {scaling.shown()}; kernels scale rows"
    if not scaling.rows.axes:
        return f"int4 shares {scaling.name} among rows; kernels scale each"
    scale = scaling.as_blocks()
    if weight.zero is None:
        return (Derived(lifted, (scale, weight.lift)),) if weight.lift else ()
    zero = scaling_of(weight.zero.placed)
    if isinstance(zero, str):
        return zero
    if (zero.rows.count, zero.columns.count) != (scaling.rows.count, scaling.columns.count):
        found, wanted = (f"[{s.rows.count}, {s.columns.count}]" for s in (zero, scaling))
        return f"{zero.name} is {found} and the scales are {wanted}; kernels take one zero a scale"
    made = added if weight.zero.added else subtracted
    return (Derived(made, (scale, zero.as_blocks(), weight.lift)),)


def lifted(scale: Tensor, lift: float) -> Tensor:
    """Of `(code + lift) * scale`."""
    return scale * lift


def subtracted(scale: Tensor, zero_point: Tensor, lift: float) -> Tensor:
    """Of `(code + lift - zero_point) * scale`."""
    return scale * (lift - zero_point)


def added(scale: Tensor, zero: Tensor, lift: float) -> Tensor:
    """Of `(code + lift) * scale + zero`."""
    return zero + scale * lift if lift else zero
