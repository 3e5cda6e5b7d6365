"""What `bench` measures: ops, the shapes of each, and the plain code it is compared with."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import aiter_inductor.lowerings
from aiter_inductor.cli import subgraphs, subgraphs_gemm
from aiter_inductor.cli.cases_gemm import GEMM_FAMILIES
from aiter_inductor.cli.family import Arguments, Dims, Family
from aiter_inductor.core.errors import OptionValueError, UnknownOptionError
from aiter_inductor.core.op import OPS, Op
from aiter_inductor.core.problem import Problem

EPS = 1e-6

NORM_DIMS: Dims = {"num_rows": 4096, "N": 7168}
QUANT_DIMS: Dims = {**NORM_DIMS, "group_size": 0}
GROUP_DIMS: Dims = {**NORM_DIMS, "group_size": 128}
ROPE_DIMS: Dims = {
    "batch": 2,
    "num_tokens": 4096,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
ROPE_CACHE_DIMS: Dims = {**ROPE_DIMS, "batch": 64, "num_tokens": 1, "num_slots": 4096}
ATTENTION_DIMS: Dims = {
    "batch": 1,
    "num_heads": 32,
    "num_kv_heads": 8,
    "num_tokens": 4096,
    "head_dim": 128,
    "v_dim": 128,
}
MLA_PREFILL_DIMS: Dims = {
    "batch": 1,
    "num_heads": 128,
    "num_tokens": 4096,
    "nope_dim": 128,
    "rope_dim": 64,
    "v_dim": 128,
}
MLA_DIMS: Dims = {
    "batch": 16,
    "num_heads": 128,
    "q_len": 1,
    "kv_len": 4096,
    "kv_lora_rank": 512,
    "cache_bits": 16,
}
MLA_PAGED_DIMS: Dims = {
    "num_seqs": 64,
    "num_heads": 128,
    "kv_lora_rank": 512,
    "page_size": 64,
    "max_pages": 64,
    "cache_bits": 16,
}
KV_DIMS: Dims = {
    "num_tokens": 4096,
    "num_kv_heads": 8,
    "head_dim": 128,
    "num_pages": 1024,
    "page_size": 16,
    "cache_bits": 16,
}
ROPE_KV_DIMS: Dims = {**KV_DIMS, "num_heads": 32}
ROUTE_DIMS: Dims = {
    "num_tokens": 4096,
    "num_experts": 256,
    "topk": 8,
    "num_groups": 8,
    "topk_groups": 4,
}
SORT_DIMS: Dims = {"num_tokens": 4096, "num_experts": 256, "topk": 8, "block_m": 64}
PAGED_DIMS: Dims = {
    "num_seqs": 64,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "page_size": 16,
    "max_pages": 512,
    "cache_bits": 16,
}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        op: what is computed.
        dims: the sizes asked for.
        problem: the op's problem at these sizes; draws the inputs.
        plain: the code that is compiled, which takes the op's arguments.
    """

    op: Op
    dims: Dims
    problem: Problem
    plain: Callable[..., Any]

    def __str__(self) -> str:
        return self.op.name + " " + " ".join(f"{k}={v}" for k, v in self.dims.items())


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _cache_dtype(dims: Dims, fp8: torch.dtype) -> torch.dtype:
    return fp8 if dims["cache_bits"] == 8 else torch.bfloat16


def _scales(names: str, dims: Dims, fp8: torch.dtype) -> dict[str, Any]:
    """The keywords of a quantising op; one whose scale is given takes no group size."""
    if "scale" in names:
        return {"dtype": fp8}
    return {"dtype": fp8, "group_size": dims["group_size"] or None}


