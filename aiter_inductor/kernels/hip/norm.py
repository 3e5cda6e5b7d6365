"""RMSNorm and LayerNorm, alone or after a residual addition; the Python side of norm.hip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    ROW_BLOCK,
    LaunchPlan,
    Quantisation,
    RowLayout,
    check_row,
    flat_strides,
    nest_of,
    stride_parameters,
    widest_vector,
)
from aiter_inductor.kernels.prepared import Plans, facts_of


@dataclass(frozen=True)
class NormVariant:
    """One compilation of norm.hip.

    Attributes:
        layer: LayerNorm rather than RMSNorm.
        dtype: of x, the residual and the sum.
        weight_dtype: of the weight.
        bias_dtype: of the bias.
        has_residual, has_weight, has_bias: which of these there are.
        round_before_weight: round to `dtype` before the weight is applied.
        round_norm: round the result to `dtype` before it is quantised.
        quantisation: how the rows are stored.
        layout: how they lie over threads.
        late: load weight and bias after the row's reductions.
        residual_ahead: fetch the residual before the kernel ahead in the stream ends.
        has_offset: something is added to the weight.
        resident: blocks that a multiprocessor of an NVIDIA chip is to hold; 0 leaves it to the
            compiler.
    """

    layer: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype
    has_residual: bool
    has_weight: bool
    has_bias: bool
    round_before_weight: bool
    round_norm: bool
    quantisation: Quantisation
    layout: RowLayout
    late: bool = False
    has_offset: bool = False
    residual_ahead: bool = False
    resident: int = 1

    def module(self) -> Module:
        """norm.hip with these definitions."""
        return hip_module(
            "norm",
            "norm.hip",
            X=CPP_TYPES[self.dtype],
            W=CPP_TYPES[self.weight_dtype],
            B=CPP_TYPES[self.bias_dtype],
            P=CPP_TYPES[torch.promote_types(self.dtype, self.weight_dtype)],
            HAS_RESIDUAL=self.has_residual,
            HAS_WEIGHT=self.has_weight,
            HAS_BIAS=self.has_bias,
            LAYER_NORM=self.layer,
            ROUND_BEFORE_WEIGHT=self.round_before_weight,
            ROUND_NORM=self.round_norm,
            LATE=self.late,
            RESIDUAL_AHEAD=self.residual_ahead,
            HAS_OFFSET=self.has_offset,
            RESIDENT=self.resident,
            **self.quantisation.defines(),
            **self.layout.defines(),
        )

    def signature(self) -> KernelSignature:
        """norm_kernel's parameters."""
        return KernelSignature(
            "norm_kernel",
            (
                pointer("x", self.dtype),
                pointer("residual", self.dtype, optional=True),
                pointer("weight", self.weight_dtype, optional=True),
                pointer("bias", self.bias_dtype, optional=True),
                pointer("sum", self.dtype, optional=True),
                pointer("out", self.quantisation.out_dtype),
                pointer("scale", torch.float32, optional=True),
                i32("num_rows"),
                i32("num_inner"),
                i32("N"),
                f32("eps"),
                f32("weight_offset"),
                f32("amax_min"),
                *stride_parameters("x", "residual", "sum", "out", "scale"),
            ),
            waits=True,
        )


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm of the rows of `x` [*, N]; see the op of this name."""
    out = torch.empty_like(x, dtype=out_dtype or x.dtype)
    norm_rows(
        x,
        out,
        Quantisation("none", out.dtype),
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
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
) -> tuple[Tensor, Tensor]:
    """RMSNorm of `x + residual`, both [*, N], and the sum; see the op of this name."""
    total = torch.empty_like(x)
    out = torch.empty_like(total, dtype=out_dtype or total.dtype)
    norm_rows(
        x,
        out,
        Quantisation("none", out.dtype),
        eps=eps,
        weight=weight,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        residual=residual,
        total=total,
    )
    return out, total


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm of the rows of `x` [*, N]; see the op of this name."""
    out = torch.empty_like(x, dtype=out_dtype or x.dtype)
    quantisation = Quantisation("none", out.dtype)
    norm_rows(x, out, quantisation, eps=eps, weight=weight, bias=bias, layer=True)
    return out


def norm_rows(
    x: Tensor,
    out: Tensor,
    quantisation: Quantisation,
    *,
    eps: float,
    layer: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    scale: Tensor | None = None,
    amax_min: float = 0.0,
    round_norm: bool = False,
    layout: RowLayout | None = None,
) -> None:
    """Normalise the rows of `x` into `out`, on the way adding and quantising.

    Args:
        x: [*, N], bf16, fp16 or fp32, last stride 1.
        out: [*, N], written.
        residual, total: [*, N], dtype of x; `total` is written with the sum, and normalised.
        weight, bias: [N], contiguous.
        scale: [*, 1] or [*, N / group_size], written; [] or [1], read, where the scale is static.
        amax_min: lower bound of the largest magnitude behind a scale.
        round_norm: round the result to the dtype of x before it is quantised.
        layout: None for the default.

    Raises:
        ValueError: for shapes, strides or dtypes that the kernel does not take.
    """
    if x.numel() == 0:
        return
    facts = facts_of(x, residual, total, out, scale, weight, bias)
    has_offset = weight_offset != 0.0
    key = (layer, round_before_weight, round_norm, has_offset, quantisation, layout, facts)
    plan = _PLANS.get(key)
    if plan is None:
        given = _Tensors(x, residual, total, out, scale, weight, bias)
        style = layer, round_before_weight, round_norm, has_offset
        plan = _PLANS.keep(key, _plan(given, style, quantisation, layout))
    plan.launch(
        plan.grid,
        plan.threads,
        0,
        *(x, residual, weight, bias, total, out, scale, *plan.sizes),
        *(eps, weight_offset, amax_min, *plan.strides),
    )


