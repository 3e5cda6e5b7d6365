"""Tensors that do not fit together: no provider takes them, and each says which and why.

Every case here once read, or wrote, beyond a tensor, or took one number for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.hip import kv_cache, loading, moe_sort, rope, rope_kv
from aiter_inductor.lowerings.attention_problem import flash_unsupported
from aiter_inductor.lowerings.paged_attention_problem import (
    PagedAttentionProblem,
    paged_tiles_unsupported,
)
from tests.simulation.cases import Case, Style, sizes_of

ARCH = "gfx950"

Change = Callable[[Tensor], Tensor]


def shorter(axis: int) -> Change:
    """All but the last along `axis`."""
    return lambda x: x.narrow(axis, 0, x.shape[axis] - 1).clone()


def twice(x: Tensor) -> Tensor:
    """Of a batch twice as large."""
    return torch.cat((x, x))


def one(x: Tensor) -> Tensor:
    """The first of the first dimension, as a broadcast would take it."""
    return x[:1].clone()


def strided(x: Tensor) -> Tensor:
    """The same numbers with others between them."""
    return torch.stack((x, x), -1)[..., 0]


def no_zeros(_: Tensor) -> Tensor:
    """Fewer than any weight has groups."""
    return torch.zeros(3)


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


def double(x: Tensor) -> Tensor:
    return x.double()


def long(x: Tensor) -> Tensor:
    return x.long()


CASES: Mapping[str, tuple[tuple[str, Change, str], ...]] = {
    "attention": (
        ("k", shorter(3), "k is ["),
        ("v", twice, "v is ["),
        ("v", shorter(2), "v is ["),
        ("v", elsewhere, "the tensors are on cpu and meta"),
    ),
    "attention_with_lse": (("k", shorter(3), "k is ["),),
    "attention_backward": (
        ("grad", shorter(2), "the gradient is ["),
        ("out", shorter(3), "the result is ["),
        ("lse", twice, "its log-sum-exp is ["),
        ("out", elsewhere, "the tensors are on cpu and meta"),
    ),
    "attention_varlen": (
        ("k", shorter(2), "k is ["),
        ("v", shorter(0), "v is ["),
        ("cu_seqlens_q", long, "cu_seqlens_q is int64, not int32"),
        ("cu_seqlens_k", strided, "cu_seqlens_k has stride 2; kernels read it with stride 1"),
        ("cu_seqlens_k", elsewhere, "the tensors are on cpu and meta"),
    ),
    "attention_varlen_backward": (
        ("grad", shorter(0), "the gradient is ["),
        ("lse", shorter(1), "its log-sum-exp is ["),
    ),
    "mla_decode": (
        ("q_rope", shorter(1), "q_rope is ["),
        ("latent", twice, "latent is ["),
        ("latent", shorter(2), "latent is ["),
        ("k_rope", shorter(1), "k_rope is ["),
        ("kv_b_weight", elsewhere, "the tensors are on cpu and meta"),
    ),
    "mla_paged_decode": (
        ("block_tables", one, "block_tables is [1, "),
        ("seq_lens", shorter(0), "seq_lens is ["),
        ("seq_lens", elsewhere, "the tensors are on cpu and meta"),
    ),
    "paged_attention": (
        ("key_cache", strided, "keys have last stride 2; kernels read heads with stride 1"),
        ("value_cache", strided, "values have last stride 2; kernels read heads with stride 1"),
        ("block_tables", one, "block_tables is [1, "),
        ("seq_lens", shorter(0), "seq_lens is ["),
        ("seq_lens", elsewhere, "the tensors are on cpu and meta"),
    ),
    "kv_cache_write": (
        ("value", shorter(0), "value is ["),
        ("value_cache", one, "value_cache 1 of "),
        ("slots", shorter(0), "slots is ["),
        ("slots", strided, "slots has stride 2; kernels read it with stride 1"),
        ("slots", elsewhere, "the tensors are on cpu and meta"),
    ),
    "rope_kv_cache_write": (
        ("v", shorter(0), "value is ["),
        ("sin", elsewhere, "the tensors are on cpu and meta"),
    ),
    "rope_qk": (("k", shorter(-1), " in q but "),),
    "qk_norm_rope": (("k_weight", double, "q_weight is bfloat16["),),
    "moe_route": (("bias", strided, "bias has stride 2"),),
    "gemm_w4a16": (("weight_zero", no_zeros, "weight_zero is [3], not as weight_scale ["),),
    "rope": (("cos", elsewhere, "the tensors are on cpu and meta"),),
    "quant_static": (
        ("scale", double, "scale is float64[1], not one float32"),
        ("scale", elsewhere, "the tensors are on cpu and meta"),
    ),
    "rms_norm_quant_static": (("scale", elsewhere, "the tensors are on cpu and meta"),),
    "act_and_mul_quant_static": (("scale", double, "scale is float64[1], not one float32"),),
    "moe_sort": (("weights", elsewhere, "the tensors are on cpu and meta"),),
    "bmm_fp8": (("weight_scale", elsewhere, "the tensors are on cpu and meta"),),
    "gemm_fp8_rowwise": (("weight_scale", elsewhere, "the tensors are on cpu and meta"),),
    "gemm_fp8_rowwise_add": (("residual", elsewhere, "the tensors are on cpu and meta"),),
    "gemm_mxfp4": (("weight_scale", elsewhere, "the tensors are on cpu and meta"),),
    "gemm_w4a16_tile_packed": (("x", elsewhere, "the tensors are on cpu and meta"),),
}


@pytest.mark.parametrize("op", CASES)
def test_what_does_not_fit_is_refused_by_name(op: str) -> None:
    made, use = load_ops()[op], Use(arch_named(ARCH))
    args, kwargs = Case(op, sizes_of(op)[0], Style()).arguments(ARCH)
    inputs = made.bind(*args, **kwargs)
    for name, change, sentence in CASES[op]:
        problem = made.problem(**inputs | {name: change(inputs[name])})
        reasons = [provider.refuse(problem, use) for provider in made.providers.values()]
        assert all(reasons), f"{name} {change.__name__}: {reasons}"
        assert any(sentence in reason for reason in reasons if reason), reasons


def test_keys_that_sequences_share_are_not_spread() -> None:
    """The formula broadcasts over sequences; a kernel would read those that are not there."""
    q, k, sinks = torch.randn(2, 4, 8, 16), torch.randn(1, 4, 8, 16), torch.randn(8)
    problem, use = load_ops()["attention"].problem, Use(arch_named(ARCH))
    assert flash_unsupported(problem(q, k, k, scale=1.0), use) == (
        "k is [1, 4, 8, 16], not [2, 4, 8, 16]"
    )
    for given, sentence in (
        (sinks, "sinks is [8], not [4]"),
        (sinks[::2], "sinks has stride 2; kernels read it with stride 1"),
    ):
        assert flash_unsupported(problem(q, q, q, None, given, scale=1.0), use) == sentence


def test_distances_that_32_bits_do_not_hold_are_refused() -> None:
    q, tables = torch.empty(1, 4, 64, device="meta"), torch.empty(1, 4, device="meta").int()

    def mismatch(num_heads: int) -> str:
        heads = torch.empty(num_heads, 2**18, 16, 64, device="meta").permute(1, 2, 0, 3)
        return PagedAttentionProblem.of(q, heads, heads, tables, tables[:, 0], scale=1.0).mismatch

    assert mismatch(8) == ""
    sentence = "a page's keys lie 2147484671 elements apart; kernels count up to 2147483647"
    assert mismatch(9) == sentence


def test_packs_of_another_size_are_refused() -> None:
    q, tables = torch.empty(1, 2, 16, dtype=torch.bfloat16), torch.zeros(1, 1).int()
    keys = torch.empty(1, 2, 4, 16, 4, dtype=torch.bfloat16)
    asked = (q, keys, keys.transpose(2, 3), tables, tables[:, 0])
    found = PagedAttentionProblem.of(*asked, scale=1.0, layout="packed").mismatch
    assert found == "keys are packs of 4; 16 bytes hold 8"


def test_more_sequences_than_a_grid_has() -> None:
    problem = PagedAttentionProblem(65536, 6, 2, 32, 24, 8, 5, torch.float32, torch.float32)
    sentence = "65536 sequences exceed 65535, the grid's third dimension"
    assert paged_tiles_unsupported(problem, Use(arch_named(ARCH))) == sentence


def test_more_heads_and_accesses_than_32_bits_count() -> None:
    x, table = torch.empty(2**26, 32, 2, device="meta"), torch.empty(2**26, 2, device="meta")
    slots, cache = table[:, 0].long(), torch.empty(1, 16, 32, 2, device="meta")
    with loading.collecting_modules("gfx942"):
        with pytest.raises(ValueError, match="2147483648 heads in all exceed 2147483647"):
            rope.rope(x[None].transpose(1, 2), table[None, None], table[None, None])
        with pytest.raises(ValueError, match="6442450944 heads in all exceed 2147483647"):
            rope_kv.rope_kv_cache_write(x, x, x, table, table, None, cache, cache, slots)
        with pytest.raises(ValueError, match="4294967296 accesses in all exceed 2147483647"):
            kv_cache.kv_cache_write(x, x, cache, cache, slots)


def test_more_places_than_are_sorted() -> None:
    weights = torch.empty(2**26, 8, device="meta")
    with pytest.raises(ValueError, match="536873984 places exceed 536870912"):
        moe_sort.moe_sort(weights.long(), weights, num_experts=1024, block_m=4)
