"""Quantisation by one scale a row, one a group, or a given one; the Python side of quant.hip."""

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

_SIZES = (i32("num_rows"), i32("num_inner"), i32("N"))


@dataclass(frozen=True)
class QuantVariant:
    """One kernel of one compilation of quant.hip, for inputs of `dtype`."""

    dtype: torch.dtype
    quantisation: Quantisation
    layout: RowLayout
    kernel: str = "quant_kernel"

    def module(self) -> Module:
        """quant.hip with these definitions."""
        return hip_module(
            "quant",
            "quant.hip",
            X=CPP_TYPES[self.dtype],
            **self.quantisation.defines(),
            **self.layout.defines(),
        )

    def signature(self) -> KernelSignature:
        """The kernel's parameters."""
        x, out = pointer("x", self.dtype), pointer("out", self.quantisation.out_dtype)
        scale, amax = pointer("scale", torch.float32), pointer("amax", torch.int32)
        amax_min = f32("amax_min")
        parameters = {
            "quant_kernel": (
                *(x, out, scale, *_SIZES, amax_min),
                *stride_parameters("x", "out", "scale"),
            ),
            "amax_kernel": (x, amax, *_SIZES, *stride_parameters("x")),
            "quant_by_amax_kernel": (
                *(x, out, scale, amax, *_SIZES, amax_min),
                *stride_parameters("x", "out"),
            ),
        }
        return KernelSignature(self.kernel, parameters[self.kernel], waits=True)


def quant_static(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype, qmin: float | None = None
) -> Tensor:
    """`x` [*, N] divided by `scale` and rounded to `dtype`; see the op of this name."""
    out = torch.empty_like(x, dtype=dtype)
    quant_rows(x, out, scale, Quantisation("static", dtype))
    return out


def quant_per_tensor(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """All of `x` [*, N], not empty, by one scale; see the op of this name.

    Raises:
        ValueError: for an empty `x`, or strides that the kernels do not take.
    """
    if x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has no largest magnitude")
    out, scale = torch.empty_like(x, dtype=dtype), x.new_empty((), dtype=torch.float32)
    amax = x.new_zeros((), dtype=torch.int32)
    key = (dtype, facts_of(x, out))
    plans = _PLANS_PER_TENSOR.get(key)
    if plans is None:
        static = Quantisation("static", dtype)
        kernels = "amax_kernel", "quant_by_amax_kernel"
        find, quantise = (_plan(x, out, scale, static, None, kernel) for kernel in kernels)
        plans = _PLANS_PER_TENSOR.keep(key, (find, quantise))
    find, quantise = plans
    find.launch(find.grid, find.threads, 0, x, amax, *find.sizes, *find.strides[:2])
    arguments = (x, out, scale, amax, *quantise.sizes, amax_min, *quantise.strides[:4])
    quantise.launch(quantise.grid, quantise.threads, 0, *arguments)
    return out, scale


def quant_per_token(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Each row of `x` [*, N] by its own scale; see the op of this name."""
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, None)
    quant_rows(x, out, scale, Quantisation("token", dtype), amax_min=amax_min)
    return out, scale


def quant_per_group(
    x: Tensor, *, group_size: int, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Each group of a row of `x` [*, N] by its own scale; see the op of this name."""
    out, scale = torch.empty_like(x, dtype=dtype), scales_for(x, group_size)
    quant_rows(x, out, scale, Quantisation("group", dtype, group_size), amax_min=amax_min)
    return out, scale


def quant_rows(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    quantisation: Quantisation,
    *,
    amax_min: float = 0.0,
    layout: RowLayout | None = None,
) -> None:
    """Quantise the rows of `x` [*, N] into `out`.

    Args:
        scale: [*, 1] or [*, N / group_size], written; [] or [1], read, where the scale is static.
        amax_min: lower bound of the largest magnitude behind a scale.
        layout: None for the default.

    Raises:
        ValueError: for shapes or strides that the kernel does not take.
    """
    if x.numel() == 0:
        return
    key = (quantisation, layout, facts_of(x, out, scale))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, _plan(x, out, scale, quantisation, layout))
    arguments = (x, out, scale, *plan.sizes, amax_min, *plan.strides)
    plan.launch(plan.grid, plan.threads, 0, *arguments)


_PLANS = Plans[LaunchPlan]()
_PLANS_PER_TENSOR = Plans[tuple[LaunchPlan, LaunchPlan]]()


def _plan(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    quantisation: Quantisation,
    layout: RowLayout | None,
    kernel: str = "quant_kernel",
) -> LaunchPlan:
    N, arch = x.shape[-1], arch_name(x.device)
    static = quantisation.mode == "static"
    nest = nest_of(x, out, *([] if static else [scale]))
    if layout is None:
        vec = widest_vector(N, x.element_size(), nest.strides[:2], (x, out))
        wave, group_size = wave_size(arch), quantisation.group_size
        check_row(N, group_size, vec, wave)
        whole, least_lanes = quantisation.mode == "token", max(group_size // vec, 1)
        layout = RowLayout.choose(nest.num_rows, N, vec, wave, least_lanes=least_lanes, whole=whole)
    layout = layout.over(nest)
    variant = QuantVariant(x.dtype, quantisation, layout, kernel)
    return LaunchPlan(
        load_kernel(variant, arch, x.device.type).launch,
        layout.grid(nest.num_rows, N),
        layout.threads,
        (nest.num_rows, nest.inner, N),
        flat_strides(nest, (True, True, not static)),
    )
