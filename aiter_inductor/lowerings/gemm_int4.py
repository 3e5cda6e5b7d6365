"""Linear layers whose weight is stored in int4, scaled and perhaps shifted by groups along K."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype
from aiter_inductor.core.op import op
from aiter_inductor.lowerings.gemm import gradients_of_rows, linear_of, spread_last
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_providers import (
    decline_weight_only,
    dequantising_unpaid,
    triton_unsupported,
)
from aiter_inductor.lowerings.gemm_tuning import TUNINGS
from aiter_inductor.lowerings.providers import add_triton, add_vendor


def of_gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    group_size: int,
    offset_binary: bool = False,
) -> GemmProblem:
    """The problem of `gemm_w4a16`."""
    made = GemmProblem.of(
        "weight_group",
        x,
        weight,
        None,
        weight_scale,
        bias,
        group_size=group_size,
        weight_zero=weight_zero,
    )
    return replace(made, offset_binary=offset_binary)


@op(problem=of_gemm_w4a16)
def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    group_size: int,
    offset_binary: bool = False,
) -> Tensor:
    """A linear layer whose weight is stored in int4, scaled by groups of its rows.

    Args:
        x: [*, K], bfloat16, float16 or float32; K even.
        weight: [N, K / 2], uint8: codes of two elements, the even one in the low half.
        weight_scale: [N, ceil(K / group_size)], any float dtype.
        bias: [N], any float dtype, or None.
        weight_zero: as weight_scale: what a code of 0 stands for, `weight ≈ code * scale + zero`;
            None is 0. An integer zero point z is `-z * scale`.
        offset_binary: codes are stored with 8 added, 0 to 15, and not in two's complement.

    Returns:
        [*, N], x's dtype.
    """
    wide = accumulate_dtype(x.dtype)
    columns = unpacked(weight, weight_scale, weight_zero, group_size, offset_binary, wide)
    return linear_of(x.to(wide), columns, bias, None, x.dtype)


def unpacked(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    offset_binary: bool,
    dtype: torch.dtype,
) -> Tensor:
    """A weight [N, K] of `gemm_w4a16`."""
    low, high = (weight & 15).to(torch.int8), (weight >> 4).to(torch.int8)
    stored = torch.stack((low, high), -1).flatten(-2)
    moved = stored - 8 if offset_binary else torch.where(stored < 8, stored, stored - 16)
    K = stored.shape[-1]
    columns = moved.to(dtype) * spread_last(scale.to(dtype), K, group_size)
    return columns if zero is None else columns + spread_last(zero.to(dtype), K, group_size)


@gemm_w4a16.backward("weight", "weight_scale", "bias", "weight_zero")
def _(saved: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    columns = unpacked(
        saved["weight"],
        saved["weight_scale"],
        saved["weight_zero"],
        saved["group_size"],
        saved["offset_binary"],
        accumulate_dtype(grad.dtype),
    )
    return gradients_of_rows(grad, columns, saved["bias"])


gemm_w4a16.tuned(TUNINGS[gemm_w4a16.name])
add_vendor(
    gemm_w4a16,
    "gemm_weight",
    refuse=triton_unsupported,
    decline=dequantising_unpaid,
    cede=dequantising_unpaid,
    archs=("sm_90",),
)
add_triton(
    gemm_w4a16,
    "gemm_weight",
    refuse=triton_unsupported,
    decline=decline_weight_only,
    config="triton.gemm_config.GemmConfig",
)
