"""RMSNorm and LayerNorm, with the residual addition in front of them, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.rows import RowProblem, rows_unsupported


@op(problem=RowProblem.of_norm)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide each row of `x` by its root mean square, then scale by `weight + weight_offset`.

    Args:
        x: [*, N], any float dtype.
        weight: [N] or None.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma, whose weights are stored around zero.
        round_before_weight: round to x's dtype before the multiplication (Llama), not after it.
        out_dtype: dtype of the result; None means that of `x`.

    Returns:
        [*, N].
    """
    acc = accumulate_dtype(x.dtype)
    f = x.to(acc)
    y = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    out = out_dtype or x.dtype
    if weight is None:
        return y.to(out)
    if round_before_weight:
        scale = weight + weight_offset if weight_offset else weight
        return (y.to(x.dtype) * scale).to(out)
    return (y * (weight.to(acc) + weight_offset)).to(out)


@rms_norm.provider("triton", refuse=rows_unsupported, traceable=True)
def _(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    from aiter_inductor.kernels.triton import norm

    return norm.rms_norm(
        x,
        weight,
        eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        out_dtype=out_dtype,
    )
