"""Normalisations that store what they normalised as fp8 or int8."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.kernels.triton.norm_kernel import norm_rows
from aiter_inductor.kernels.triton.rows import RowConfig


def scales_for(x: Tensor, group_size: int | None) -> Tensor:
    """[*, 1] or [*, N / group_size], fp32, to be written."""
    groups = 1 if group_size is None else x.shape[-1] // group_size
    return x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


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
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the rows of `x` [*, N], quantised; see the op of this name."""
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, group_size)
    norm_rows(
        x,
        out,
        norm="rms",
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        quant="token" if group_size is None else "group",
        scale=scale,
        group_size=group_size or 1,
        amax_min=amax_min,
        round_norm=round_norm,
        config=config,
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
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of `x + residual`, both [*, N], quantised, and the sum; see the op of this name."""
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    out, scale = torch.empty_like(total, dtype=dtype), scales_for(x, group_size)
    norm_rows(
        x,
        out,
        norm="rms",
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        residual=residual,
        total=total,
        quant="token" if group_size is None else "group",
        scale=scale,
        group_size=group_size or 1,
        amax_min=amax_min,
        round_norm=round_norm,
        config=config,
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
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of the rows of `x` [*, N], quantised; see the op of this name."""
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, group_size)
    norm_rows(
        x,
        out,
        norm="layer",
        eps=eps,
        weight=weight,
        bias=bias,
        quant="token" if group_size is None else "group",
        scale=scale,
        group_size=group_size or 1,
        amax_min=amax_min,
        round_norm=round_norm,
        config=config,
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
    config: RowConfig | None = None,
) -> Tensor:
    """RMSNorm of the rows of `x` [*, N], quantised by `scale`; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    norm_rows(
        x,
        out,
        norm="rms",
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        quant="static",
        scale=scale,
        round_norm=round_norm,
        config=config,
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
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of `x + residual`, quantised by `scale`, and the sum; see the op of this name."""
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    out = torch.empty_like(total, dtype=dtype)
    norm_rows(
        x,
        out,
        norm="rms",
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        residual=residual,
        total=total,
        quant="static",
        scale=scale,
        round_norm=round_norm,
        config=config,
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
    config: RowConfig | None = None,
) -> Tensor:
    """LayerNorm of the rows of `x` [*, N], quantised by `scale`; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    norm_rows(
        x,
        out,
        norm="layer",
        eps=eps,
        weight=weight,
        bias=bias,
        quant="static",
        scale=scale,
        round_norm=round_norm,
        config=config,
    )
    return out
