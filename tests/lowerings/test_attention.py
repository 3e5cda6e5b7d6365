"""Attention: the formula against float64 and SDPA, its corners, and torch's provider."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.core.problem import describe
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_problem import flash_unsupported, sdpa_is_faster
from tests.lowerings.checks import assert_close, assert_same_layout, opcheck, oracle

CPU = Use(arch_named("cpu"))


def heads(B=2, H=4, KVH=2, S=7, T=7, D=24, Dv=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, S, D), (B, KVH, T, D), (B, KVH, T, Dv)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)


def exact(q, k, v, *, scale, causal="none", window=None, softcap=None, mask=None, sinks=None):
    """One query at a time, in float64, from the definitions alone."""
    q, k, v = (t.double() for t in (q, k, v))
    B, H, S, _ = q.shape
    KVH, T, Dv = k.shape[1], k.shape[2], v.shape[-1]
    out = torch.zeros(B, H, S, Dv, dtype=torch.float64)
    last = {"none": None, "top_left": 0, "bottom_right": T - S}[causal]
    for b in range(B):
        for h in range(H):
            kh = h // (H // KVH)
            for i in range(S):
                at = i + (last or 0)
                logits = k[b, kh] @ q[b, h, i] * scale
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                for j in range(T):
                    hidden = last is not None and j > at
                    hidden = hidden or (window is not None and j <= at - window)
                    if mask is not None:
                        m = mask.expand(B, H, S, T)[b, h, i, j]
                        if mask.dtype == torch.bool:
                            hidden = hidden or not m
                        else:
                            logits[j] += m.double()
                    if hidden:
                        logits[j] = -math.inf
                weights = logits.exp()
                total = weights.sum() + (sinks[h].double().exp() if sinks is not None else 0)
                if total > 0:
                    out[b, h, i] = (weights / total) @ v[b, kh]
    return out


VARIANTS = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right"},
    {"causal": "top_left", "window": 3},
    {"causal": "bottom_right", "window": 2},
    {"window": 3},
    {"softcap": 2.0, "causal": "top_left"},
]


@pytest.mark.parametrize("S, T", [(7, 7), (3, 7), (7, 3), (1, 6), (5, 1)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula(variant, S, T, dtype):
    q, k, v = heads(S=S, T=T, dtype=dtype)
    assert_close(attention(q, k, v, scale=0.3, **variant), exact(q, k, v, scale=0.3, **variant))


@pytest.mark.parametrize("additive", [False, True])
def test_masks_and_sinks(additive):
    q, k, v = heads(T=9)
    drawn = torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(5))
    mask = drawn if additive else drawn > 0
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    got = attention(q, k, v, mask, sinks, scale=0.2)
    assert_close(got, exact(q, k, v, scale=0.2, mask=mask, sinks=sinks))


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_a_query_that_sees_nothing_gives_zeros(sinks):
    q, k, v = heads()
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    mask[..., 3, :] = False
    out = attention(q, k, v, mask, sinks, scale=0.2)
    assert (out[:, :, 3] == 0).all()
    assert (out[:, :, 2] != 0).any()


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_a_nan_query_spoils_no_other_row(provider):
    q, k, v = heads()
    clean = attention(q, k, v, scale=0.2, causal="top_left", provider=provider)
    q[0, 1, 4] = torch.nan
    out = attention(q, k, v, scale=0.2, causal="top_left", provider=provider)
    others = torch.ones(2, 4, 7, dtype=torch.bool)
    others[0, 1, 4] = False
    assert torch.equal(out[others], clean[others])
    assert not torch.equal(out[0, 1, 4], clean[0, 1, 4])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layout_is_the_order_in_memory(layout):
    out = attention(*heads(), scale=0.2, layout=layout)
    dense = out if layout == "bhsd" else out.transpose(1, 2)
    assert dense.is_contiguous()
    assert_close(out, attention(*heads(), scale=0.2))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}], ids=str)
def test_empty(sizes):
    q, k, v = heads(**sizes)
    out = attention(q, k, v, scale=0.2)
    assert out.shape == (*q.shape[:3], 16)
    assert (out == 0).all()


PROVIDED = [
    ({}, {"causal": "top_left"}),
    ({"D": 16}, {"causal": "top_left", "layout": "bshd"}),
    ({"H": 2}, {"causal": "top_left"}),
    ({"T": 11}, {"causal": "top_left"}),
    ({"S": 11}, {}),
    ({"D": 8, "Dv": 24}, {"causal": "top_left"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes, how", PROVIDED, ids=str)
def test_torch_provides_it(sizes, how, dtype):
    args, kwargs = heads(**sizes, dtype=dtype), {"scale": 0.25, **how}
    run = attention.providers["torch"].run
    actual, expected = run(*args, **kwargs), attention.reference(*args, **kwargs)
    assert_same_layout(actual, expected)
    assert_close(actual, oracle(attention, args, kwargs))
    compiled = torch.compile(lambda *a: attention(*a, **kwargs, provider="torch"), fullgraph=True)
    assert_close(compiled(*args), expected, loosen=2)


def test_torch_provides_a_mask_with_a_hidden_row():
    q, k, v = heads()
    mask = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :, :3] = False
    out = attention.providers["torch"].run(q, k, v, mask, scale=0.25)
    assert_close(out, oracle(attention, (q, k, v, mask), {"scale": 0.25}))


@pytest.mark.parametrize(
    "sizes, how, sentence",
    [
        ({}, {"window": 5}, "SDPA has no window, and window=5 is asked for"),
        ({}, {"softcap": 30.0}, "SDPA has no softcap, and softcap=30 is asked for"),
        ({}, {"sinks": torch.zeros(4)}, "SDPA has no attention sinks"),
        ({"T": 9}, {"causal": "bottom_right"}, "counts S=7 queries from the first of T=9 keys"),
        (
            {},
            {"first_keys": torch.zeros(2, 7, dtype=torch.int32)},
            "SDPA hides other documents by a mask of all pairs only",
        ),
        ({"H": 3}, {}, "3 query heads do not divide into 2 groups"),
        ({"S": 1}, {}, "S=1 queries of T=7 keys do not pay for widening v"),
        (
            {"D": 16},
            {"mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)},
            "the bool mask is read either way",
        ),
        (
            {"D": 16},
            {"mask": torch.ones(1, 1, 7, 7), "causal": "top_left"},
            "SDPA takes causal=top_left or a mask, not both",
        ),
    ],
    ids=str,
)
def test_refusals(sizes, how, sentence):
    problem = attention.problem(*heads(**sizes), scale=0.2, **how)
    selection = attention.select(problem, CPU)
    assert selection.provider is None
    assert sentence in selection.reason


def test_maxima_of_raw_scores_need_a_positive_scale():
    reason = flash_unsupported(attention.problem(*heads(), scale=-0.5), Use(arch_named("gfx942")))
    assert reason == "scale=-0.5 is not positive, and maxima are taken of raw scores"


def test_float32_is_left_to_torch_on_hopper():
    problem = attention.problem(*heads(), scale=0.2)
    reason = sdpa_is_faster(problem, Use(arch_named("sm_90")))
    assert reason == "float32 spills registers on sm_90; torch has kernels for it"


def test_opcheck():
    q, k, v = heads()
    opcheck(attention, (q, k, v), {"scale": 0.2, "causal": "top_left"})
    opcheck(attention, (q, k, v, torch.ones(1, 1, 7, 7)), {"scale": 0.2, "layout": "bshd"})


def test_the_formula_is_sdpas():
    q, k, v = heads(T=9)
    ours = attention(q, k, v, scale=0.2, causal="top_left")
    theirs = F.scaled_dot_product_attention(q, k, v, scale=0.2, is_causal=True, enable_gqa=True)
    assert_close(ours, theirs)


@pytest.mark.parametrize("with_mask", [False, True])
def test_problem_draws_its_own_inputs(with_mask):
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool) if with_mask else None
    sinks = torch.zeros(4) if with_mask else None
    problem = attention.problem(*heads(), mask, sinks, scale=0.2, causal="top_left")
    args, kwargs = problem.sample(seed=0, device="cpu")
    assert describe(attention.problem(*args, **kwargs)) == describe(problem)


def test_work():
    causal = attention.problem(*heads(S=8, T=8), scale=0.2, causal="top_left")
    assert causal.flops() == 2 * 2 * 4 * 36 * (24 + 16)
    assert causal.bytes_moved() == 4 * 2 * 8 * (4 + 2) * (24 + 16)
    window = attention.problem(*heads(S=8, T=8), scale=0.2, causal="top_left", window=2)
    assert window.flops() == 2 * 2 * 4 * 15 * (24 + 16)
