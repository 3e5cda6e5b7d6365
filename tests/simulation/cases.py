"""What every kernel is asked to compute in the simulator, whatever language it is written in.

An op with kernels needs two sizes at least, one of them ragged; its styles reach the other branches
of its kernels. `test_coverage.py` fails for an op, or a kernel, that no case reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aiter_inductor.cli.cases import (
    ATTENTION_DIMS,
    FAMILIES,
    GROUP_DIMS,
    KV_DIMS,
    MLA_DIMS,
    MLA_PAGED_DIMS,
    NORM_DIMS,
    PAGED_DIMS,
    QUANT_DIMS,
    ROPE_CACHE_DIMS,
    ROPE_DIMS,
    ROPE_KV_DIMS,
    ROUTE_DIMS,
    SORT_DIMS,
    case_of,
    load_ops,
)
from aiter_inductor.cli.cases_gemm import GEMM_DIMS
from aiter_inductor.core.problem import Problem

Dims = Mapping[str, int]
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
INT8, BF16, FP16, FP32 = torch.int8, torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Style:
    """A departure from an op's plainest call.

    Attributes:
        name: shown in the test's name.
        fields: entries of the op's problem, such as dtypes, that are replaced before inputs are
            drawn.
        keywords: keyword arguments of the op that are replaced.
        without: positional arguments that are None.
        dtype: of all tensors that are bfloat16 in the plain call.
        permuted: rows are laid out [A, B, N] with the first two swapped in memory.
        special: x holds a NaN, infinities and a row of zeros.
        languages: whose kernels take it, of those that the op has kernels in.
    """

    name: str = "plain"
    fields: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    dtype: torch.dtype = BF16
    permuted: bool = False
    special: bool = False
    languages: tuple[str, ...] = ("triton", "hip")


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    dims: Dims
    style: Style

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.dims.values())
        return f"{self.op}-{sizes}-{self.style.name}"

    @property
    def ragged(self) -> bool:
        """Whether the longest dimension and the number of rows are no powers of two."""
        names = ("num_rows", "N") if "N" in self.dims else ("num_tokens", "head_dim")
        if "kv_len" in self.dims:
            names = ("num_heads", "kv_len")
        if "num_experts" in self.dims:
            names = ("num_tokens", "num_experts")
        if "max_pages" in self.dims:
            names = ("num_seqs", "head_dim" if "head_dim" in self.dims else "kv_lora_rank")
        return all(self.dims[name] & (self.dims[name] - 1) for name in names)

    def arguments(self, arch: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random `(args, kwargs)` for the op, with the fp8 flavour of `arch`."""
        problem = case_of(self.op, self.dims, FP8[arch]).problem
        args, kwargs = replace(problem, **self.style.fields).sample(seed=0, device="cpu")
        names = positional(self.op)
        given = [None if n in self.style.without else a for n, a in zip(names, args, strict=True)]
        if self.style.special:
            spoil(given[0])
        if self.style.permuted:
            given = [permuted(a) for a in given]
        kwargs = {**kwargs, **self.style.keywords}
        if kwargs.get("out_dtype") == BF16:
            kwargs["out_dtype"] = self.style.dtype
        return tuple(as_dtype(a, self.style.dtype) for a in given), kwargs

    def problem(self, arch: str) -> Problem:
        """What a provider is asked about."""
        args, kwargs = self.arguments(arch)
        return load_ops()[self.op].problem(*args, **kwargs)


