"""Attention over pages: the reference against a loop, both layouts, opcheck and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.kv_cache import kv_cache_write
from aiter_inductor.lowerings.paged_attention import paged_attention
from aiter_inductor.lowerings.paged_attention_problem import (
    PagedAttentionProblem,
    paged_vectors_unsupported,
)
from tests.lowerings.checks import assert_close, opcheck

FP32, BF16 = torch.float32, torch.bfloat16
SMALL = PagedAttentionProblem(4, 6, 2, 32, 24, 8, 5, FP32, FP32)
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


def one_by_one(q, keys, values, tables, lengths, _k, _v, sinks, *, scale, window, softcap, **_):
    """Each sequence by itself, its rows gathered token by token from vLLM's layout."""
    out = []
    for i, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(length - window, 0)
        at = [(int(tables[i, t // 8]), t % 8) for t in range(first, length)]
        if not at:
            out.append(torch.zeros(q.shape[1], values.shape[-1]))
            continue
        k = torch.stack([keys[place] for place in at]).repeat_interleave(3, 1)
        v = torch.stack([values[place] for place in at]).repeat_interleave(3, 1)
        scores = torch.einsum("hd,thd->ht", q[i], k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None]), 1)
        p = scores.softmax(-1)[:, : len(at)]
        out.append(torch.einsum("ht,thd->hd", p, v))
    return torch.stack(out)


@pytest.mark.parametrize("changed", [{}, {"window": 9}, {"softcap": 2.0}, {"sinks": True}])
def test_reference_attends_to_the_tokens_of_the_pages(changed):
    args, kwargs = replace(SMALL, **changed).sample(seed=0, device="cpu")
    assert_close(paged_attention.reference(*args, **kwargs), one_by_one(*args, **kwargs))


def test_full_tables_are_torchs_attention():
    args, kwargs = replace(SMALL, v_head_dim=32).sample(seed=1, device="cpu")
    lengths = torch.full((4,), 40, dtype=torch.int32)
    tables = torch.arange(20, dtype=torch.int32).view(4, 5)
    found = paged_attention.reference(*args[:3], tables, lengths, **kwargs)
    k, v = (cache[:20].reshape(4, 40, 2, 32).transpose(1, 2) for cache in args[1:3])
    expected = F.scaled_dot_product_attention(args[0].unsqueeze(2), k, v, enable_gqa=True)
    assert_close(found, expected.squeeze(2))


def test_it_reads_what_kv_cache_write_stores():
    problem = replace(SMALL, layout="packed", v_head_dim=32)
    args, kwargs = problem.sample(seed=2, device="cpu")
    key, value = torch.randn(40, 2, 32), torch.randn(40, 2, 32)
    slots = torch.randperm(args[1].shape[0] * 8)[:40]
    tables, lengths = (slots // 8).int()[None], torch.tensor([1], dtype=torch.int32)
    kv_cache_write(key, value, args[1], args[2], slots, layout="packed")
    at_start = (slots % 8 == 0).nonzero()[0]
    found = paged_attention(args[0][:1], args[1], args[2], tables[:, at_start], lengths, **kwargs)
    assert_close(found, value[at_start].repeat_interleave(3, 1))


def test_opcheck():
    for changed in ({}, {"layout": "packed", "sinks": True, "window": 3}):
        opcheck(paged_attention, *replace(SMALL, **changed).sample(seed=3, device="cpu"))


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_90"])
def test_every_chip_takes_its_own_fp8(arch):
    use = Use(arch_named(arch))
    for dtype in FP8.values():
        problem = replace(SMALL, dtype=BF16, cache_dtype=dtype)
        selected = paged_attention.select(problem, use)
        if dtype in use.arch.fp8_dtypes:
            assert selected.provider is paged_attention.providers["triton"]
        else:
            assert "has no instructions for float8" in selected.reason


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"head_dim": 257}, "head_dim=257 is not a number up to 256"),
        ({"num_heads": 7}, "7 query heads are no multiple of 2 kv heads"),
        ({"dtype": torch.float64}, "queries are float64"),
        ({"cache_dtype": BF16}, "queries are float32 and the cache bfloat16, neither the same"),
        ({"page_size": 1 << 17}, "page_size=131072 is not a number up to 65536"),
    ],
)
def test_refusals_name_the_values(changed, sentence):
    reason = paged_attention.select(replace(SMALL, **changed), Use(arch_named("gfx942"))).reason
    assert sentence in reason


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "queries are float32; the kernel multiplies bfloat16 and float16"),
        ({"dtype": BF16, "cache_dtype": BF16, "v_head_dim": 20}, "no multiple of the 8 in 16"),
        ({"dtype": BF16, "cache_dtype": BF16, "aligned": False}, "do not begin at multiples of 16"),
    ],
)
def test_vectors_of_16_bytes_are_refused_by_name(changed, sentence):
    reason = paged_vectors_unsupported(replace(SMALL, **changed), Use(arch_named("gfx942")))
    assert sentence in str(reason)


def test_rows_of_16_bytes_are_seen_in_strides_and_offsets():
    problem = replace(SMALL, dtype=BF16, cache_dtype=BF16, v_head_dim=32)
    args, kwargs = problem.sample(seed=5, device="cpu")
    wide = torch.zeros(*args[1].shape[:3], 40, dtype=BF16)
    for cut, aligned in ((wide[..., :32], True), (wide[..., 1:33], False), (wide[..., 8:], True)):
        assert PagedAttentionProblem.of(args[0], cut, *args[2:], **kwargs).aligned == aligned


def test_arguments_that_do_not_fit_are_refused():
    args, kwargs = SMALL.sample(seed=4, device="cpu")

    def reason(*given, **changed):
        problem = PagedAttentionProblem.of(*given, **{**kwargs, **changed})
        return paged_attention.select(problem, Use(arch_named("gfx942"))).reason

    assert "layout is 'rows'" in reason(*args, layout="rows")
    assert "has 4 dimensions; 'packed' has 5" in reason(*args, layout="packed")
    assert "seq_lens int64, not int32" in reason(*args[:4], args[4].long(), *args[5:])
    assert "queries have 16 elements a head and keys 32" in reason(args[0][..., :16], *args[1:])
    assert "keys are float32 and values bfloat16" in reason(
        *args[:2], args[2].bfloat16(), *args[3:]
    )
