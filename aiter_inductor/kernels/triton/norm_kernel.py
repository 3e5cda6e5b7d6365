"""One kernel for every normalisation of rows, alone or with what surrounds it.

Residual addition, RMSNorm or LayerNorm, weight, bias and quantisation happen while the row lies in
registers: it is read once and written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from aiter_inductor.core.dtypes import QUANT_DTYPES, quant_max
from aiter_inductor.core.rows import row_nest
from aiter_inductor.kernels.triton.launch import launchable, single
from aiter_inductor.kernels.triton.quantise import (
    cast_to,
    clamp,
    inverse_of,
    larger,
    scale_of,
)
from aiter_inductor.kernels.triton.rows import (
    RowConfig,
    chunk_mask,
    live_rows,
    load_vector,
    row_offsets,
    strides_of,
)


@triton.jit
def load_rows(
    x_ptr,
    residual_ptr,
    sum_ptr,
    x_row,
    residual_row,
    sum_row,
    cols,
    live,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A tile of rows in float32, as a tuple of chunks [ROWS, BLOCK]; the sum where there is one."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        part = cols + c * BLOCK
        mask = chunk_mask(live, part, N, N == BLOCK * CHUNKS)
        f = tl.load(x_ptr + x_row + part, mask, 0, eviction_policy="evict_first").to(tl.float32)
        if residual_ptr is not None:
            r = tl.load(residual_ptr + residual_row + part, mask, 0, eviction_policy="evict_first")
            stored = (f + r.to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + sum_row + part, stored, mask)
            f = stored.to(tl.float32)
        chunks = chunks + (f,)
    return chunks


@triton.jit
def centre(chunks, cols, N: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Each row less its mean; 0 beyond the row's end."""
    total = chunks[0]
    for c in tl.static_range(1, CHUNKS):
        total += chunks[c]
    mean = tl.sum(total, axis=1, keep_dims=True) / N
    centred = ()
    for c in tl.static_range(CHUNKS):
        f = chunks[c] - mean
        if N != BLOCK * CHUNKS:
            f = tl.where(cols + c * BLOCK < N, f, 0.0)
        centred = centred + (f,)
    return centred


@triton.jit
def reciprocal_rms(chunks, eps, N: tl.constexpr, CHUNKS: tl.constexpr):
    """[ROWS, 1], one over the root of each row's mean square."""
    total = chunks[0] * chunks[0]
    for c in tl.static_range(1, CHUNKS):
        total += chunks[c] * chunks[c]
    return tl.rsqrt(tl.sum(total, axis=1, keep_dims=True) / N + single(eps))