def positional(op: str) -> list[str]:
    """Names of the op's positional parameters."""
    parameters = load_ops()[op].signature.parameters.values()
    return [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A bfloat16 tensor as `dtype`, its strides kept; others unchanged."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == BF16 else value


def permuted(value: Any) -> Any:
    """Rows [R, N] as [R / 2, 2, N] in the memory order of [2, R / 2, N]; others unchanged."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return value
    return value.reshape(2, -1, value.shape[-1]).transpose(0, 1)


def spoil(x: Tensor) -> None:
    """Plant a NaN, infinities of both signs and a row of zeros into x [5 or more, N]."""
    x[0, 5], x[1, 7], x[2, 2], x[2, 9] = torch.nan, torch.inf, -torch.inf, torch.inf
    x[3] = 0


SIZES: Mapping[frozenset[str], tuple[Dims, ...]] = {
    frozenset(NORM_DIMS): (
        {"num_rows": 8, "N": 1024},
        {"num_rows": 5, "N": 192},
        {"num_rows": 3, "N": 77},
        {"num_rows": 3, "N": 2304},
    ),
    frozenset(QUANT_DIMS): (
        {"num_rows": 8, "N": 1024, "group_size": 128},
        {"num_rows": 5, "N": 192, "group_size": 32},
        {"num_rows": 5, "N": 192, "group_size": 0},
        {"num_rows": 3, "N": 2304, "group_size": 0},
        {"num_rows": 3, "N": 2304, "group_size": 128},
    ),
    frozenset(GEMM_DIMS): (
        {"num_rows": 3, "N": 130, "K": 1024},
        {"num_rows": 150, "N": 200, "K": 328},
    ),
    frozenset(ROPE_DIMS): (
        {"batch": 2, "num_tokens": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
        {"batch": 2, "num_tokens": 5, "num_heads": 3, "num_kv_heads": 1, "head_dim": 80},
    ),
    frozenset(ATTENTION_DIMS): (
        {
            "batch": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "num_tokens": 64,
            "head_dim": 64,
            "v_dim": 64,
        },
        {
            "batch": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "num_tokens": 37,
            "head_dim": 80,
            "v_dim": 24,
        },
    ),
    frozenset(MLA_DIMS): (
        dict(zip(MLA_DIMS, (1, 16, 1, 64, 256, 16), strict=True)),
        dict(zip(MLA_DIMS, (2, 5, 2, 41, 96, 16), strict=True)),
        dict(zip(MLA_DIMS, (1, 3, 1, 77, 128, 8), strict=True)),
    ),
    frozenset(MLA_PAGED_DIMS): (
        dict(zip(MLA_PAGED_DIMS, (2, 16, 256, 16, 4, 16), strict=True)),
        dict(zip(MLA_PAGED_DIMS, (3, 3, 96, 1, 41, 8), strict=True)),
    ),
    frozenset(KV_DIMS): (
        dict(zip(KV_DIMS, (16, 2, 128, 4, 16, 16), strict=True)),
        dict(zip(KV_DIMS, (37, 3, 80, 2, 16, 16), strict=True)),
        dict(zip(KV_DIMS, (13, 1, 48, 3, 16, 8), strict=True)),
    ),
    frozenset(ROPE_CACHE_DIMS): (
        dict(zip(ROPE_CACHE_DIMS, (3, 1, 4, 2, 64, 19), strict=True)),
        dict(zip(ROPE_CACHE_DIMS, (2, 5, 3, 1, 80, 8), strict=True)),
    ),
    frozenset(ROPE_KV_DIMS): (
        dict(zip(ROPE_KV_DIMS, (16, 2, 64, 4, 16, 16, 4), strict=True)),
        dict(zip(ROPE_KV_DIMS, (37, 1, 80, 2, 16, 8, 3), strict=True)),
    ),
    frozenset(ROUTE_DIMS): (
        dict(zip(ROUTE_DIMS, (8, 256, 8, 8, 4), strict=True)),
        dict(zip(ROUTE_DIMS, (5, 160, 6, 8, 3), strict=True)),
        dict(zip(ROUTE_DIMS, (3, 60, 4, 1, 1), strict=True)),
    ),
    frozenset(SORT_DIMS): (
        dict(zip(SORT_DIMS, (16, 8, 2, 16), strict=True)),
        dict(zip(SORT_DIMS, (37, 60, 4, 32), strict=True)),
        dict(zip(SORT_DIMS, (150, 300, 7, 16), strict=True)),
    ),
    frozenset(PAGED_DIMS): (
        dict(zip(PAGED_DIMS, (2, 8, 2, 128, 16, 7, 16), strict=True)),
        dict(zip(PAGED_DIMS, (3, 3, 1, 80, 16, 3, 8), strict=True)),
    ),
}
"""By the names of the sizes an op's problem takes. Several rows a program, and several waves a row;
rows whose length is odd, and no multiple of what the waves load at once."""

PER_GROUP = tuple(dims for dims in SIZES[frozenset(GROUP_DIMS)] if dims["group_size"])
_TILED = ({"num_rows": 3, "N": 144, "K": 1024}, {"num_rows": 150, "N": 208, "K": 352})
OWN_SIZES: Mapping[str, tuple[Dims, ...]] = {
    "quant_per_group": PER_GROUP,
    "quant_int4_per_group": PER_GROUP,
    "quant_mxfp4": ({"num_rows": 8, "N": 1024}, {"num_rows": 5, "N": 224}),
    "gemm_fp8_blockscale_preshuffled": _TILED,
    "gemm_fp8_rowwise_preshuffled": _TILED,
    "gemm_mxfp4": _TILED,
    "gemm_w4a16_tile_packed": _TILED,
    "bmm_fp8": (
        {"batch": 2, "num_rows": 3, "N": 130, "K": 1024},
        {"batch": 3, "num_rows": 70, "N": 200, "K": 328},
    ),
}
"""Of ops whose rows are made of groups, or whose weights of tiles."""

MANY_ROWS: Mapping[str, tuple[Dims, ...]] = {
    "layer_norm": ({"num_rows": 257, "N": 1280},),
    "layer_norm_quant": ({"num_rows": 257, "N": 1280, "group_size": 0},),
}
"""Where kernels load weight and bias after their reductions instead of before."""

PERMUTED = Style("permuted", permuted=True)
SPECIAL = Style("special", special=True)
TO_INT8 = Style("int8", fields={"out_dtype": INT8})
OF_FP16 = Style("fp16", dtype=FP16)
OF_FP32 = Style("fp32", dtype=FP32)
_WEIGHTS = (
    Style("llama", keywords={"round_before_weight": True}),
    Style("gemma", keywords={"weight_offset": 1.0}),
    Style("bare", without=("weight",)),
)
_FLOOR = Style("floor", keywords={"amax_min": 1e-3}, special=True)
_UNROUNDED = Style("unrounded", keywords={"round_norm": False})
_NORM_QUANT = (TO_INT8, *_WEIGHTS, _UNROUNDED, PERMUTED)
_QUANT = (TO_INT8, OF_FP32, SPECIAL, _FLOOR)


def _activations(*others: Style) -> tuple[Style, ...]:
    named = (Style(a, fields={"activation": a}) for a in ("gelu", "gelu_tanh", "swiglu"))
    interleaved = {"activation": "swiglu", "last_strides": (2, 2)}
    return (*named, Style("interleaved", fields=interleaved), *others)


_HALVES: Mapping[str, Any] = {"table_width": 32, "rotary_dim": 64}
_PAIRS: Mapping[str, Any] = {"interleaved_in": True, "interleaved_out": True}
_HALF_WIDTH = Style("half width", fields=_HALVES)
_GPT_J = Style("gpt-j", fields=_PAIRS)
_DEEPSEEK = Style("deepseek", fields={**_HALVES, "interleaved_in": True})
_PARTIAL = Style("partial", fields={"rotary_dim": 32, "table_width": 32})
_ONE_TABLE = {"table_batch": 1, "table_dtype": FP32, "out_dtype": FP32}
_TOKENS_FIRST = Style("tokens first", fields={"tokens_before_heads": True})
_UNDONE = Style("transposed", fields={"transposed": True, **_PAIRS})

_NO_GROUPS = {"num_groups": 1, "topk_groups": 1, "bias_dtype": None}
_INTO_PACKED = (Style("packed", fields={"layout": "packed"}),)

_ONE_QUERY = {"num_queries": 1, "causal": "none"}
STYLES: Mapping[str, tuple[Style, ...]] = {
    "rms_norm": (*_WEIGHTS, PERMUTED, OF_FP16, Style("to fp32", keywords={"out_dtype": FP32})),
    "add_rms_norm": (*_WEIGHTS, PERMUTED, OF_FP32),
    "layer_norm": (Style("bare", without=("weight", "bias")), PERMUTED, OF_FP16),
    "rms_norm_backward": (*_WEIGHTS, PERMUTED),
    "add_rms_norm_backward": (*_WEIGHTS, PERMUTED),
    "layer_norm_backward": (Style("no bias", keywords={"has_bias": False}), PERMUTED),
    "quant_static": (TO_INT8, OF_FP32, SPECIAL),
    "quant_per_tensor": (TO_INT8, OF_FP32, Style("floor", keywords={"amax_min": 1e-3})),
    "quant_per_token": (*_QUANT, PERMUTED),
    "quant_per_group": _QUANT,
    "quant_int4_per_group": (OF_FP32, _FLOOR),
    "quant_mxfp4": (OF_FP32, OF_FP16, SPECIAL),
    "bmm_fp8": (
        Style("by row", fields={"x_scales": (2, 3, 1), "weight_scales": (2, 130, 1), "block_n": 1}),
        Style("by tensor", fields={"x_scales": (1, 1, 1), "weight_scales": (3, 1, 1)}),
        Style("along N", fields={"turned": True}),
    ),
    "gemm_w4a16": (
        Style("zeros", fields={"has_zero": True}),
        Style("offset binary", fields={"has_zero": True, "offset_binary": True}),
    ),
    "gemm_w4a16_tile_packed": (Style("of AMD", fields={"tile_n": 16, "bias_dtype": FP32}), OF_FP16),
    "gemm_mxfp4": (Style("biased", fields={"bias_dtype": FP32}), OF_FP32),
    "rms_norm_quant": _NORM_QUANT,
    "add_rms_norm_quant": _NORM_QUANT,
    "layer_norm_quant": (TO_INT8, _UNROUNDED, PERMUTED),
    "rms_norm_quant_static": (TO_INT8, _WEIGHTS[0]),
    "add_rms_norm_quant_static": (TO_INT8, _WEIGHTS[1]),
    "layer_norm_quant_static": (TO_INT8, _UNROUNDED),
    "act_and_mul": _activations(PERMUTED, OF_FP16),
    "act_and_mul_backward": _activations(PERMUTED),
    "act_and_mul_quant": _activations(TO_INT8, PERMUTED),
    "act_and_mul_quant_static": _activations(TO_INT8),
    "rope": (_DEEPSEEK, _UNDONE, _TOKENS_FIRST),
    "rope_qk": (
        _HALF_WIDTH,
        _GPT_J,
        _DEEPSEEK,
        _PARTIAL,
        _TOKENS_FIRST,
        _UNDONE,
        OF_FP16,
        Style("complex", fields={**_HALVES, **_PAIRS, "table_dtype": FP32}),
        Style("to pairs", fields={"interleaved_out": True}),
        Style("one table", fields=_ONE_TABLE),
    ),
    "qk_norm_rope": (
        _HALF_WIDTH,
        _GPT_J,
        _PARTIAL,
        Style("llama", fields={"round_before_weight": True, **_ONE_TABLE}),
        Style("gemma", fields={"weight_offset": 1.0}),
    ),
    "attention": (
        Style("window", fields={"window": 20, "causal": "bottom_right", "sinks": True}),
        Style("masked", fields={"mask": "bool", "causal": "none"}),
        Style("biased", fields={"mask": "bfloat16", "softcap": 3.0, "layout": "bshd"}),
        OF_FP32,
        *2 * (Style("one query", fields=_ONE_QUERY),),
        Style("one query, masked", fields={**_ONE_QUERY, "mask": "bool"}),
    ),
    "attention_with_lse": (Style("sinks", fields={"sinks": True, "first_keys": True}),),
    "attention_backward": (
        Style("window", fields={"window": 20, "softcap": 3.0, "sinks": True}),
        Style("masked", fields={"mask": "bool", "causal": "none"}),
        Style("documents", fields={"first_keys": True}),
    ),
    "mla_decode": (
        Style("masked", fields={"mask": "bool"}),
        Style("biased", fields={"mask": "bfloat16", "causal": True}),
        OF_FP32,
    ),
    "mla_paged_decode": (OF_FP32,),
    "kv_cache_write": (
        *3 * _INTO_PACKED,
        Style("transposed", fields={"layout": "transposed"}),
        Style("int32 slots", fields={"slot_dtype": torch.int32, "v_head_dim": 44}),
        OF_FP16,
    ),
    "rope_cache_write": (
        Style("qwen3", fields={"weight_dtype": BF16, "round_before_weight": True}),
        Style("gemma", fields={"weight_dtype": BF16, "weight_offset": 1.0, "v_head_dim": 24}),
        Style("partial", fields={"rotary_dim": 32, "table_width": 16}),
    ),
    "rope_kv_cache_write": (
        *2 * _INTO_PACKED,
        Style("at positions", fields={**_HALVES, "num_positions": 40, "table_dtype": FP32}),
        Style("gpt-j", fields={**_PAIRS, "layout": "packed"}),
        Style("partial", fields={"rotary_dim": 32, "table_width": 16}),
    ),
    "moe_route": (
        Style("mixtral", fields={**_NO_GROUPS, "scoring": "softmax", "renormalize": True}),
        Style("gpt-oss", fields={**_NO_GROUPS, "scoring": "softmax_of_chosen", "dtype": BF16}),
        Style("deepseek-v2", fields={"scoring": "softmax", "group_score": "max"}),
        OF_FP16,
    ),
    "moe_sort": (Style("int32", fields={"dtype": torch.int32, "weight_dtype": BF16}),),
    "paged_attention": (
        *2 * (Style("packed", fields={"layout": "packed"}),),
        Style("transposed", fields={"layout": "transposed"}),
        Style("scaled tokens", fields={"per_token": True}, languages=("triton",)),
        Style("sinks", fields={"sinks": True, "window": 50, "softcap": 20.0}),
        OF_FP16,
        replace(OF_FP32, languages=("triton",)),
    ),
}
"""Beyond the plainest call of each op, which is made at every size; a style at one size."""


def cases() -> Iterator[Case]:
    """Every case: the plain call at all sizes of its op, and each style at one of them."""
    for op in FAMILIES:
        sizes = sizes_of(op)
        for dims in (*sizes, *MANY_ROWS.get(op, ())):
            yield Case(op, dims, Style())
        for index, style in enumerate(STYLES.get(op, ())):
            yield Case(op, fitting(style, sizes, index), style)


def sizes_of(op: str) -> tuple[Dims, ...]:
    """The sizes at which `op` is called; none for an op of sizes that are not in `SIZES`."""
    if op in OWN_SIZES:
        return OWN_SIZES[op]
    return SIZES.get(frozenset(FAMILIES[op].dims), ())


def fitting(style: Style, sizes: tuple[Dims, ...], index: int) -> Dims:
    """One of `sizes`, in turn, that `style` can be called at."""
    if "table_width" in style.fields:
        return next(dims for dims in sizes if dims["head_dim"] == 64)  # as the tables
    if style.permuted:
        return next(dims for dims in sizes if dims["num_rows"] % 2 == 0)
    if style.special:
        return next(dims for dims in sizes if dims["num_rows"] == 5)
    return sizes[index % len(sizes)]