def _rows(names: str, quantised: bool) -> Family:
    """Ops over rows, alone or normalised."""
    grouped = quantised and "scale" not in names

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        rows, N = dims["num_rows"], dims["N"]
        given = {name: _bf16(rows, N) for name in ("x", "residual", "grad", "grad_sum")}
        given |= {name: _bf16(N) for name in ("weight", "bias")}
        given["scale"] = torch.empty(1, device="meta")
        args = tuple(EPS if name == "eps" else given[name] for name in names.split())
        return args, _scales(names, dims, fp8) if quantised else {}

    return Family(QUANT_DIMS if grouped else NORM_DIMS, example)


def _per_tensor_or_token(dims: Dims, fp8: torch.dtype) -> Arguments:
    return (_bf16(dims["num_rows"], dims["N"]),), {"dtype": fp8}


def _per_group(dims: Dims, fp8: torch.dtype) -> Arguments:
    x = _bf16(dims["num_rows"], dims["N"])
    return (x,), {"dtype": fp8, "group_size": dims["group_size"]}


def _int4(dims: Dims, fp8: torch.dtype) -> Arguments:
    return (_bf16(dims["num_rows"], dims["N"]),), {"group_size": dims["group_size"]}


def _activation(names: str, quantised: bool) -> Family:
    grouped = quantised and "scale" not in names

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        gate, up = _bf16(dims["num_rows"], 2 * dims["N"]).chunk(2, dim=-1)
        scale = torch.empty(1, device="meta")
        given = {"grad": torch.empty_like(gate), "gate": gate, "up": up, "scale": scale}
        kwargs = _scales(names, dims, fp8) if quantised else {}
        return tuple(given[name] for name in names.split()), {"activation": "silu", **kwargs}

    return Family(QUANT_DIMS if grouped else NORM_DIMS, example)


def _rope(names: str) -> Family:
    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        batch, tokens, D = dims["batch"], dims["num_tokens"], dims["head_dim"]
        given = {
            "q": _bf16(batch, tokens, dims["num_heads"], D).transpose(1, 2),
            "k": _bf16(batch, tokens, dims["num_kv_heads"], D).transpose(1, 2),
            "q_weight": _bf16(D),
            "k_weight": _bf16(D),
            "cos": _bf16(batch, 1, tokens, D),
            "sin": _bf16(batch, 1, tokens, D),
            "eps": EPS,
        }
        return tuple(given[name] for name in names.split()), {}

    return Family(ROPE_DIMS, example)


def _rope_cache(dims: Dims, fp8: torch.dtype) -> Arguments:
    """q, k and v of tokens at the end of a static cache."""
    (q, k, cos, sin), _ = _rope("q k cos sin").example(dims, fp8)
    cache = _bf16(dims["batch"], dims["num_kv_heads"], dims["num_slots"], dims["head_dim"])
    slots = torch.empty(dims["num_tokens"], dtype=torch.int64, device="meta")
    return (q, k, k, cos, sin, cache, cache, slots), {}


def _attention(backward: bool = False) -> Family:
    """Causal prefill."""

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        batch, tokens, heads = dims["batch"], dims["num_tokens"], dims["num_heads"]
        kv_heads, qk_dim, v_dim = dims["num_kv_heads"], dims["head_dim"], dims["v_dim"]
        q, out = _bf16(batch, heads, tokens, qk_dim), _bf16(batch, heads, tokens, v_dim)
        k, v = _bf16(batch, kv_heads, tokens, qk_dim), _bf16(batch, kv_heads, tokens, v_dim)
        lse = torch.empty(batch, heads, tokens, device="meta")
        args = (out, q, k, v, out, lse) if backward else (q, k, v)
        return args, {"scale": qk_dim**-0.5, "causal": "top_left"}

    return Family(ATTENTION_DIMS, example)


