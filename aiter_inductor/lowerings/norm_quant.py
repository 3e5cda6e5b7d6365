"""Normalisation and quantisation in one pass over the rows: the normalised rows stay in registers.

A dynamic scale is one a row (`group_size` None) or one a group. With `round_norm` the normalised
value is rounded to the dtype it would have been stored in, as the unfused program does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.measured import cede_norm_quant
from aiter_inductor.lowerings.norm import layer_norm, rms_norm
from aiter_inductor.lowerings.norm_quant_problem import (
    of_add_rms_norm_quant,
    of_add_rms_norm_quant_static,
    of_layer_norm_quant,
    of_layer_norm_quant_static,
    of_rms_norm_quant,
    of_rms_norm_quant_static,
)
from aiter_inductor.lowerings.providers import add_hip, add_triton
from aiter_inductor.lowerings.quant import quant_static, quantised_rows
from aiter_inductor.lowerings.rows import hip_rows_unsupported, rows_unsupported


@op(problem=of_rms_norm_quant)
def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    amax_min: float = 0.0,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    round_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, then `quant_per_token` or `quant_per_group`.

    Args:
        x: [*, N], any float dtype.
        weight: [N] or None.
        eps, weight_offset, round_before_weight: as in `rms_norm`.
        dtype, amax_min: as in `quant_per_token`.
        group_size: elements that share a scale; None for the whole row.
        round_norm: round the normalised rows to x's dtype first.

    Returns:
        q: [*, N], `dtype`.
        scale: [*, 1] or [*, N / group_size], fp32.
    """
    y = rms_norm.reference(
        x,
        weight,
        eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        out_dtype=_stored(x, round_norm),
    )
    return quantised_rows(y, dtype=dtype, group_size=group_size, amax_min=amax_min)


@op(problem=of_add_rms_norm_quant)
def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    amax_min: float = 0.0,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    round_norm: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a residual, then `rms_norm_quant` of the sum as it is stored.

    Args:
        x, residual: [*, N], any float dtype.
        weight, eps, dtype, group_size, amax_min, weight_offset, round_before_weight, round_norm:
            as in `rms_norm_quant`.

    Returns:
        q: [*, N], `dtype`.
        scale: [*, 1] or [*, N / group_size], fp32.
        sum: [*, N], `x + residual` in their promoted dtype.
    """
    total = x + residual
    q, scale = rms_norm_quant.reference(
        total,
        weight,
        eps,
        dtype=dtype,
        group_size=group_size,
        amax_min=amax_min,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        round_norm=round_norm,
    )
    return q, scale, total


@op(problem=of_layer_norm_quant)
def layer_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    amax_min: float = 0.0,
    round_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """`layer_norm`, then `quant_per_token` or `quant_per_group`.

    Args:
        x: [*, N], any float dtype.
        weight, bias: [N] or None.
        eps: added to the variance.
        dtype, group_size, amax_min, round_norm: as in `rms_norm_quant`.

    Returns:
        q: [*, N], `dtype`.
        scale: [*, 1] or [*, N / group_size], fp32.
    """
    y = layer_norm.reference(x, weight, bias, eps, out_dtype=_stored(x, round_norm))
    return quantised_rows(y, dtype=dtype, group_size=group_size, amax_min=amax_min)


@op(problem=of_rms_norm_quant_static)
def rms_norm_quant_static(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    round_norm: bool = True,
) -> Tensor:
    """`rms_norm`, then `quant_static`.

    Args:
        x, weight, eps, weight_offset, round_before_weight, round_norm: as in `rms_norm_quant`.
        scale: [] or [1], fp32.
        dtype: as in `quant_static`.

    Returns:
        [*, N], `dtype`.
    """
    y = rms_norm.reference(
        x,
        weight,
        eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        out_dtype=_stored(x, round_norm),
    )
    q: Tensor = quant_static.reference(y, scale, dtype=dtype)
    return q


@op(problem=of_add_rms_norm_quant_static)
def add_rms_norm_quant_static(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    round_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add a residual, then `rms_norm_quant_static` of the sum as it is stored.

    Args:
        x, residual: [*, N], any float dtype.
        weight, eps, scale, dtype, weight_offset, round_before_weight, round_norm: as in
            `rms_norm_quant_static`.

    Returns:
        q: [*, N], `dtype`.
        sum: [*, N], `x + residual` in their promoted dtype.
    """
    total = x + residual
    q = rms_norm_quant_static.reference(
        total,
        weight,
        eps,
        scale,
        dtype=dtype,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        round_norm=round_norm,
    )
    return q, total


@op(problem=of_layer_norm_quant_static)
def layer_norm_quant_static(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    round_norm: bool = True,
) -> Tensor:
    """`layer_norm`, then `quant_static`.

    Args:
        x, weight, bias, eps: as in `layer_norm`.
        scale: [] or [1], fp32.
        dtype, round_norm: as in `rms_norm_quant_static`.

    Returns:
        [*, N], `dtype`.
    """
    y = layer_norm.reference(x, weight, bias, eps, out_dtype=_stored(x, round_norm))
    q: Tensor = quant_static.reference(y, scale, dtype=dtype)
    return q


for fused in (
    rms_norm_quant,
    add_rms_norm_quant,
    layer_norm_quant,
    rms_norm_quant_static,
    add_rms_norm_quant_static,
    layer_norm_quant_static,
):
    add_triton(fused, "norm_quant", refuse=rows_unsupported, cede=cede_norm_quant)
    add_hip(fused, "norm_quant", refuse=hip_rows_unsupported)


def _stored(x: Tensor, round_norm: bool) -> torch.dtype:
    return x.dtype if round_norm else accumulate_dtype(x.dtype)
