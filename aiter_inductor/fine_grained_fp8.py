"""The kernels that transformers' fine-grained FP8 models lack without a download from the hub.

`FP8Linear` of transformers calls a bundle of three functions that it loads through the package
`kernels`; where that is not installed, such a model raises ImportError, eager and compiled. Here
are the three in plain PyTorch, which `backend="aiter"` recognises like any other model's, and for
calls outside of a compiled graph this package's operators. transformers has no registry for the
bundle: it is put where the loader would put it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiter_inductor.core.dtypes import FP8_DTYPES, quant_max, short_name
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_fp8_rowwise
from aiter_inductor.lowerings.quant import quant_per_group, quant_per_token
from aiter_inductor.quantization import AMAX_MIN, in_training, quantised, straight_through

_MODULE = "transformers.integrations.finegrained_fp8"
Blocks = Sequence[int] | None


def provide_fp8_kernels() -> None:
    """Let transformers' `FP8Linear` and `FP8Experts` compute with this package, from now on.

    Raises:
        ImportError: if transformers is not installed, or is a version without such a bundle.
    """
    from importlib import import_module

    module: Any = import_module(_MODULE)
    if not hasattr(module, "FineGrainedFP8") or not hasattr(module, "_FINEGRAINED_FP8"):
        raise ImportError(f"{_MODULE} of this transformers does not load a bundle of FP8 kernels")
    module._FINEGRAINED_FP8 = module.FineGrainedFP8(matmul, batched_matmul, grouped_matmul)


def provide_missing_fp8_kernels() -> None:
    """`provide_fp8_kernels`, for a program that has imported FP8 layers and cannot run them."""
    module = sys.modules.get(_MODULE)
    if not hasattr(module, "FineGrainedFP8") or getattr(module, "_FINEGRAINED_FP8", ()) is not None:
        return
    from importlib.util import find_spec

    if find_spec("kernels") is None:
        provide_fp8_kernels()


def matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    block_size: Blocks,
    output_dtype: torch.dtype | None = None,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """Quantise x and multiply it with a quantised weight.

    Args:
        x: [*, K], bfloat16, float16 or float32.
        weight: [N, K], fp8.
        weight_scale: [ceil(N / block_n), ceil(K / block_k)], or one element where `block_size` is
            None; float32, or float8_e8m0fnu, powers of two.
        block_size: `(block_n, block_k)`.
        output_dtype: x's, if None.
        activation_scale: one element, the scale of x; None computes one for each group of
            `block_k`, or for each token.

    Returns:
        [*, N], `output_dtype`. The gradient passes the quantisation of x unchanged.
    """
    _check(weight)
    out_dtype = output_dtype or x.dtype
    scale = weight_scale.to(torch.float32)
    step = block_size[1] if block_size else 0
    # A static scale meets block scales in no kernel, and groups must be whole.
    eager = activation_scale is None and not (step and x.shape[-1] % step) and not in_training(x)
    if eager and not torch.compiler.is_compiling():
        out: Tensor = _by_operators(x, weight, scale, block_size, out_dtype)
        return out
    rows = straight_through(
        x, lambda values: dequantised_rows(values, weight.dtype, step, activation_scale)
    )
    return F.linear(rows, dequantised_weight(weight, scale, block_size).to(x.dtype)).to(out_dtype)


def batched_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    block_size: Blocks,
    expert_ids: Tensor,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Row s of x [S, K] times the weight [N, K] of expert `expert_ids[s]`; the result is [S, N].

    `weight` is [num_experts, N, K]. Rows of an expert that does not exist come out as any other's.
    """
    _check(weight)
    chosen = expert_ids.clamp(max=weight.shape[0] - 1)
    scale = weight_scale.to(torch.float32)[chosen]
    rows = dequantised_rows(x, weight.dtype, block_size[1] if block_size else 0)
    columns = dequantised_weight(weight[chosen], scale, block_size).to(x.dtype)
    return torch.bmm(rows[:, None], columns.mT)[:, 0].to(output_dtype or x.dtype)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    tokens_per_expert: Tensor,
    block_size: Blocks,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of x [S, K], sorted by expert, times their experts' weights [num_experts, N, K].

    Rows of expert e end before `offsets[e]`. The result is [S, N]; rows behind the last expert's
    are not defined.
    """
    _check(weight)
    rows = dequantised_rows(x, weight.dtype, block_size[1] if block_size else 0)
    columns = dequantised_weight(weight, weight_scale.to(torch.float32), block_size).to(x.dtype)
    found = F.grouped_mm(rows, columns.mT, offs=offsets.to(torch.int32))
    return found.to(output_dtype or x.dtype)


def dequantised_rows(
    x: Tensor, dtype: torch.dtype, group_size: int, scale: Tensor | None = None
) -> Tensor:
    """x [*, K] as it is after quantisation by groups (0: by tokens), or with a given scale."""
    if scale is not None:
        limit = quant_max(dtype)
        q = (x.float() / scale).clamp(-limit, limit).to(dtype)
        return (q.float() * scale).to(x.dtype)
    if not group_size:
        return _as_quantised(x.float(), dtype).to(x.dtype)
    K = x.shape[-1]
    if left := K % group_size:
        whole = dequantised_rows(x[..., : K - left], dtype, group_size)
        return torch.cat((whole, _as_quantised(x[..., -left:].float(), dtype).to(x.dtype)), -1)
    groups = x.float().unflatten(-1, (K // group_size, group_size))
    return _as_quantised(groups, dtype).flatten(-2).to(x.dtype)


def _as_quantised(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values after quantisation with one scale for the last dimension."""
    q, scale = quantised(values, dtype, quant_max(dtype))
    return q.float() * scale


def dequantised_weight(weight: Tensor, scale: Tensor, block_size: Blocks) -> Tensor:
    """A weight [*, N, K] in float32; `scale` has one element a block, or one a matrix."""
    if not block_size:
        return weight.float() * (scale if scale.dim() < 2 else scale.reshape(-1, 1, 1))
    N, K = weight.shape[-2:]
    spread = scale.repeat_interleave(block_size[0], -2).repeat_interleave(block_size[1], -1)
    return weight.float() * spread[..., :N, :K]


def _by_operators(
    x: Tensor, weight: Tensor, scale: Tensor, block_size: Blocks, out_dtype: torch.dtype
) -> Any:
    if not block_size:
        q, x_scale = quant_per_token(x, dtype=weight.dtype, amax_min=AMAX_MIN)
        rows = scale.reshape(1).expand(weight.shape[0])
        return gemm_fp8_rowwise(q, weight, x_scale, rows, out_dtype=out_dtype)
    block_n, block_k = block_size
    q, x_scale = quant_per_group(x, dtype=weight.dtype, group_size=block_k, amax_min=AMAX_MIN)
    blocks = {"group_size": block_k, "block_n": block_n, "block_k": block_k}
    return gemm_fp8_blockscale(q, weight, x_scale, scale, **blocks, out_dtype=out_dtype)


def _check(weight: Tensor) -> None:
    if weight.dtype not in FP8_DTYPES:
        kinds = " or ".join(map(short_name, FP8_DTYPES))
        found = short_name(weight.dtype)
        raise NotImplementedError(f"the weight is {found}; the FP8 kernels here take {kinds}")