def _varlen(backward: bool = False) -> Family:
    """Causal prefill of `batch` sequences that together have `num_tokens` tokens."""

    def example(dims: Dims, fp8: torch.dtype) -> Arguments:
        tokens, heads, kv_heads = dims["num_tokens"], dims["num_heads"], dims["num_kv_heads"]
        qk_dim, v_dim = dims["head_dim"], dims["v_dim"]
        starts = torch.empty(dims["batch"] + 1, dtype=torch.int32, device="meta")
        q, k = _bf16(tokens, heads, qk_dim), _bf16(tokens, kv_heads, qk_dim)
        heads_of = (q, k, _bf16(tokens, kv_heads, v_dim))
        out, lse = _bf16(tokens, heads, v_dim), torch.empty(heads, tokens, device="meta")
        args = (out, *heads_of, out, lse) if backward else heads_of
        longest = -(-tokens // dims["batch"])
        how = {"max_seqlen_q": longest, "scale": qk_dim**-0.5, "causal": "top_left"}
        return (*args, starts, starts), how

    return Family(ATTENTION_DIMS, example)


def _mla_prefill(dims: Dims, fp8: torch.dtype) -> Arguments:
    """Causal prefill; the values lie beside the first part of the keys."""
    batch, heads, tokens = dims["batch"], dims["num_heads"], dims["num_tokens"]
    nope, rope = dims["nope_dim"], dims["rope_dim"]
    kv = _bf16(batch, tokens, heads, nope + dims["v_dim"]).transpose(1, 2)
    args = (
        _bf16(batch, tokens, heads, nope + rope).transpose(1, 2)[..., :nope],
        _bf16(batch, heads, tokens, rope),
        kv[..., :nope],
        _bf16(batch, 1, tokens, rope),
        kv[..., nope:],
    )
    return args, {"scale": (nope + rope) ** -0.5, "causal": "top_left", "layout": "bshd"}


def _mla(dims: Dims, fp8: torch.dtype) -> Arguments:
    """A decoding step; a head is a quarter of a latent row, DeepSeek's 128 of 512."""
    batch, heads, q_len = dims["batch"], dims["num_heads"], dims["q_len"]
    kv_len, rank = dims["kv_len"], dims["kv_lora_rank"]
    nope, rope = rank // 4, rank // 8
    dtype = _cache_dtype(dims, fp8)
    args = (
        _bf16(batch, heads, q_len, nope),
        _bf16(batch, heads, q_len, rope),
        *(torch.empty(batch, kv_len, n, dtype=dtype, device="meta") for n in (rank, rope)),
        _bf16(heads * 2 * nope, rank),
        None,
        torch.empty(1, device="meta") if dtype == fp8 else None,
    )
    return args, {"scale": (nope + rope) ** -0.5}


def _mla_paged(dims: Dims, fp8: torch.dtype) -> Arguments:
    """A decoding step over latent rows in pages; the rotated part is an eighth of the latent."""
    seqs, max_pages, rank = dims["num_seqs"], dims["max_pages"], dims["kv_lora_rank"]
    width = rank + rank // 8
    dtype = _cache_dtype(dims, fp8)
    args = (
        _bf16(seqs, dims["num_heads"], width),
        torch.empty(seqs * max_pages, dims["page_size"], width, dtype=dtype, device="meta"),
        torch.empty(seqs, max_pages, dtype=torch.int32, device="meta"),
        torch.empty(seqs, dtype=torch.int32, device="meta"),
        torch.empty(1, device="meta") if dtype == fp8 else None,
    )
    return args, {"scale": width**-0.5, "rank": rank}


def _kv_cache(dims: Dims, fp8: torch.dtype) -> Arguments:
    """Keys and values into vLLM's layout, in bf16 or, where cache_bits is 8, in fp8."""
    tokens, heads, D = dims["num_tokens"], dims["num_kv_heads"], dims["head_dim"]
    dtype = _cache_dtype(dims, fp8)
    pages = dims["num_pages"], dims["page_size"]
    args = (
        *(_bf16(tokens, heads, D) for _ in range(2)),
        *(torch.empty(*pages, heads, D, dtype=dtype, device="meta") for _ in range(2)),
        torch.empty(tokens, dtype=torch.int64, device="meta"),
        *(torch.empty(1, device="meta") if dtype == fp8 else None for _ in range(2)),
    )
    return args, {}


def _rope_kv_cache(dims: Dims, fp8: torch.dtype) -> Arguments:
    """The same behind a rotation by tables of a row for each token."""
    (k, v, *cache), _ = _kv_cache(dims, fp8)
    q = _bf16(dims["num_tokens"], dims["num_heads"], dims["head_dim"])
    tables = (_bf16(dims["num_tokens"], dims["head_dim"]) for _ in range(2))
    return (q, k, v, *tables, None, *cache), {}


def _moe_route(dims: Dims, fp8: torch.dtype) -> Arguments:
    """DeepSeek-V3's router: sigmoid, a bias, groups by their two best experts."""
    logits = torch.empty(dims["num_tokens"], dims["num_experts"], device="meta")
    chosen = {key: dims[key] for key in ("topk", "num_groups", "topk_groups")}
    args = logits, torch.empty(dims["num_experts"], device="meta")
    scaling = {"renormalize": True, "eps": 1e-20, "scale": 2.5}
    return args, {"scoring": "sigmoid", **chosen, **scaling}


def _moe_sort(dims: Dims, fp8: torch.dtype) -> Arguments:
    shape = dims["num_tokens"], dims["topk"]
    experts = torch.empty(shape, dtype=torch.int64, device="meta")
    weights = torch.empty(shape, device="meta")
    return (experts, weights), {key: dims[key] for key in ("num_experts", "block_m")}


def _paged_attention(dims: Dims, fp8: torch.dtype) -> Arguments:
    """A decoding step over vLLM's layout, in bf16 or, where cache_bits is 8, in fp8."""
    seqs, D, max_pages = dims["num_seqs"], dims["head_dim"], dims["max_pages"]
    dtype = _cache_dtype(dims, fp8)
    pages = seqs * max_pages, dims["page_size"], dims["num_kv_heads"], D
    args = (
        _bf16(seqs, dims["num_heads"], D),
        *(torch.empty(pages, dtype=dtype, device="meta") for _ in range(2)),
        torch.empty(seqs, max_pages, dtype=torch.int32, device="meta"),
        torch.empty(seqs, dtype=torch.int32, device="meta"),
        *(torch.empty(1, device="meta") if dtype == fp8 else None for _ in range(2)),
        None,
    )
    return args, {"scale": D**-0.5}


FAMILIES: Mapping[str, Family] = {
    "rms_norm": _rows("x weight eps", quantised=False),
    "add_rms_norm": _rows("x residual weight eps", quantised=False),
    "layer_norm": _rows("x weight bias eps", quantised=False),
    "rms_norm_backward": _rows("grad x weight eps", quantised=False),
    "add_rms_norm_backward": _rows("grad grad_sum x weight eps", quantised=False),
    "layer_norm_backward": _rows("grad x weight eps", quantised=False),
    "quant_static": _rows("x scale", quantised=True),
    "quant_per_tensor": Family(NORM_DIMS, _per_tensor_or_token),
    "quant_per_token": Family(NORM_DIMS, _per_tensor_or_token),
    "quant_per_group": Family(GROUP_DIMS, _per_group),
    "quant_int4_per_group": Family(GROUP_DIMS, _int4),
    "rms_norm_quant": _rows("x weight eps", quantised=True),
    "add_rms_norm_quant": _rows("x residual weight eps", quantised=True),
    "layer_norm_quant": _rows("x weight bias eps", quantised=True),
    "rms_norm_quant_static": _rows("x weight eps scale", quantised=True),
    "add_rms_norm_quant_static": _rows("x residual weight eps scale", quantised=True),
    "layer_norm_quant_static": _rows("x weight bias eps scale", quantised=True),
    "act_and_mul": _activation("gate up", quantised=False),
    "act_and_mul_backward": _activation("grad gate up", quantised=False),
    "act_and_mul_quant": _activation("gate up", quantised=True),
    "act_and_mul_quant_static": _activation("gate up scale", quantised=True),
    "rope": _rope("q cos sin"),
    "rope_qk": _rope("q k cos sin"),
    "qk_norm_rope": _rope("q k q_weight k_weight cos sin eps"),
    "rope_cache_write": Family(ROPE_CACHE_DIMS, _rope_cache),
    "attention": _attention(),
    "attention_with_lse": _attention(),
    "attention_backward": _attention(backward=True),
    "attention_varlen": _varlen(),
    "attention_varlen_with_lse": _varlen(),
    "attention_varlen_backward": _varlen(backward=True),
    "mla_prefill": Family(MLA_PREFILL_DIMS, _mla_prefill),
    "mla_decode": Family(MLA_DIMS, _mla),
    "mla_paged_decode": Family(MLA_PAGED_DIMS, _mla_paged),
    "kv_cache_write": Family(KV_DIMS, _kv_cache),
    "rope_kv_cache_write": Family(ROPE_KV_DIMS, _rope_kv_cache),
    "moe_route": Family(ROUTE_DIMS, _moe_route),
    "moe_sort": Family(SORT_DIMS, _moe_sort),
    "paged_attention": Family(PAGED_DIMS, _paged_attention),
    **GEMM_FAMILIES,
}

BASELINES: tuple[tuple[str, Dims], ...] = (
    ("rms_norm", {"num_rows": 4096, "N": 7168}),
    ("rms_norm_quant", {"num_rows": 64, "N": 7168, "group_size": 0}),
    ("rms_norm_quant", {"num_rows": 4096, "N": 7168, "group_size": 0}),
    ("rms_norm_quant", {"num_rows": 16384, "N": 8192, "group_size": 0}),
    ("add_rms_norm_quant", {"num_rows": 64, "N": 7168, "group_size": 128}),
    ("add_rms_norm_quant", {"num_rows": 4096, "N": 7168, "group_size": 128}),
    ("layer_norm_quant", {"num_rows": 4096, "N": 7168, "group_size": 0}),
    ("act_and_mul_quant", {"num_rows": 4096, "N": 18432, "group_size": 128}),
    ("rope_qk", {**ROPE_DIMS, "batch": 128, "num_tokens": 1}),
    ("rope_qk", ROPE_DIMS),
)
"""The rows that every change of a kernel is held to."""


def load_ops() -> dict[str, Op]:
    """Every op there is: imports all of `lowerings`."""
    folder = aiter_inductor.lowerings
    for module in pkgutil.iter_modules(folder.__path__):
        import_module(f"{folder.__name__}.{module.name}")
    return OPS


def parse_dims(name: str, text: str) -> Dims:
    """Sizes such as `num_rows=64,N=4096` over the defaults of the op `name`.

    Raises:
        UnknownOptionError: for a size that the op does not have.
        OptionValueError: for one that is not a positive integer (group_size may be 0).
    """
    defaults = FAMILIES[name].dims
    given = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults:
            raise UnknownOptionError(key, defaults)
        least = 0 if key == "group_size" else 1
        if not value.isdigit() or int(value) < least:
            raise OptionValueError(key, value, f"an integer of at least {least}")
        given[key] = int(value)
    return {**defaults, **given}


def case_of(name: str, dims: Dims, fp8: torch.dtype) -> Case:
    """The benchmark of the op `name` at the sizes `dims`."""
    op = load_ops()[name]
    args, kwargs = FAMILIES[name].example(dims, fp8)
    problem = op.problem(*args, **kwargs)
    plain = next(
        (found for module in (subgraphs, subgraphs_gemm) if (found := getattr(module, name, None))),
        _plain_quant(name) or op.reference,
    )
    return Case(op, dims, problem, plain)


def _plain_quant(name: str) -> Callable[..., Any] | None:
    return subgraphs.quant if name in ("quant_per_token", "quant_per_group") else None
