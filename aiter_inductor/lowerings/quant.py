"""Symmetric quantisation to fp8, int8 and int4, per tensor, per token and per group.

A scale is the dequantising factor: `x ≈ q * scale`. All formulas compute in float32. A group that
is all zero has scale 0 and, as `0 / 0`, NaN elements unless `amax_min` is positive; a NaN makes its
whole group NaN; an infinity makes its scale infinite and the rest of its group 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aiter_inductor.core.dtypes import accumulate_dtype, quant_max, short_name
from aiter_inductor.core.op import Use, op
from aiter_inductor.core.problem import fixed
from aiter_inductor.core.rows import num_loops
from aiter_inductor.lowerings.measured import cede_quant
from aiter_inductor.lowerings.providers import add_hip, add_triton
from aiter_inductor.lowerings.rows import RowProblem, rows_unsupported, with_one_scale

INT4_MAX = 7.0


def cast_to(y: Tensor, dtype: torch.dtype, qmin: float | None = None) -> Tensor:
    """`y`, already divided by its scale, rounded into the range of `dtype` from `qmin` on."""
    limit = quant_max(dtype)
    least = -limit if qmin is None else qmin
    if not dtype.is_floating_point:
        y = torch.round(y)
    return torch.clamp(y, least, limit).to(dtype)


def scale_of(amax: Tensor, limit: float, amax_min: float) -> Tensor:
    """The dequantising factor that maps `amax` to `limit`; `amax_min` keeps it from 0."""
    return (torch.clamp(amax, min=amax_min) if amax_min > 0 else amax) / limit


def of_quant_static(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype, qmin: float | None = None
) -> RowProblem:
    """The problem of a quantisation whose scale is given."""
    problem = replace(RowProblem.of("x scale", (x,), out_dtype=dtype), qmin=qmin)
    problem = with_one_scale(problem, scale, x)
    if problem.mismatch:
        return problem
    if qmin is not None and not (dtype == torch.int8 and qmin in range(-128, 1)):
        return replace(problem, mismatch=f"qmin={qmin:g} is no lower bound of {short_name(dtype)}")
    return problem


def of_quant_rows(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0, group_size: int | None = None
) -> RowProblem:
    """The problem of a quantisation with one scale a row, or one for each of its groups."""
    return RowProblem.of("x", (x,), out_dtype=dtype, group_size=group_size, scales=True)


def of_quant_tensor(x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0) -> RowProblem:
    """The problem of a quantisation with one scale for all."""
    return RowProblem.of("x", (x,), out_dtype=dtype)


def of_quant_int4(x: Tensor, *, group_size: int, amax_min: float = 0.0) -> RowProblem:
    """The problem of a quantisation to packed int4."""
    made = RowProblem.of("x", (x,), out_dtype=torch.uint8, group_size=group_size, scales=True)
    if made.mismatch or fixed(made.N) is None or made.N % group_size:
        return made
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    return replace(made, levels=num_loops(groups, row_major_output=True))


@op(problem=of_quant_static)
def quant_static(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype, qmin: float | None = None
) -> Tensor:
    """Quantise with a scale that is known beforehand.

    Args:
        x: [*, N], any float dtype.
        scale: [] or [1], fp32.
        dtype: float8_e4m3fn, float8_e4m3fnuz or int8.
        qmin: lower bound for int8, -128 in torch.ao's default; None for the symmetric -127.

    Returns:
        [*, N], `dtype`.
    """
    return cast_to(x.to(accumulate_dtype(x.dtype)) / scale, dtype, qmin)


@op(problem=of_quant_tensor)
def quant_per_tensor(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Quantise with one scale, from the largest magnitude in `x`.

    Args:
        x: [*, N], any float dtype, at least one element.
        dtype: as in `quant_static`.
        amax_min: lower bound of the largest magnitude.

    Returns:
        q: [*, N], `dtype`.
        scale: [], fp32.
    """
    f = x.to(accumulate_dtype(x.dtype))
    scale = scale_of(f.abs().amax(), quant_max(dtype), amax_min).to(torch.float32)
    return cast_to(f / scale, dtype), scale


