"""Gradients of the normalisations: the input's in one pass, the weight's by partial sums.

Each program walks over rows and keeps its share of the weight's gradient in registers; the shares
are added afterwards, in a fixed order, so that the same input gives the same gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiter_inductor.core.rows import row_nest
from aiter_inductor.kernels.triton.launch import launchable, single
from aiter_inductor.kernels.triton.rows import RowConfig, row_offsets, strides_of


@triton.jit
def norm_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    inner,
    grad_outer,
    grad_inner,
    grad_sum_outer,
    grad_sum_inner,
    x_outer,
    x_inner,
    dx_outer,
    dx_inner,
    eps,
    N: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NORM: rms or layer. Writes dx and, where wanted, this program's row of the partial sums."""
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < N
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + cols, inside, 0).to(tl.float32) + WEIGHT_OFFSET
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (rows < num_rows) & inside
        x_at = x_ptr + row_offsets(rows, inner, x_outer, x_inner, NESTED) + cols
        grad_at = grad_ptr + row_offsets(rows, inner, grad_outer, grad_inner, NESTED) + cols
        y = tl.load(x_at, mask, 0).to(tl.float32)
        g = tl.load(grad_at, mask, 0).to(tl.float32)
        if NORM == "layer":
            y = tl.where(mask, y - tl.sum(y, axis=1, keep_dims=True) / N, 0.0)
        rstd = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / N + single(eps))
        y = tl.where(mask, y * rstd, 0.0)
        dy = g
        if weight_ptr is not None:
            dy = g * w
        dx = dy - y * (tl.sum(dy * y, axis=1, keep_dims=True) / N)
        if NORM == "layer":
            dx = dx - tl.sum(dy, axis=1, keep_dims=True) / N
        dx = dx * rstd
        if grad_sum_ptr is not None:
            sum_row = row_offsets(rows, inner, grad_sum_outer, grad_sum_inner, NESTED)
            dx += tl.load(grad_sum_ptr + sum_row + cols, mask, 0).to(tl.float32)
        dx_row = row_offsets(rows, inner, dx_outer, dx_inner, NESTED)
        tl.store(dx_ptr + dx_row + cols, dx.to(dx_ptr.dtype.element_ty), mask)
        if dweight_ptr is not None:
            if ROUND_FIRST:
                y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
            dweight += g * y
        if dbias_ptr is not None:
            dbias += g
    share = tl.program_id(0) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + share, tl.sum(dweight, axis=0, keep_dims=True), inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + share, tl.sum(dbias, axis=0, keep_dims=True), inside)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for rows [*, N]; see the op of this name."""
    dx, dweight, _ = _backward(
        grad, None, x, weight, eps, "rms", weight_offset, round_before_weight, config=config
    )
    return dx, dweight


def add_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_rms_norm` for rows [*, N]; see the op of this name."""
    dx, dweight, _ = _backward(
        grad, grad_sum, x, weight, eps, "rms", weight_offset, round_before_weight, config=config
    )
    return dx, dweight


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    has_bias: bool = True,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` for rows [*, N]; see the op of this name."""
    return _backward(grad, None, x, weight, eps, "layer", has_bias=has_bias, config=config)


def backward_config(N: int) -> RowConfig:
    """Untuned choice; two programs a multiprocessor keep the partial sums short."""
    whole = triton.next_power_of_2(N)
    rows = max(1024 // whole, 1)
    return RowConfig(whole, rows, num_warps=min(max(rows * whole // 512, 4), 16))


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: str,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    *,
    has_bias: bool = False,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    N = x.shape[-1]
    config = config or backward_config(N)
    programs = config.programs or 2 * _num_multiprocessors(x.device)
    dx = torch.empty_like(x)
    shares = (programs, N)
    dweight = None if weight is None else x.new_empty(shares, dtype=torch.float32)
    dbias = x.new_empty(shares, dtype=torch.float32) if has_bias else None
    per_row = {"grad": grad, "grad_sum": grad_sum, "x": x, "dx": dx}
    present = {name: tensor for name, tensor in per_row.items() if tensor is not None}
    nest = row_nest(*present.values())
    if nest is None:
        raise ValueError(f"rows of shape {tuple(x.shape)}, strides {x.stride()} need three loops")
    strides: dict[str, Any] = {"grad_sum_outer": 0, "grad_sum_inner": 0}
    strides.update(strides_of(nest, tuple(present)))
    launchable(norm_backward_kernel)[(programs,)](
        grad,
        grad_sum,
        x,
        weight,
        dx,
        dweight,
        dbias,
        nest.num_rows,
        nest.inner,
        **strides,
        eps=eps,
        N=N,
        NORM=norm,
        WEIGHT_OFFSET=weight_offset,
        ROUND_FIRST=round_before_weight,
        NESTED=not (isinstance(nest.inner, int) and nest.inner == 1),
        ROWS=config.rows,
        BLOCK=config.block,
        **config.launch(),
    )
    dtype = x.dtype if weight is None else weight.dtype
    return dx, _total(dweight, x, dtype), _total(dbias, x, dtype)


def _total(shares: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(0) if shares is None else shares.sum(0).to(dtype)


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
