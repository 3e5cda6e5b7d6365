"""Normalisations that store what they normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.kernels.triton.norm_kernel import norm_rows
from aiter_inductor.kernels.triton.rows import RowConfig


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """RMSNorm of the rows of `x` [*, N]; see the op of this name."""
    out = torch.empty_like(x, dtype=out_dtype or x.dtype)
    norm_rows(
        x,
        out,
        norm="rms",
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        config=config,
    )
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of `x + residual`, both [*, N], and the sum; see the op of this name."""
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    out = torch.empty_like(total, dtype=out_dtype or total.dtype)
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
        config=config,
    )
    return out, total


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """LayerNorm of the rows of `x` [*, N]; see the op of this name."""
    out = torch.empty_like(x, dtype=out_dtype or x.dtype)
    norm_rows(x, out, norm="layer", eps=eps, weight=weight, bias=bias, config=config)
    return out
