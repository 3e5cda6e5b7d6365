"""Packed attention: each sequence is attention by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_varlen import attention_varlen
from aiter_inductor.lowerings.attention_varlen_backward import (
    attention_varlen_backward,
    attention_varlen_with_lse,
)
from tests.lowerings.checks import assert_close, gradcheck, opcheck

LENGTHS = [(3, 3), (0, 4), (5, 2), (1, 6), (4, 0)]
H, KVH, D, DV = 4, 2, 16, 8
HOW = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right", "window": 2},
    {"softcap": 2.0, "window": 3},
]


def packed(lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
    total_q, total_k = starts[-1].tolist()
    shapes = (total_q, H, D), (total_k, KVH, D), (total_k, KVH, DV)
    heads = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return *heads, starts[:, 0].contiguous(), starts[:, 1].contiguous()


def one_by_one(q, k, v, starts, key_starts, sinks=None, **how):
    out = []
    for (a, b), (c, d) in zip(
        pairwise(starts),
        pairwise(key_starts),
        strict=True,
    ):
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        out.append(attention.reference(*parts, None, sinks, **how)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_formula(how, with_sinks):
    args = packed(LENGTHS, torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    out = attention_varlen(*args, sinks, max_seqlen_q=5, scale=0.3, **how)
    assert_close(out, one_by_one(*args, sinks, scale=0.3, **how))


def test_refusals():
    q, k, v, starts, key_starts = packed(LENGTHS, torch.bfloat16)
    problem = attention_varlen.problem(q, k, v, starts, key_starts[1:], max_seqlen_q=5, scale=0.3)
    reason = attention_varlen.select(problem, Use(arch_named("gfx942"))).reason
    assert "5 sequences of queries, 4 of keys" in reason


def test_opcheck():
    how = {"max_seqlen_q": 5, "scale": 0.3}
    opcheck(attention_varlen, packed(LENGTHS), how)
    q, k, v, *starts = packed(LENGTHS)
    opcheck(attention_varlen_with_lse, (*(x.requires_grad_() for x in (q, k, v)), *starts), how)
    problem = attention_varlen_backward.problem(q, q, k, v, v, q, *starts, **how, causal="top_left")
    opcheck(attention_varlen_backward, *problem.sample(seed=0, device="cpu"))


@pytest.mark.parametrize("op", [attention_varlen, attention_varlen_with_lse], ids=str)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_gradient_is_the_formulas(op, how):
    args = packed([(2, 2), (0, 1), (1, 3)], torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    gradcheck(op, (*args, sinks), {"max_seqlen_q": 2, "scale": 0.3, **how})
