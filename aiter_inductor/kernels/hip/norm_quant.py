"""Normalisations that store what they normalised as fp8 or int8; see norm.hip."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.kernels.hip.norm import norm_rows
from aiter_inductor.kernels.hip.rows import Quantisation, scales_for


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
    """RMSNorm of the rows of `x` [*, N], quantised; see the op of this name."""
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, group_size)
    norm_rows(
        x,
        out,
        Quantisation.dynamic(dtype, group_size),
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        scale=scale,
        amax_min=amax_min,
        round_norm=round_norm,
    )
    return out, scale


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
    """RMSNorm of `x + residual`, both [*, N], quantised, and the sum; see the op of this name."""
    total = torch.empty_like(x)
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, group_size)
    norm_rows(
        x,
        out,
        Quantisation.dynamic(dtype, group_size),
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        residual=residual,
        total=total,
        scale=scale,
        amax_min=amax_min,
        round_norm=round_norm,
    )
    return out, scale, total


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
    """LayerNorm of the rows of `x` [*, N], quantised; see the op of this name."""
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, group_size)
    norm_rows(
        x,
        out,
        Quantisation.dynamic(dtype, group_size),
        eps=eps,
        layer=True,
        weight=weight,
        bias=bias,
        scale=scale,
        amax_min=amax_min,
        round_norm=round_norm,
    )
    return out, scale


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
    """RMSNorm of the rows of `x` [*, N], quantised by `scale`; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    norm_rows(
        x,
        out,
        Quantisation("static", dtype),
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        scale=scale,
        round_norm=round_norm,
    )
    return out


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
    """RMSNorm of `x + residual`, quantised by `scale`, and the sum; see the op of this name."""
    total, out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    norm_rows(
        x,
        out,
        Quantisation("static", dtype),
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        residual=residual,
        total=total,
        scale=scale,
        round_norm=round_norm,
    )
    return out, total


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
    """LayerNorm of the rows of `x` [*, N], quantised by `scale`; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    norm_rows(
        x,
        out,
        Quantisation("static", dtype),
        eps=eps,
        layer=True,
        weight=weight,
        bias=bias,
        scale=scale,
        round_norm=round_norm,
    )
    return out