@triton.jit
def weigh(y, weight, x_dtype: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """`y * (weight + OFFSET)` in float32, rounded on the way as eager PyTorch rounds."""
    if ROUND_FIRST:
        w = weight.to(tl.float32)
        if OFFSET != 0:
            w = (w + OFFSET).to(weight.dtype).to(tl.float32)
        y = y.to(x_dtype).to(tl.float32) * w
        if weight.dtype == x_dtype:
            y = y.to(x_dtype).to(tl.float32)
    else:
        y = y * (weight.to(tl.float32) + OFFSET)
    return y


@triton.jit
def store_quantised_groups(
    chunks,
    out_ptr,
    scale_ptr,
    scale_row,
    cols,
    live,
    amax_min,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    QMAX: tl.constexpr,
):
    """Quantise groups of each chunk and store them with their scales."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    for c in tl.static_range(CHUNKS):
        part = cols + c * BLOCK
        groups = tl.reshape(chunks[c].to(tl.float32), (ROWS, GROUPS, GROUP))
        amax = tl.reduce(tl.abs(groups), 2, larger, keep_dims=True)
        scale = scale_of(amax, amax_min, QMAX)
        q = tl.reshape(cast_to(groups * inverse_of(scale), out_ptr.dtype.element_ty), (ROWS, BLOCK))
        tl.store(out_ptr + part, q, chunk_mask(live, part, N, N == BLOCK * CHUNKS))
        index = tl.arange(0, GROUPS)[None, :] + c * GROUPS
        stored = chunk_mask(live, index, N // GROUP, N == BLOCK * CHUNKS)
        tl.store(scale_ptr + scale_row + index, tl.reshape(scale, (ROWS, GROUPS)), stored)


@triton.jit
def store_quantised_rows(
    chunks,
    out_ptr,
    scale_ptr,
    scale_row,
    cols,
    live,
    amax_min,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    QMAX: tl.constexpr,
):
    """Quantise whole rows and store them with their scales."""
    largest = tl.abs(chunks[0].to(tl.float32))
    for c in tl.static_range(1, CHUNKS):
        largest = larger(largest, tl.abs(chunks[c].to(tl.float32)))
    amax = tl.reduce(largest, 1, larger, keep_dims=True)
    scale = scale_of(amax, amax_min, QMAX)
    tl.store(scale_ptr + scale_row, scale, live)
    inverse = inverse_of(scale)
    for c in tl.static_range(CHUNKS):
        part = cols + c * BLOCK
        q = cast_to(chunks[c].to(tl.float32) * inverse, out_ptr.dtype.element_ty)
        tl.store(out_ptr + part, q, chunk_mask(live, part, N, N == BLOCK * CHUNKS))


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    sum_outer,
    sum_inner,
    out_outer,
    out_inner,
    scale_outer,
    scale_inner,
    eps,
    amax_min,
    N: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    ROUND_NORM: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    LATE: tl.constexpr,
):
    """NORM: rms, layer or none. QUANT: none, static, token or group. See `norm_rows`."""
    cols = tl.arange(0, BLOCK)[None, :]
    if not LATE:
        weights = load_vector(weight_ptr, cols, N, BLOCK, CHUNKS)
        biases = load_vector(bias_ptr, cols, N, BLOCK, CHUNKS)
    x_dtype = x_ptr.dtype.element_ty
    if residual_ptr is not None:
        x_dtype = sum_ptr.dtype.element_ty
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        live = live_rows(rows, num_rows, ROWS)
        x_row = row_offsets(rows, inner, x_outer, x_inner, NESTED)
        residual_row = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)
        sum_row = row_offsets(rows, inner, sum_outer, sum_inner, NESTED)
        out_row = out_ptr + row_offsets(rows, inner, out_outer, out_inner, NESTED)
        scale_row = row_offsets(rows, inner, scale_outer, scale_inner, NESTED)
        chunks = load_rows(
            x_ptr, residual_ptr, sum_ptr, x_row, residual_row, sum_row, cols, live, N, BLOCK, CHUNKS
        )
        if NORM == "layer":
            chunks = centre(chunks, cols, N, BLOCK, CHUNKS)
        if NORM != "none":
            rstd = reciprocal_rms(chunks, eps, N, CHUNKS)
        if LATE:
            weights = load_vector(weight_ptr, cols, N, BLOCK, CHUNKS)
            biases = load_vector(bias_ptr, cols, N, BLOCK, CHUNKS)
        normed = ()
        for c in tl.static_range(CHUNKS):
            y = chunks[c]
            if NORM != "none":
                y = y * rstd
            if weight_ptr is not None:
                y = weigh(y, weights[c], x_dtype, WEIGHT_OFFSET, ROUND_FIRST)
            if bias_ptr is not None:
                y = y + biases[c].to(tl.float32)
            if ROUND_NORM:
                y = y.to(x_dtype)  # until its scale is known: half the registers of float32
            normed = normed + (y,)
        if QUANT == "token":
            store_quantised_rows(
                normed, out_row, scale_ptr, scale_row, cols, live, amax_min, N, BLOCK, CHUNKS, QMAX
            )
        elif QUANT == "group":
            store_quantised_groups(
                normed,
                out_row,
                scale_ptr,
                scale_row,
                cols,
                live,
                amax_min,
                N,
                ROWS,
                BLOCK,
                CHUNKS,
                GROUP,
                QMAX,
            )
        else:
            if QUANT == "static":
                inverse = inverse_of(tl.load(scale_ptr))
            for c in tl.static_range(CHUNKS):
                part = cols + c * BLOCK
                y = normed[c].to(tl.float32)
                if QUANT == "static":
                    y = clamp(y * inverse, QMAX, QMIN)
                out = cast_to(y, out_ptr.dtype.element_ty)
                tl.store(out_row + part, out, chunk_mask(live, part, N, N == BLOCK * CHUNKS))


def norm_rows(
    x: Tensor,
    out: Tensor,
    *,
    norm: str,
    eps: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    quant: str = "none",
    scale: Tensor | None = None,
    group_size: int = 1,
    amax_min: float = 0.0,
    qmin: float | None = None,
    round_norm: bool = False,
    config: RowConfig | None = None,
) -> None:
    """Normalise the rows of `x` into `out`, on the way adding and quantising.

    Args:
        x: [*, N], last stride 1.
        out: [*, N], written.
        norm: `rms`, `layer` or `none`.
        eps, weight, bias, weight_offset, round_before_weight: of the normalisation.
        residual, total: [*, N]; `total` is written with x + residual, and normalised.
        quant: `none`; `static`, by `scale` []; `token` or `group`, which write `scale`
            [*, 1] or [*, N / group_size].
        group_size: a power of two that divides N.
        amax_min: lower bound of the largest magnitude behind a scale.
        qmin: lower bound of what a given scale makes; None for the symmetric one.
        round_norm: round to the dtype of x, or of the sum, before quantising.
        config: launch parameters; None for the default.
    """
    N = x.shape[-1]
    per_row = {"x": x, "residual": residual, "sum": total, "out": out}
    if quant in ("token", "group"):
        per_row["scale"] = scale
    present = {name: tensor for name, tensor in per_row.items() if tensor is not None}
    nest = row_nest(*present.values())
    if nest is None:
        raise ValueError(f"rows of shape {tuple(x.shape)}, strides {x.stride()} need three loops")
    strides: dict[str, Any] = dict.fromkeys(_STRIDES, 0)
    strides.update(strides_of(nest, tuple(present)))
    widest = max(tensor.element_size() for tensor in (x, out) if tensor is not None)
    limit = quant_max(out.dtype) if out.dtype in QUANT_DTYPES else 1.0
    config = config or RowConfig.default(
        N,
        widest,
        num_rows=nest.num_rows,
        group_size=group_size,
        reduces_alone=norm != "none" and residual is None,
        centres=norm == "layer",
    )
    launchable(norm_kernel)[config.grid(nest.num_rows)](
        x,
        residual,
        weight,
        bias,
        total,
        out,
        scale,
        nest.num_rows,
        nest.inner,
        **strides,
        eps=eps,
        amax_min=amax_min,
        N=N,
        NORM=norm,
        WEIGHT_OFFSET=weight_offset,
        ROUND_FIRST=round_before_weight,
        QUANT=quant,
        GROUP=group_size,
        QMIN=-limit if qmin is None else qmin,
        QMAX=limit,
        ROUND_NORM=round_norm,
        NESTED=not (isinstance(nest.inner, int) and nest.inner == 1),
        ROWS=config.rows,
        BLOCK=config.block,
        CHUNKS=config.chunks(N),
        STAGES=config.num_stages,
        LATE=config.late,
        **config.launch(),
    )


_STRIDES = tuple(
    f"{name}_{loop}"
    for name in ("x", "residual", "sum", "out", "scale")
    for loop in ("outer", "inner")
)