@op(problem=of_quant_rows)
def quant_per_token(
    x: Tensor, *, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Quantise each row with its own scale.

    Args:
        x: [*, N], any float dtype.
        dtype, amax_min: as in `quant_per_tensor`.

    Returns:
        q: [*, N], `dtype`.
        scale: [*, 1], fp32.
    """
    f = x.to(accumulate_dtype(x.dtype))
    amax = f.abs().amax(-1, keepdim=True)
    scale = scale_of(amax, quant_max(dtype), amax_min).to(torch.float32)
    return cast_to(f / scale, dtype), scale


@op(problem=of_quant_rows)
def quant_per_group(
    x: Tensor, *, group_size: int, dtype: torch.dtype, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Quantise each group of `group_size` consecutive elements of a row with its own scale.

    Args:
        x: [*, N], any float dtype, N a multiple of `group_size`.
        dtype, amax_min: as in `quant_per_tensor`.

    Returns:
        q: [*, N], `dtype`.
        scale: [*, N / group_size], fp32.
    """
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    q, scale = quant_per_token.reference(groups, dtype=dtype, amax_min=amax_min)
    return q.flatten(-2), scale.squeeze(-1)


def quantised_rows(
    y: Tensor, *, dtype: torch.dtype, group_size: int | None, amax_min: float
) -> tuple[Tensor, Tensor]:
    """What fused ops end in: `quant_per_group`, or `quant_per_token` without a group size."""
    if group_size is None:
        q, scale = quant_per_token.reference(y, dtype=dtype, amax_min=amax_min)
    else:
        q, scale = quant_per_group.reference(
            y, group_size=group_size, dtype=dtype, amax_min=amax_min
        )
    return q, scale


@op(problem=of_quant_int4)
def quant_int4_per_group(
    x: Tensor, *, group_size: int, amax_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Quantise groups to int4 in [-8, 7], two elements a byte, the even one in the low nibble.

    Args:
        x: [*, N], any float dtype, N a multiple of `group_size`, which is even.
        amax_min: as in `quant_per_tensor`.

    Returns:
        packed: [*, N / 2], uint8; nibbles are two's complement.
        scale: [*, N / group_size], fp32.
    """
    f = x.to(accumulate_dtype(x.dtype))
    groups = f.unflatten(-1, (x.shape[-1] // group_size, group_size))
    scale = scale_of(groups.abs().amax(-1, keepdim=True), INT4_MAX, amax_min).to(torch.float32)
    q = torch.clamp(torch.round(groups / scale), -8, 7).to(torch.int8).flatten(-2)
    pairs = q.unflatten(-1, (q.shape[-1] // 2, 2)).to(torch.uint8)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4), scale.squeeze(-1)


def int4_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What the int4 kernel does not take."""
    if problem.group_size is not None and problem.group_size % 2:
        return f"group_size={problem.group_size} is odd; a byte holds two elements of one group"
    return rows_unsupported(problem, use)


def per_tensor_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What the per-tensor kernels do not take: nothing has no largest magnitude."""
    if problem.num_rows == 0:
        return "x has no elements and so no largest magnitude"
    return rows_unsupported(problem, use)


def hip_static_unsupported(problem: RowProblem, use: Use) -> str | None:
    """What the HIP kernel for a given scale does not take."""
    if problem.qmin not in (None, -quant_max(problem.out_dtype)):
        return f"clamps to ±127; the program's lower bound is {problem.qmin:g}"
    return rows_unsupported(problem, use)


add_triton(quant_static, "quant", refuse=rows_unsupported)
add_hip(quant_static, "quant", refuse=hip_static_unsupported)
for made in (quant_per_token, quant_per_group):
    add_triton(made, "quant", refuse=rows_unsupported, cede=cede_quant)
    add_hip(made, "quant", refuse=rows_unsupported)
add_triton(quant_per_tensor, "quant", refuse=per_tensor_unsupported)
add_hip(quant_per_tensor, "quant", refuse=per_tensor_unsupported)
add_triton(quant_int4_per_group, "quant", refuse=int4_unsupported)
