"""Gated activations, alone and quantised in the same pass, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import accept, op
from aiter_inductor.lowerings.activation_problem import (
    ActivationProblem,
    activation_unsupported,
    hip_activation_unsupported,
    quantised_activation_unsupported,
)
from aiter_inductor.lowerings.measured import cede_activation, decline_act_and_mul
from aiter_inductor.lowerings.providers import add_hip, add_triton
from aiter_inductor.lowerings.quant import quant_static, quantised_rows

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu")


@op(problem=ActivationProblem.of_act_and_mul)
def act_and_mul(
    gate: Tensor, up: Tensor, *, activation: str, alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """Activate `gate` and multiply by `up`, rounding after each step as models' own code does.

    Args:
        gate: [*, N], any float dtype, any strides: often half of a wider tensor, or every other
            element of it.
        up: [*, N].
        activation: `silu`, `gelu` (erf), `gelu_tanh`, or `swiglu` (GPT-OSS), which clamps both
            and computes `(up + 1) * gate * sigmoid(alpha * gate)`.
        alpha: of swiglu.
        limit: of swiglu: gate is clamped to at most it, up to plus and minus it.

    Returns:
        [*, N].

    Raises:
        ValueError: for an activation of another name.
    """
    if activation == "swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return _activate(gate, activation) * up


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "gelu":
        return F.gelu(gate)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh")
    raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


@op(problem=ActivationProblem.of_act_and_mul_backward)
def act_and_mul_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[Tensor, Tensor]:
    """Gradients of `act_and_mul`, rounding where eager's do except within swiglu.

    Args:
        grad: [*, N], the gradient of its result.
        gate, up, activation, alpha, limit: as given to it.

    Returns:
        dgate: [*, N], dtype of gate.
        dup: [*, N], dtype of up.

    Raises:
        ValueError: for an unknown activation.
    """
    if activation == "swiglu":
        return _swiglu_backward(grad, gate, up, alpha, limit)
    active = _activate(gate, activation)
    dactive = (grad * up).to(gate.dtype)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dactive, gate)
    else:
        approximate = "none" if activation == "gelu" else "tanh"
        dgate = torch.ops.aten.gelu_backward(dactive, gate, approximate=approximate)
    return dgate, (grad * active).to(up.dtype)


def _swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(grad.dtype)
    d, g, u = grad.to(acc), gate.to(acc).clamp(max=limit), up.to(acc).clamp(-limit, limit)
    s = torch.sigmoid(alpha * g)
    dgate = d * (u + 1) * (s + alpha * g * s * (1 - s))
    dup = d * g * s
    return (
        torch.where(gate <= limit, dgate, 0).to(gate.dtype),
        torch.where(up.abs() <= limit, dup, 0).to(up.dtype),
    )


@act_and_mul.backward("gate", "up")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    style = {name: saved[name] for name in ("activation", "alpha", "limit")}
    dgate, dup = act_and_mul_backward(grad, saved["gate"], saved["up"], **style)
    return {"gate": dgate, "up": dup}


@op(problem=ActivationProblem.of_act_and_mul_quant)
def act_and_mul_quant(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    dtype: torch.dtype,
    group_size: int | None = None,
    amax_min: float = 0.0,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[Tensor, Tensor]:
    """Compute `act_and_mul` and quantise its rounded result, which is never stored.

    Args:
        gate, up, activation, alpha, limit: as in `act_and_mul`.
        dtype: float8_e4m3fn, float8_e4m3fnuz or int8.
        group_size: consecutive elements that share a scale, a divisor of N; None for the whole
            row.
        amax_min: lower bound of the largest magnitude.

    Returns:
        q: [*, N], `dtype`.
        scale: [*, N / group_size], fp32; [*, 1] without a group size.

    Raises:
        ValueError: for an unknown activation or dtype.
    """
    y = act_and_mul.reference(gate, up, activation=activation, alpha=alpha, limit=limit)
    return quantised_rows(y, dtype=dtype, group_size=group_size, amax_min=amax_min)


@op(problem=ActivationProblem.of_act_and_mul_quant_static)
def act_and_mul_quant_static(
    gate: Tensor,
    up: Tensor,
    scale: Tensor,
    *,
    activation: str,
    dtype: torch.dtype,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Compute `act_and_mul` and quantise its rounded result with a scale known beforehand.

    Args:
        gate, up, activation, alpha, limit: as in `act_and_mul`.
        scale: [] or [1], fp32.
        dtype: as in `act_and_mul_quant`.

    Returns:
        [*, N], `dtype`.

    Raises:
        ValueError: for an unknown activation or dtype.
    """
    y = act_and_mul.reference(gate, up, activation=activation, alpha=alpha, limit=limit)
    q: Tensor = quant_static.reference(y, scale, dtype=dtype)
    return q


add_triton(act_and_mul, "activation", refuse=activation_unsupported, decline=decline_act_and_mul)
add_hip(act_and_mul, "activation", refuse=hip_activation_unsupported, decline=decline_act_and_mul)
add_triton(act_and_mul_backward, "activation", refuse=activation_unsupported)
for made, cede in ((act_and_mul_quant, cede_activation), (act_and_mul_quant_static, accept)):
    add_triton(made, "activation", refuse=quantised_activation_unsupported, cede=cede)
    add_hip(made, "activation", refuse=hip_activation_unsupported)
