"""Linear layers whose weight is one of torchao's quantised tensors: float8, int8 and int4.

Dynamo's graph holds `F.linear` on the tensor subclass; what torchao computes appears only when AOT
takes it apart, in one form on a CPU and others on each chip. So the subclass is read here: its
inner tensors become the op's arguments, its attributes say how activations are quantised. They are
quantised by torchao's own formula (torchao 0.18), whose scales are rounded to x's dtype and whose
int8 divides by 127.5: Inductor makes one kernel of it, with what feeds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from aiter_inductor.core.dtypes import FP8_DTYPES, short_name
from aiter_inductor.core.expected_quant import torchao_weight
from aiter_inductor.core.graph import arg, dtype, dtype_name, size, sizes, tensor
from aiter_inductor.core.match import Derived, Match, Miss, Output, recogniser
from aiter_inductor.core.op import Op
from aiter_inductor.core.problem import Dim, fixed
from aiter_inductor.lowerings.gemm import (
    gemm_fp8_blockscale,
    gemm_fp8_per_tensor,
    gemm_fp8_rowwise,
    gemm_int8,
    gemm_w8a16,
)
from aiter_inductor.lowerings.gemm_int4 import gemm_w4a16
from aiter_inductor.lowerings.gemm_tile_packed import gemm_w4a16_tile_packed, tile_n_here
from aiter_inductor.patterns.raising.gemm import PATTERN, every_token

BLOCK = 128
INT8_STEPS = 127.5
"""Half of the steps from -128 to 127, by which torchao divides the largest magnitude."""


@recogniser(PATTERN, "linear")
def torchao_linear(node: fx.Node) -> Match | Miss | None:
    """`F.linear` on one of torchao's tensors; see `_READERS`."""
    held = torchao_weight(node)
    if held is None:
        return None
    found = tensor(node)
    if torch.is_grad_enabled() and found is not None and found.requires_grad:
        return Miss(PATTERN, node, "gradients flow through what torchao quantises for inference")
    made = _READERS.get(type(held).__name__, _not_read)(node, held)
    if isinstance(made, str):
        return Miss(PATTERN, node, made)
    op, args, kwargs = made
    args = (
        (*args[:3], arg(node, "bias"), *args[3:])
        if op is gemm_w4a16
        else (*args, arg(node, "bias"))
    )
    if op in (gemm_w8a16, gemm_w4a16, gemm_w4a16_tile_packed) and dtype(args[0]) != dtype(node):
        shown = f"x is {dtype_name(args[0])} and the result {dtype_name(node)}"
        return Miss(PATTERN, node, f"{shown}; kernels keep x's dtype")
    return Match(op.name, op, args, kwargs, (Output(node),), frozenset({node}))


Made = tuple[Op, tuple[Any, ...], dict[str, Any]]


def _float8(node: fx.Node, held: Any) -> Made | str:
    """A Float8Tensor: `qdata` [N, K] and a `scale` for each block of `block_size`."""
    weight, x = arg(node, "weight"), arg(node, "input")
    inner = [Derived(getattr, (weight, name)) for name in ("qdata", "scale")]
    if held.qdata.dtype not in FP8_DTYPES:
        return f"the weight is {short_name(held.qdata.dtype)}; kernels read float8_e4m3"
    scaling = _granularity(held.block_size, sizes(weight) or ())
    if scaling is None:
        return f"the weight has a scale for each {_shown(held.block_size)}"
    given = held.act_quant_kwargs
    if given is None:
        return _weight_only(x, weight, inner[0], inner[1], scaling)
    if given.float8_dtype != held.qdata.dtype:
        found = short_name(given.float8_dtype)
        return f"x becomes {found} and the weight is {short_name(held.qdata.dtype)}"
    group = _group_of(given.granularity, size(weight, -1))
    pair = {
        ("row", "row"): gemm_fp8_rowwise,
        ("tensor", "tensor"): gemm_fp8_per_tensor,
        ("block", "block"): gemm_fp8_blockscale,
    }.get((group[0], scaling))
    if pair is None:
        return f"x is scaled by {group[0]} and the weight by {scaling}; no kernel mixes them"
    bounds = given.hp_value_lb, given.hp_value_ub
    scale = Derived(float8_scale, (x, given.float8_dtype, group[1], *bounds))
    q = Derived(float8_values, (x, scale, given.float8_dtype))
    return pair, (q, inner[0], scale, inner[1]), {"out_dtype": dtype(x)}


def _int8(node: fx.Node, held: Any) -> Made | str:
    """An Int8Tensor: `qdata` [N, K] and a `scale` a row or one; its zero point is not read."""
    weight, x = arg(node, "weight"), arg(node, "input")
    q_weight = Derived(getattr, (weight, "qdata"))
    by_row = Derived(int8_rows, (Derived(getattr, (weight, "scale")), weight))
    scaling = _granularity(held.block_size, sizes(weight) or ())
    if scaling not in ("row", "tensor"):
        return f"the weight has a scale and a zero point for each {_shown(held.block_size)}"
    if held.act_pre_scale is not None:
        return "x is multiplied by act_pre_scale before it is quantised"
    given = held.act_quant_kwargs
    if given is None:
        return gemm_w8a16, (x, q_weight, by_row), {}
    if held.act_quant_scale is not None:
        return "x is quantised by a scale found in calibration; kernels find one a token"
    if given.mapping_type.name != "SYMMETRIC":
        return "x has a zero point; kernels take symmetric activations"
    group = _group_of(given.granularity, size(weight, -1))
    if group[0] not in ("row", "tensor"):
        return f"x is scaled by {group[0]}; kernels of int8 scale tokens"
    halve = 2 if given.reduce_range else 1
    scale = Derived(int8_scale, (x, group[1], halve))
    q = Derived(int8_values, (x, scale, halve))
    by_token = scale if group[0] == "row" else Derived(every_token, (scale, q))
    return gemm_int8, (q, q_weight, by_token, by_row), {"out_dtype": dtype(x)}


