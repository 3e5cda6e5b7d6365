"""RMSNorm and LayerNorm, with the residual addition in front of them, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.measured import (
    cede_norm,
    decline_add_rms_norm,
    decline_layer_norm,
    decline_norm_in_hip,
    decline_rms_norm,
)
from aiter_inductor.lowerings.providers import add_cuda, add_hip, add_triton
from aiter_inductor.lowerings.rows import (
    RowProblem,
    backward_unsupported,
    hip_rows_unsupported,
    hopper_backward_unsupported,
    rows_unsupported,
)


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


@op(problem=RowProblem.of_add_norm)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual, then normalise the sum as it is stored.

    Args:
        x: [*, N], any float dtype.
        residual: [*, N], any float dtype.
        weight: [N] or None.
        eps, weight_offset, round_before_weight: as in `rms_norm`.
        out_dtype: dtype of the normalised rows; None means that of the sum.

    Returns:
        out: [*, N].
        sum: [*, N], `x + residual` in their promoted dtype.
    """
    total = x + residual
    out = rms_norm.reference(
        total,
        weight,
        eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        out_dtype=out_dtype,
    )
    return out, total


@op(problem=RowProblem.of_layer_norm)
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Centre each row of `x`, divide it by its standard deviation, then scale and shift it.

    Args:
        x: [*, N], any float dtype.
        weight: [N] or None.
        bias: [N] or None.
        eps: added to the variance.
        out_dtype: dtype of the result, rounded once at the end; None means that of `x`.

    Returns:
        [*, N].
    """
    acc = accumulate_dtype(x.dtype)
    f = x.to(acc)
    centred = f - f.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(out_dtype or x.dtype)


@op(problem=RowProblem.of_norm_backward)
def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`.

    Args:
        grad: [*, N], the gradient of its result.
        x, weight, eps, weight_offset, round_before_weight: as given to `rms_norm`.

    Returns:
        dx: [*, N], dtype of x.
        dweight: [N], dtype of the weight; empty without a weight.
    """
    acc = accumulate_dtype(x.dtype)
    f, g = x.to(acc), grad.to(acc)
    rstd = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    y = f * rstd
    dy = g if weight is None else g * (weight.to(acc) + weight_offset)
    dx = (dy - y * (dy * y).mean(-1, keepdim=True)) * rstd
    if weight is None:
        return dx.to(x.dtype), x.new_empty(0)
    stored = y.to(x.dtype).to(acc) if round_before_weight else y
    return dx.to(x.dtype), _over_rows(g * stored).to(weight.dtype)


@op(problem=RowProblem.of_add_norm_backward)
def add_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_rms_norm` with respect to the sum and the weight.

    Args:
        grad: [*, N], the gradient of the normalised rows.
        grad_sum: [*, N], the gradient of the sum.
        x: [*, N], the sum itself.
        weight, eps, weight_offset, round_before_weight: as given to `add_rms_norm`.

    Returns:
        dsum: [*, N], dtype of x: the gradient of both addends.
        dweight: [N], dtype of the weight; empty without a weight.
    """
    dx, dweight = rms_norm_backward.reference(
        grad,
        x.to(accumulate_dtype(x.dtype)),
        weight,
        eps,
        weight_offset=weight_offset,
        round_before_weight=False,
    )
    if round_before_weight and weight is not None:
        acc = accumulate_dtype(x.dtype)
        y = rms_norm.reference(x, None, eps).to(acc)
        dweight = _over_rows(grad.to(acc) * y).to(weight.dtype)
    return (dx + grad_sum.to(dx.dtype)).to(x.dtype), dweight.to(_or(weight, x).dtype)


@op(problem=RowProblem.of_norm_backward)
def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, *, has_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm`.

    Args:
        grad: [*, N], the gradient of its result.
        x, weight, eps: as given to `layer_norm`.
        has_bias: whether a gradient for the bias is wanted.

    Returns:
        dx: [*, N], dtype of x.
        dweight: [N], dtype of the weight; empty without a weight.
        dbias: [N], dtype of the weight or, without one, of x; empty without a bias.
    """
    acc = accumulate_dtype(x.dtype)
    f, g = x.to(acc), grad.to(acc)
    centred = f - f.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    dy = g if weight is None else g * weight.to(acc)
    dx = (dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True)) * rstd
    dtype = _or(weight, x).dtype
    dweight = x.new_empty(0) if weight is None else _over_rows(g * y).to(dtype)
    dbias = _over_rows(g).to(dtype) if has_bias else x.new_empty(0)
    return dx.to(x.dtype), dweight, dbias


@rms_norm.backward("x", "weight")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    names = ("weight_offset", "round_before_weight")
    dx, dweight = rms_norm_backward(
        grad, saved["x"], saved.get("weight"), saved["eps"], **{n: saved[n] for n in names}
    )
    return {"x": dx, "weight": dweight}


@add_rms_norm.backward("output_1", "weight")
def _(saved: dict[str, Any], grad: Tensor, grad_sum: Tensor) -> dict[str, Tensor | None]:
    names = ("weight_offset", "round_before_weight")
    dsum, dweight = add_rms_norm_backward(
        grad,
        grad_sum,
        saved["output_1"],
        saved.get("weight"),
        saved["eps"],
        **{n: saved[n] for n in names},
    )
    return {"x": dsum, "residual": dsum, "weight": dweight}


@layer_norm.backward("x", "weight", "bias")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    bias = saved.get("bias")
    dx, dweight, dbias = layer_norm_backward(
        grad, saved["x"], saved.get("weight"), saved["eps"], has_bias=bias is not None
    )
    return {
        "x": dx,
        "weight": dweight,
        "bias": None if bias is None else dbias.to(bias.dtype),
    }


for forward, decline in (
    (rms_norm, decline_rms_norm),
    (add_rms_norm, decline_add_rms_norm),
    (layer_norm, decline_layer_norm),
):
    add_triton(forward, "norm", refuse=rows_unsupported, decline=decline, cede=cede_norm)
    add_hip(forward, "norm", refuse=hip_rows_unsupported, decline=decline_norm_in_hip)
for backward in (rms_norm_backward, add_rms_norm_backward, layer_norm_backward):
    add_cuda(backward, "norm_backward", refuse=hopper_backward_unsupported)
    add_triton(backward, "norm_backward", refuse=backward_unsupported)


def _over_rows(per_element: Tensor) -> Tensor:
    """[*, N] summed to [N]."""
    return per_element.reshape(-1, per_element.shape[-1]).sum(0)


def _or(vector: Tensor | None, x: Tensor) -> Tensor:
    return x if vector is None else vector
