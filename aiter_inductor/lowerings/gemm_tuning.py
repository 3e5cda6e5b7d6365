"""What the tables of the quantised linear layers are keyed by, read from a call's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.core.tuning import Key, Tuning
from aiter_inductor.lowerings.gemm_problem import GemmProblem

KEY = (
    "N",
    "K",
    "dtype",
    "weight_dtype",
    "out_dtype",
    "scaling",
    "group_size",
    "block_n",
    "block_k",
)
BF16 = torch.bfloat16
Call = tuple[torch.device, Any, Key]


def of_blockscale(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = BF16,
) -> Call:
    """Of a call of `gemm_fp8_blockscale`."""
    N, K = weight.shape
    blocks = group_size, block_n, block_k
    return (
        x.device,
        x.numel() // (K or 1),
        (N, K, x.dtype, weight.dtype, out_dtype, "block", *blocks),
    )


def of_rowwise(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = BF16,
) -> Call:
    """Of a call of `gemm_fp8_rowwise` or `gemm_int8`."""
    N, K = weight.shape
    return x.device, x.numel() // (K or 1), (N, K, x.dtype, weight.dtype, out_dtype, "row", 0, 0, 0)


def of_per_tensor(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = BF16,
) -> Call:
    """Of a call of `gemm_fp8_per_tensor`."""
    N, K = weight.shape
    return (
        x.device,
        x.numel() // (K or 1),
        (N, K, x.dtype, weight.dtype, out_dtype, "tensor", 0, 0, 0),
    )


def of_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int = 128,
    block_k: int = 128,
) -> Call:
    """Of a call of `gemm_w8a16`."""
    N, K = weight.shape
    kind: Key = ("weight_block", 0, block_n, block_k)
    if weight_scale.dim() == 1:
        kind = ("weight_row", 0, 0, 0)
    return x.device, x.numel() // (K or 1), (N, K, x.dtype, weight.dtype, x.dtype, *kind)


def of_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    group_size: int,
    offset_binary: bool = False,
) -> Call:
    """Of a call of `gemm_w4a16`."""
    N, packed = weight.shape
    K = 2 * packed
    key = (N, K, x.dtype, weight.dtype, x.dtype, "weight_group", group_size, 0, 0)
    return x.device, x.numel() // (K or 1), key


_OF_CALL: dict[str, Callable[..., Call]] = {
    "gemm_fp8_blockscale": of_blockscale,
    "gemm_fp8_rowwise": of_rowwise,
    "gemm_fp8_per_tensor": of_per_tensor,
    "gemm_int8": of_rowwise,
    "gemm_w8a16": of_w8a16,
    "gemm_w4a16": of_w4a16,
}
TUNINGS = {name: Tuning("M", KEY, GemmProblem, of_call) for name, of_call in _OF_CALL.items()}