def _int4(node: fx.Node, held: Any) -> Made | str:
    """An Int4Tensor: `qdata` [N, K / 2] in two's complement, scales and zeros [K / group, N].

    The zero is what a code of 0 stands for (mslk's `int4_row_quantize_zp`).
    """
    weight, x = arg(node, "weight"), arg(node, "input")
    if held.activation_dtype != torch.bfloat16:
        return f"x becomes {short_name(held.activation_dtype)}; kernels of int4 take it as it is"
    if reason := _unusual_int4(held):
        return reason
    q = Derived(int4_bytes, (Derived(getattr, (weight, "qdata")),))
    scale, zero = (
        Derived(int4_scales, (Derived(getattr, (weight, name)),))
        for name in ("scale", "zero_point")
    )
    return gemm_w4a16, (x, q, scale, zero), {"group_size": held.block_size[-1]}


def _int4_tiles(node: fx.Node, held: Any) -> Made | str:
    """An Int4TilePackedTo4dTensor: words in the order of the chip's tiles, scales with zeros."""
    weight, x = arg(node, "weight"), arg(node, "input")
    if reason := _unusual_int4(held):
        return reason
    if dtype(x) != torch.bfloat16:
        return f"x is {dtype_name(x)}, which torchao rounds to bfloat16 first"
    inner = [Derived(getattr, (weight, name)) for name in ("qdata", "scale_and_zero")]
    sizes_of = {
        "group_size": held.block_size[-1],
        "out_features": held.shape[0],
        "tile_n": tile_n_here(),
    }
    return gemm_w4a16_tile_packed, (x, *inner), sizes_of


def _unusual_int4(held: Any) -> str | None:
    if held.act_pre_scale is not None:
        return "x is multiplied by act_pre_scale before the product"
    if len(held.block_size) != 2 or held.block_size[0] != 1:
        return f"the weight has a scale and a zero point for each {_shown(held.block_size)}"
    return None


def _weight_only(x: Any, weight: Any, q: Derived, scale: Derived, scaling: str) -> Made:
    if scaling == "block":
        return gemm_w8a16, (x, q, scale), {"block_n": BLOCK, "block_k": BLOCK}
    return gemm_w8a16, (x, q, Derived(int8_rows, (scale, weight))), {}


def _granularity(block_size: Any, shape: tuple[Dim, ...]) -> str | None:
    """What `block_size` of a weight of this shape is called in a GemmProblem."""
    known = {(1, shape[1]): "row", shape: "tensor", (BLOCK, BLOCK): "block"}
    return known.get(tuple(block_size or ()))


def _group_of(granularity: Any, K: Dim) -> tuple[str, int]:
    """`(scaling, elements of a row that share a scale)`; 0 for one scale for all."""
    name = type(granularity).__name__
    if name == "PerTensor":
        return "tensor", 0
    whole = fixed(K) or 0
    if name == "PerRow" and getattr(granularity, "dim", -1) == -1 and whole:
        return "row", whole
    if name == "PerBlock" and tuple(granularity.block_size) == (1, BLOCK) and whole % BLOCK == 0:
        return "block", BLOCK
    return str(granularity), 0


def float8_scale(
    x: Tensor, dtype: torch.dtype, group_size: int, low: float | None, high: float | None
) -> Tensor:
    """The scales of x [*, K]: [*, K / group_size], or [1] for a group size of 0, fp32."""
    groups = x.unflatten(-1, (-1, group_size)) if group_size else x.reshape(1, -1)
    largest = groups.abs().amax(-1)
    if low is not None or high is not None:
        largest = largest.clamp(low, high)
    return torch.div(largest, torch.finfo(dtype).max).float()


def float8_values(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [*, K] over its scales."""
    limit = torch.finfo(dtype).max
    groups = x.unflatten(-1, (scale.shape[-1], -1)).float()
    return torch.div(groups, scale.unsqueeze(-1)).clamp(-limit, limit).to(dtype).flatten(-2)


def int8_scale(x: Tensor, group_size: int, halve: int) -> Tensor:
    """The scales of x [*, K]: [*, 1], or [] for a group size of 0, fp32."""
    largest = x.abs().amax(-1, keepdim=True) if group_size else x.abs().amax()
    steps = INT8_STEPS if halve == 1 else 63.5
    return torch.div(largest, steps).clamp(min=torch.finfo(torch.float32).eps).float()


def int8_values(x: Tensor, scale: Tensor, halve: int) -> Tensor:
    """x over its scales, rounded to even."""
    codes = torch.round(x * torch.reciprocal(scale))
    return codes.clamp(-128 // halve, 127 // halve).to(torch.int8)


def int8_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """The scale of a weight [N, K], one a row or one for all, as [N] in fp32."""
    return scale.flatten().float().expand(weight.shape[0])


def int4_scales(scale: Tensor) -> Tensor:
    """[K / group_size, N], as CUTLASS reads them, seen as the op takes them."""
    return scale.t()


def int4_bytes(codes: Tensor) -> Tensor:
    """Bytes of two elements each, without a sign of their own."""
    return codes.view(torch.uint8)


def _not_read(node: fx.Node, held: Any) -> str:
    name = type(held).__name__
    if hasattr(held, "zero_point"):
        return f"{name} has a zero point for each group; kernels take symmetric weights"
    return f"{name} is stored as only torchao's own kernel reads it"


def _shown(block_size: Any) -> str:
    return " x ".join(map(str, block_size or ("?",)))


_READERS: dict[str, Callable[[fx.Node, Any], Made | str]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4_tiles,
}
