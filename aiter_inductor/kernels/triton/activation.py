"""Gated activations, optionally quantised before they leave registers, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from aiter_inductor.core.dtypes import QUANT_DTYPES, quant_max
from aiter_inductor.core.rows import row_nest
from aiter_inductor.kernels.triton.activation_kernel import act_backward_kernel, act_kernel
from aiter_inductor.kernels.triton.launch import launchable
from aiter_inductor.kernels.triton.rows import strides_of

MIN_SPAN, MAX_SPAN, MAX_SHARED_SPAN = 128, 1024, 4096
WIDE = 8192


@dataclass(frozen=True)
class ActivationConfig:
    """What one program handles: `spans` pieces of rows, `span` elements each.

    Attributes:
        span: a power of two. A group, or a row, that shares a scale and is wider lies in registers
            as several chunks of this size.
        spans: a power of two.
        num_warps: warps of 32 lanes; a chip with wider ones launches as many fewer.
    """

    span: int
    spans: int
    num_warps: int

    @classmethod
    def default(cls, N: int, shared: int | None = None) -> ActivationConfig:
        """Untuned choice: 2048 elements, so that each lane of 4 warps loads gate and up twice.

        A wide row that shares a scale needs all the lanes a program can have: 64 x 18432 take an
        H100 5.50 µs by 32 warps, 6.38 by 8, and 4096 rows 126.6 and 129.2.

        Args:
            N: elements a row.
            shared: elements that share a scale; None without one.
        """
        if shared is not None and shared > WIDE:
            return cls(MAX_SHARED_SPAN, 1, num_warps=32)
        if shared is not None:
            span = min(triton.next_power_of_2(shared), MAX_SHARED_SPAN)
            return cls(span, max(2048 // span, 1), num_warps=max(span // 512, 4))
        if (span := N & -N) >= MIN_SPAN:  # the largest power of two that divides N
            span = min(span, MAX_SPAN)
        else:
            span = min(triton.next_power_of_2(N), MAX_SPAN)
        return cls(span, max(2048 // span, 1), num_warps=max(span // 512, 4))

    def launch(self) -> dict[str, int]:
        """Keywords for the launch."""
        return {"num_warps": max(self.num_warps // 2, 1) if torch.version.hip else self.num_warps}


def act_and_mul(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
    config: ActivationConfig | None = None,
) -> Tensor:
    """Activate `gate` [*, N] and multiply by `up` [*, N], of one dtype; see the op of this name."""
    out = torch.empty_like(gate)
    _activate(gate, up, out, None, None, 0.0, activation, alpha, limit, config)
    return out


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
    config: ActivationConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`act_and_mul`, quantised with a scale for each group or row; see the op of this name."""
    N = gate.shape[-1]
    shared = N if group_size is None else group_size
    out = torch.empty_like(gate, dtype=dtype)
    scale = gate.new_empty((*gate.shape[:-1], N // shared), dtype=torch.float32)
    _activate(gate, up, out, scale, shared, amax_min, activation, alpha, limit, config)
    return out, scale


def act_and_mul_quant_static(
    gate: Tensor,
    up: Tensor,
    scale: Tensor,
    *,
    activation: str,
    dtype: torch.dtype,
    alpha: float = 1.702,
    limit: float = 7.0,
    config: ActivationConfig | None = None,
) -> Tensor:
    """`act_and_mul`, quantised with `scale` of one element; see the op of this name."""
    out = torch.empty_like(gate, dtype=dtype)
    _activate(gate, up, out, scale, None, 0.0, activation, alpha, limit, config)
    return out


def act_and_mul_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
    config: ActivationConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `act_and_mul` by gate and up; see the op of this name."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    N = gate.shape[-1]
    config = config or ActivationConfig.default(N)
    walk = _Walk.over({"grad": grad, "gate": gate, "up": up, "dgate": dgate, "dup": dup}, config)
    launchable(act_backward_kernel)[walk.grid](
        grad,
        gate,
        up,
        dgate,
        dup,
        **walk.arguments,
        grad_step=grad.stride(-1),
        gate_step=gate.stride(-1),
        up_step=up.stride(-1),
        alpha=alpha,
        limit=limit,
        ACTIVATION=activation,
        SPAN=config.span,
        SPANS=config.spans,
        **config.launch(),
    )
    return dgate, dup


@dataclass(frozen=True)
class _Walk:
    """The grid, and the kernel arguments that say where each row piece of each tensor lies."""

    grid: tuple[Any]
    arguments: dict[str, Any]

    @classmethod
    def over(
        cls, tensors: dict[str, Tensor], config: ActivationConfig, shared: int | None = None
    ) -> _Walk:
        nest = row_nest(*tensors.values())
        N = tensors["gate"].shape[-1]
        if nest is None:
            shape, strides = tuple(tensors["gate"].shape), tensors["gate"].stride()
            raise ValueError(f"rows of shape {shape}, strides {strides} need three loops")
        pieces = triton.cdiv(N, shared or config.span)
        arguments = {
            "num_pieces": nest.num_rows * pieces,
            "inner": nest.inner,
            **strides_of(nest, tuple(tensors)),
            "N": N,
            "PIECES": pieces,
            "WIDTH": shared or config.span,
            "NESTED": not (isinstance(nest.inner, int) and nest.inner == 1),
        }
        return cls((triton.cdiv(nest.num_rows * pieces, config.spans),), arguments)


def _activate(
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    scale: Tensor | None,
    shared: int | None,
    amax_min: float,
    activation: str,
    alpha: float,
    limit: float,
    config: ActivationConfig | None,
) -> None:
    """Write `out`, and `scale` where `shared` elements have one of their own."""
    config = config or ActivationConfig.default(gate.shape[-1], shared)
    per_row = {"gate": gate, "up": up, "out": out}
    if shared is not None and scale is not None:
        per_row["scale"] = scale
    walk = _Walk.over(per_row, config, shared)
    arguments = {"scale_outer": 0, "scale_inner": 0, **walk.arguments}
    quant = "none" if scale is None else "static" if shared is None else "dynamic"
    launchable(act_kernel)[walk.grid](
        gate,
        up,
        out,
        out if scale is None else scale,
        **arguments,
        gate_step=gate.stride(-1),
        up_step=up.stride(-1),
        amax_min=amax_min,
        alpha=alpha,
        limit=limit,
        ACTIVATION=activation,
        QUANT=quant,
        QMAX=quant_max(out.dtype) if out.dtype in QUANT_DTYPES else 1.0,
        SPAN=config.span,
        SPANS=config.spans,
        CHUNKS=triton.cdiv(shared or config.span, config.span),
        **config.launch(),
    )
