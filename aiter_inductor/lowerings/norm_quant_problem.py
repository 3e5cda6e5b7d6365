"""The problems of normalisations that quantise their result."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.lowerings.rows import RowProblem, with_one_scale


def of_rms_norm_quant(
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
) -> RowProblem:
    """RMSNorm and dynamic quantisation."""
    return RowProblem.of(
        "x weight eps", (x,), weight=weight, out_dtype=dtype, group_size=group_size, scales=True
    )


def of_add_rms_norm_quant(
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
) -> RowProblem:
    """RMSNorm of a sum and dynamic quantisation."""
    return RowProblem.of(
        "x residual weight eps",
        (x, residual),
        weight=weight,
        out_dtype=dtype,
        group_size=group_size,
        scales=True,
    )


def of_layer_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    amax_min: float = 0.0,
    round_norm: bool = True,
) -> RowProblem:
    """LayerNorm and dynamic quantisation."""
    return RowProblem.of(
        "x weight bias eps",
        (x,),
        weight=weight,
        bias=bias,
        out_dtype=dtype,
        group_size=group_size,
        scales=True,
    )


def of_rms_norm_quant_static(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    round_norm: bool = True,
) -> RowProblem:
    """RMSNorm and quantisation with a given scale."""
    made = RowProblem.of("x weight eps scale", (x,), weight=weight, out_dtype=dtype)
    return with_one_scale(made, scale, x)


def of_add_rms_norm_quant_static(
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
) -> RowProblem:
    """RMSNorm of a sum and quantisation with a given scale."""
    rows = (x, residual)
    made = RowProblem.of("x residual weight eps scale", rows, weight=weight, out_dtype=dtype)
    return with_one_scale(made, scale, x)


def of_layer_norm_quant_static(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    round_norm: bool = True,
) -> RowProblem:
    """LayerNorm and quantisation with a given scale."""
    arguments = "x weight bias eps scale"
    made = RowProblem.of(arguments, (x,), weight=weight, bias=bias, out_dtype=dtype)
    return with_one_scale(made, scale, x)
