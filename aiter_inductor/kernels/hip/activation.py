"""Gated activations, alone or quantised in the same pass; the Python side of activation.hip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aiter_inductor.core.jit import Module
from aiter_inductor.core.launch import KernelSignature, f32, i32, pointer
from aiter_inductor.kernels.hip.loading import (
    CPP_TYPES,
    arch_name,
    hip_module,
    load_kernel,
    wave_size,
)
from aiter_inductor.kernels.hip.rows import (
    FEW_ROWS,
    LaunchPlan,
    Quantisation,
    RowLayout,
    check_row,
    flat_strides,
    nest_of,
    scales_for,
    stride_parameters,
    widest_vector,
)
from aiter_inductor.kernels.prepared import Plans, facts_of

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu")
SEPARATE, GATE_FIRST, UP_FIRST = range(3)
_MOST_VECTORS = 6
"""4096 x 18432 SiLU * up + fp8 takes an H100 147 us with 3 vectors of either input, 157 with 4."""


@dataclass(frozen=True)
class ActivationVariant:
    """One compilation of activation.hip.

    Attributes:
        activation: one of `ACTIVATIONS`.
        dtype: of gate and up.
        interleaved: `SEPARATE`, `GATE_FIRST` or `UP_FIRST`.
        quantisation: how the rows are stored.
        layout: how they lie over threads.
        resident: blocks that a multiprocessor of an NVIDIA chip is to hold; 0 leaves it to the
            compiler.
    """

    activation: str
    dtype: torch.dtype
    interleaved: int
    quantisation: Quantisation
    layout: RowLayout
    resident: int = 1

    def module(self) -> Module:
        """activation.hip with these definitions."""
        return hip_module(
            "activation",
            "activation.hip",
            ACTIVATION=ACTIVATIONS.index(self.activation),
            X=CPP_TYPES[self.dtype],
            INTERLEAVED=self.interleaved,
            RESIDENT=self.resident,
            **self.quantisation.defines(),
            **self.layout.defines(),
        )

    def signature(self) -> KernelSignature:
        """act_kernel's parameters."""
        return KernelSignature(
            "act_kernel",
            (
                pointer("gate", self.dtype),
                pointer("up", self.dtype),
                pointer("out", self.quantisation.out_dtype),
                pointer("scale", torch.float32, optional=True),
                i32("num_rows"),
                i32("num_inner"),
                i32("N"),
                f32("alpha"),
                f32("limit"),
                f32("amax_min"),
                *stride_parameters("gate", "up", "out", "scale"),
            ),
            waits=True,
        )


def act_and_mul(
    gate: Tensor, up: Tensor, *, activation: str, alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """Activate `gate` and multiply by `up`, both [*, N]; see the op of this name."""
    out = torch.empty_like(gate)
    act_rows(gate, up, out, None, Quantisation("none", out.dtype), activation, alpha, limit)
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
) -> tuple[Tensor, Tensor]:
    """`act_and_mul`, quantised; see the op of this name."""
    out, scale = torch.empty_like(gate, dtype=dtype), scales_for(gate, group_size)
    quantisation = Quantisation.dynamic(dtype, group_size)
    act_rows(gate, up, out, scale, quantisation, activation, alpha, limit, amax_min=amax_min)
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
) -> Tensor:
    """`act_and_mul`, quantised by `scale`; see the op of this name."""
    out = torch.empty_like(gate, dtype=dtype)
    act_rows(gate, up, out, scale, Quantisation("static", dtype), activation, alpha, limit)
    return out


def act_rows(
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    scale: Tensor | None,
    quantisation: Quantisation,
    activation: str,
    alpha: float,
    limit: float,
    *,
    amax_min: float = 0.0,
    layout: RowLayout | None = None,
) -> None:
    """Activate, multiply and store.

    Args:
        gate, up: [*, N] of one dtype, read where they lie if the last stride is 1, or 2 and they
            alternate in one tensor; else copied.
        out: [*, N], written.
        scale: [*, 1] or [*, N / group_size], written; [] or [1], read, where the scale is static.
        layout: None for the default.

    Raises:
        ValueError: for shapes or strides that the kernel does not take, or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if gate.numel() == 0:
        return
    between_bytes = up.data_ptr() - gate.data_ptr()
    interleaved = _interleaving(gate, up, between_bytes)
    if not interleaved:
        gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up))
    key = (activation, quantisation, layout, interleaved, facts_of(gate, up, out, scale))
    plan = _PLANS.get(key)
    if plan is None:
        made = _plan(gate, up, out, scale, activation, quantisation, layout, interleaved)
        plan = _PLANS.keep(key, made)
    first = up if interleaved == UP_FIRST else gate
    plan.launch(
        plan.grid,
        plan.threads,
        0,
        *(first, up, out, scale, *plan.sizes),
        *(alpha, limit, amax_min, *plan.strides),
    )


_PLANS = Plans[LaunchPlan]()


def _interleaving(gate: Tensor, up: Tensor, between_bytes: int) -> int:
    """Whether gate and up alternate in one tensor, and which begins."""
    alternate = gate.stride(-1) == 2 and up.stride() == gate.stride()
    if not alternate or abs(between_bytes) != gate.element_size():
        return SEPARATE
    return GATE_FIRST if between_bytes > 0 else UP_FIRST


def _plan(
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    scale: Tensor | None,
    activation: str,
    quantisation: Quantisation,
    layout: RowLayout | None,
    interleaved: int,
) -> LaunchPlan:
    N, arch = gate.shape[-1], arch_name(gate.device)
    if up.shape != gate.shape:
        raise ValueError(f"gate is {tuple(gate.shape)} but up is {tuple(up.shape)}")
    inputs = (gate, up)
    if interleaved:
        first = up if interleaved == UP_FIRST else gate
        both = first.as_strided((*gate.shape[:-1], 2 * N), (*gate.stride()[:-1], 1))
        inputs = (both, both)
    writes_scales = quantisation.mode in ("token", "group") and scale is not None
    nest = nest_of(*inputs, out, *([scale] if writes_scales else []))
    if layout is None:
        vec = widest_vector(N, gate.element_size(), nest.strides[:3], (*inputs, out))
        wave, group_size = wave_size(arch), quantisation.group_size
        check_row(N, group_size, vec, wave)
        whole, least_lanes = quantisation.mode == "token", max(group_size // vec, 1)
        layout = RowLayout.choose(
            nest.num_rows,
            N,
            vec,
            wave,
            least_lanes=least_lanes,
            whole=whole,
            inputs=len(inputs),
            most_vectors=_MOST_VECTORS,
            clusters=arch == "sm_90",
        )
    layout = layout.over(nest)
    resident = _resident(quantisation, nest.num_rows)
    variant = ActivationVariant(activation, gate.dtype, interleaved, quantisation, layout, resident)
    return LaunchPlan(
        load_kernel(variant, arch, gate.device.type).launch,
        layout.grid(nest.num_rows, N),
        layout.threads,
        (nest.num_rows, nest.inner, N),
        flat_strides(nest, (True, True, True, writes_scales)),
    )


def _resident(quantisation: Quantisation, num_rows: int) -> int:
    """How many blocks a multiprocessor is to hold; see `ActivationVariant`.

    4096 x 18432 SiLU * up + fp8 by rows takes an H200 91.9 us as the compiler chooses and 107.1
    with 1, which unpacks ahead; quantised in groups 92.1 and 90.9, and 64 rows of it 3.40 and 3.34.
    """
    return 0 if quantisation.mode == "token" and num_rows > FEW_ROWS else 1
