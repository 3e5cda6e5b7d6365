"""Matrix products with one-byte weights on the CPU; the Python side of gemm.cpp."""

from __future__ import annotations

import ctypes
from functools import cache
from math import gcd

import torch
from torch import Tensor

from aiter_inductor.kernels.cpp.loading import cpu_features, load_library

_POINTERS = ("x", "weight", "x_scale", "weight_scale", "bias", "table", "out")
_STRIDES = ("x_stride", "weight_stride", "x_scale_stride", "weight_scale_stride")
_SIZES = ("M", "N", "K", *_STRIDES, "x_group", "block_n", "block_k", "step", "threads")
_EXACT_IN_BF16 = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)


class _Gemm(ctypes.Structure):
    """`struct Gemm` of gemm.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


def gemm_fp8_blockscale(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, both fp8; see the op of this name."""
    out = scaled_gemm(
        x, weight, x_scale, weight_scale, bias, x_group=group_size, block_n=block_n, block_k=block_k
    )
    return out.to(out_dtype)


def gemm_fp8_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each row; see the op of this name."""
    of_weight = weight_scale.reshape(-1, 1)
    return scaled_gemm(x, weight, x_scale, of_weight, bias, block_n=1).to(out_dtype)


def gemm_fp8_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x` [*, K] times `weight` [N, K] transposed, a scale each; see the op of this name."""
    scale = (x_scale.reshape(()) * weight_scale.reshape(())).reshape(1, 1)
    return scaled_gemm(x, weight, None, scale, bias, block_n=weight.shape[0]).to(out_dtype)


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    """`x` [*, K], not quantised, times `weight` [N, K] transposed; see the op of this name.

    `weight_scale` is [N], or [N / block_n, K / block_k] rounded up.
    """
    if weight_scale.ndim < 2:
        of_rows = weight_scale.reshape(-1, 1)
        return scaled_gemm(x, weight, None, of_rows, bias, block_n=1).to(x.dtype)
    out = scaled_gemm(x, weight, None, weight_scale, bias, block_n=block_n, block_k=block_k)
    return out.to(x.dtype)


def scaled_gemm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    block_n: int,
    x_group: int | None = None,
    block_k: int | None = None,
) -> Tensor:
    """Sum over blocks of K of `(x · weight) * x_scale * weight_scale`, plus `bias`.

    Args:
        x: [*, K], fp8, int8, bf16, fp16 or fp32.
        weight: [N, K], fp8 or int8.
        x_scale: [*, K / x_group] rounded up, fp32; None for 1.
        weight_scale: [N / block_n, K / block_k] rounded up, fp32.
        bias: [N], any float dtype.
        block_n: rows of `weight` that share a scale.
        x_group, block_k: elements of K that share a scale; None for all.

    Returns:
        [*, N], fp32.

    Raises:
        BuildError: if gemm.cpp cannot be built.
        MemoryError: if there is no memory for a copy of `x`.
    """
    N, K = weight.shape
    out = x.new_empty((*x.shape[:-1], N), dtype=torch.float32)
    if out.numel() == 0 or K == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    exact = x.dtype in _EXACT_IN_BF16 and "avx512_bf16" in cpu_features()
    rows = _rows(x.to(torch.bfloat16 if exact else torch.float32))
    of_x = None if x_scale is None else _rows(x_scale.to(torch.float32))
    of_weight, weight = _rows(weight_scale.to(torch.float32)), _rows(weight)
    added = None if bias is None else bias.to(torch.float32).contiguous()
    x_group, block_k = min(x_group or K, K), min(block_k or K, K)
    sizes = {
        "M": rows.shape[0],
        "N": N,
        "K": K,
        "x_stride": rows.stride(0),
        "weight_stride": weight.stride(0),
        "x_scale_stride": 0 if of_x is None else of_x.stride(0),
        "weight_scale_stride": of_weight.stride(0),
        "x_group": x_group,
        "block_n": block_n,
        "block_k": block_k,
        "step": _step(x_group, block_k, K),
        "threads": torch.get_num_threads(),
    }
    tensors = (rows, weight, of_x, of_weight, added, _values(weight.dtype), out)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    _launch(_Gemm(*addresses, *(sizes[name] for name in _SIZES)), exact)
    return out


def _launch(problem: _Gemm, bf16: bool) -> None:
    library = load_library("gemm", "gemm.cpp", cpu_features())
    run = library.gemm_bf16 if bf16 else library.gemm_fp32
    if run(ctypes.byref(problem)):
        raise MemoryError(f"no memory for a copy of x, {problem.M} rows of {problem.K} elements")


def _rows(tensor: Tensor) -> Tensor:
    """[*, K] as [M, K] with contiguous rows, copied only if it must be."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.shape[-1] <= 1 or flat.stride(-1) == 1 else flat.contiguous()


def _step(x_group: int, block_k: int, K: int) -> int:
    """Elements of K after which a scale may change."""
    if x_group >= K or block_k >= K:
        return min(x_group, block_k)
    return gcd(x_group, block_k)


@cache
def _values(dtype: torch.dtype) -> Tensor:
    """[256], fp32: what each byte of a weight stands for."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()
