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


def test_values_of_a_page_may_lie_transposed():
    args, kwargs = replace(SMALL, layout="packed").sample(seed=7, device="cpu")
    values = args[2].transpose(2, 3).flatten(3)
    found = paged_attention.reference(
        *args[:2], values, *args[3:], **{**kwargs, "layout": "transposed"}
    )
    assert torch.equal(found, paged_attention.reference(*args, **kwargs))


@pytest.mark.parametrize("layout", ["paged", "packed"])
def test_a_scale_of_each_token_and_head_is_that_of_its_rows(layout):
    problem = replace(SMALL, layout=layout, per_token=True, window=9)
    args, kwargs = problem.sample(seed=8, device="cpu")
    shown = [scale[..., None] for scale in args[5:7]]
    if layout == "paged":
        rows = [x * scale.transpose(1, 2) for x, scale in zip(args[1:3], shown, strict=True)]
    else:
        key_scale, value_scale = shown[0].unsqueeze(2), shown[1].view(-1, 2, 2, 1, 4)
        rows = [args[1] * key_scale, args[2] * value_scale]
    plain = paged_attention.reference(args[0], *rows, *args[3:5], None, None, **kwargs)
    assert_close(paged_attention.reference(*args, **kwargs), plain)


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
        (
            {"cache_dtype": BF16},
            "queries are float32 and the cache bfloat16, neither the same, fp8 nor int8",
        ),
        ({"page_size": 1 << 17}, "page_size=131072 is not a number up to 65536"),
        ({"page_size": 6, "layout": "transposed"}, "page_size=6 is no multiple of the 4 in 16"),
        ({"layout": "packed", "aligned": False}, "packs of the cache do not begin at multiples"),
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
        ({"dtype": BF16, "cache_dtype": torch.int8}, "the cache is int8; the kernel converts fp8"),
        (
            {"dtype": BF16, "cache_dtype": BF16, "per_token": True},
            "tokens have scales of their own",
        ),
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


def test_tma_takes_only_pages_whose_heads_are_each_one_piece():
    problem = replace(SMALL, dtype=BF16, cache_dtype=BF16, v_head_dim=32, layout="packed")
    args, kwargs = problem.sample(seed=6, device="cpu")
    whole = PagedAttentionProblem.of(*args, **kwargs)
    apart = args[1].permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
    cut = PagedAttentionProblem.of(args[0], apart, *args[2:], **kwargs)
    every_second = (cache[:, ::2] for cache in args[1:3])
    between = PagedAttentionProblem.of(args[0], *every_second, *args[3:], **kwargs)
    sm_90, gfx942 = (Use(arch_named(name)) for name in ("sm_90", "gfx942"))
    assert paged_vectors_unsupported(whole, sm_90) is None
    assert paged_vectors_unsupported(between, sm_90) is None
    assert "are not each one piece" in str(paged_vectors_unsupported(cut, sm_90))
    transposed = replace(whole, layout="transposed")
    assert paged_vectors_unsupported(transposed, sm_90) is None
    longer = paged_vectors_unsupported(replace(transposed, page_size=16), sm_90)
    assert "values of 16 tokens side by side are no packs of 8" in str(longer)
    assert paged_vectors_unsupported(cut, gfx942) is None


def test_arguments_that_do_not_fit_are_refused():
    args, kwargs = SMALL.sample(seed=4, device="cpu")

    def reason(*given, **changed):
        problem = PagedAttentionProblem.of(*given, **{**kwargs, **changed})
        return paged_attention.select(problem, Use(arch_named("gfx942"))).reason

    assert "layout is 'rows'; it may be" in reason(*args, layout="rows")
    assert "has 4 dimensions; 'packed' has 5" in reason(*args, layout="packed")
    assert "has 4 dimensions; 'transposed' has 5" in reason(*args, layout="transposed")
    each = torch.ones(args[1].shape[0], 2, 8)
    assert "key_scale has shape (20, 2, 4), neither one number nor (20, 2, 8)" in reason(
        *args[:5], each[..., :4], each
    )
    assert "key_scale is float16, not float32" in reason(*args[:5], each.half(), each)
    assert "and the other has not" in reason(*args[:5], each, None)
    assert "keys have (heads, page_size) (2, 8) and values (2, 4)" in reason(
        *args[:2], args[2][:, :4], *args[3:]
    )
    assert "seq_lens int64, not int32" in reason(*args[:4], args[4].long(), *args[5:])
    assert "queries have 16 elements a head and keys 32" in reason(args[0][..., :16], *args[1:])
    assert "keys are float32 and values bfloat16" in reason(
        *args[:2], args[2].bfloat16(), *args[3:]
    )