class _Tensors(NamedTuple):
    x: Tensor
    residual: Tensor | None
    total: Tensor | None
    out: Tensor
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


_PLANS = Plans[LaunchPlan]()


def _plan(
    given: _Tensors,
    style: tuple[bool, bool, bool, bool],
    quantisation: Quantisation,
    layout: RowLayout | None,
) -> LaunchPlan:
    x, N, arch = given.x, given.x.shape[-1], arch_name(given.x.device)
    vectors = [tensor for tensor in given[:4] if tensor is not None]
    writes_scales = quantisation.mode in ("token", "group") and given.scale is not None
    nest = nest_of(*vectors, *([given.scale] if writes_scales else []))
    if layout is None:
        accessed = (*vectors, *(tensor for tensor in given[5:] if tensor is not None))
        strides = nest.strides[: len(vectors)]
        vec = widest_vector(N, x.element_size(), strides, accessed)
        wave, group_size = wave_size(arch), quantisation.group_size
        check_row(N, group_size, vec, wave)
        inputs, least_lanes = 1 + (given.residual is not None), max(group_size // vec, 1)
        layout = RowLayout.choose(
            nest.num_rows, N, vec, wave, least_lanes=least_lanes, whole=True, inputs=inputs
        )
    layout = layout.over(nest)
    layer, round_before_weight, round_norm, has_offset = style
    variant = NormVariant(
        layer=layer,
        dtype=x.dtype,
        weight_dtype=x.dtype if given.weight is None else given.weight.dtype,
        bias_dtype=x.dtype if given.bias is None else given.bias.dtype,
        has_residual=given.residual is not None,
        has_weight=given.weight is not None,
        has_bias=given.bias is not None,
        round_before_weight=round_before_weight and given.weight is not None,
        round_norm=round_norm and x.dtype != torch.float32,
        quantisation=quantisation,
        layout=layout,
        late=_loads_late(layer, nest.num_rows),
        has_offset=has_offset and given.weight is not None,
        residual_ahead=_is_fetched_ahead(given, nest.num_rows, arch),
        resident=_resident(given, layer, quantisation, layout, nest.num_rows),
    )
    present = (*(tensor is not None for tensor in given[:4]), writes_scales)
    return LaunchPlan(
        load_kernel(variant, arch, x.device.type).launch,
        layout.grid(nest.num_rows, N),
        layout.threads,
        (nest.num_rows, nest.inner, N),
        flat_strides(nest, present),
    )


def _is_fetched_ahead(given: _Tensors, num_rows: int, arch: str) -> bool:
    """Whether the residual, which the kernel ahead rarely wrote, may come before that one ends.

    64 x 7168 add + RMSNorm + 1x128 fp8 takes an H100 2.70 us so and 2.94 otherwise, without the
    quantisation 2.55 and 2.67.
    """
    return arch == "sm_90" and given.residual is not None and num_rows <= FEW_ROWS


def _resident(
    given: _Tensors, layer: bool, quantisation: Quantisation, layout: RowLayout, num_rows: int
) -> int:
    """Blocks that a multiprocessor is to hold; 0 leaves it to the compiler.

    With 1 it spends registers on unpacking ahead. Quantised by rows, a block waits for two
    reductions, and others must have room meanwhile. fp8 on an H200 in microseconds:

                            1      0      4      5      6      8
    RMSNorm    8192x4096   27.9   26.2   27.9   27.9   26.5   26.3
    RMSNorm    8192x5120   33.9   32.3   33.9   33.8   32.5   38.2
    RMSNorm    4096x7168   24.7   24.4   24.5   23.8
    RMSNorm   16384x8192  106.2   97.5   97.2  113.6
    RMSNorm    8192x16384 164.2  104.4  364.9
    LayerNorm  8192x4096   32.9   29.4   32.8   32.7   30.1   28.5
    LayerNorm  4096x7168   30.7   27.5   26.6   25.6
    LayerNorm  8192x8192   62.4   55.7   55.0   52.7   53.1   68.7

    What is not quantised by rows takes as long with 1, and 64 rows 1 or 2 % less.
    """
    if quantisation.mode != "token" or num_rows <= FEW_ROWS:
        return 1
    tensors = (given.x, given.weight, given.bias)
    packed = all(tensor is None or tensor.element_size() == 2 for tensor in tensors)
    fits = packed and layout.exact and layout.threads <= ROW_BLOCK
    bounded = layout.vectors == 7 or (layer and layout.vectors == 8)
    return 5 if fits and bounded else 0


def _loads_late(layer: bool, num_rows: int) -> bool:
    """Whether weight and bias cost more in registers than in waiting.

    4096 x 7168 LayerNorm + fp8 takes an H100 34.5 us late and 35.3 early, 64 rows take 3.68 and
    3.49; RMSNorm + fp8, which has no bias, takes 32.9 and 32.0.
    """
    return layer and num_rows > FEW_ROWS
