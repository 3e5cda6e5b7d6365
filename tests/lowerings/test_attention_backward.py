"""Attention's gradients: against differences of the formula, and against autograd through it."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_backward import attention_backward, attention_with_lse
from tests.lowerings.checks import assert_close, gradcheck, opcheck
from tests.lowerings.test_attention import heads

SMALL = {"B": 1, "H": 2, "KVH": 1, "S": 3, "T": 4, "D": 3, "Dv": 2}
WAYS = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right", "window": 2},
    {"softcap": 2.0, "causal": "top_left"},
]


@pytest.mark.parametrize("op", [attention, attention_with_lse], ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_gradient_is_the_formulas(op, how):
    gradcheck(op, heads(**SMALL), {"scale": 0.6, **how})


def test_gradients_of_sinks_and_of_a_broadcast_mask():
    sinks = torch.tensor([0.5, -1.0])
    mask = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(3))
    gradcheck(attention_with_lse, (*heads(**SMALL), mask, sinks), {"scale": 0.6})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_autograd_through_the_formula(dtype):
    args = [t.requires_grad_() for t in heads(S=9, T=9, dtype=dtype)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype, requires_grad=True)
    how = {"scale": 0.3, "causal": "top_left", "window": 4, "softcap": 3.0}
    exact = [t.detach().double().requires_grad_() for t in (*args, sinks)]
    out = attention(*args, None, sinks, **how)
    expected = attention.reference(*exact[:3], None, exact[3], **how)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, (*args, sinks), grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, loosen=4)


def test_rows_that_see_nothing_have_no_gradient():
    q, k, v = (t.requires_grad_() for t in heads())
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    mask[..., 2, :] = False
    out, lse = attention_with_lse(q, k, v, mask, scale=0.2)
    assert (lse[:, :, 2] == -torch.inf).all()
    dq, dk, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[:, :, 2] == 0).all()
    assert dk.isfinite().all()


def test_compiled_training():
    q, k, v = (t.requires_grad_() for t in heads(S=33, T=33))

    def step(q, k, v):
        return attention_with_lse(q, k, v, scale=0.2, causal="top_left")[0]

    out = torch.compile(step, fullgraph=True)(q, k, v)
    expected = attention.reference(q, k, v, scale=0.2, causal="top_left")
    assert_close(out, expected)
    got, wanted = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, loosen=8)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in heads(**SMALL))
    opcheck(attention_with_lse, (q, k, v), {"scale": 0.2, "causal": "top_left", "layout": "bshd"})
    opcheck(attention, (q, k, v), {"scale": 0.2})
    problem = attention_backward.problem(
        q, q, k, v, v, q[..., 0], scale=0.2, causal="top_left", softcap=4.0
    )
    args, kwargs = problem.sample(seed=0, device="cpu")
    opcheck(attention_backward, args, kwargs)


@pytest.mark.parametrize("op", [attention_with_lse, attention_backward], ids=str)
@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", torch.bfloat16), ("sm_90", torch.float32)])
def test_flash_takes_it(op, arch, dtype):
    q, k, v = heads(dtype=dtype)
    problem = attention_with_lse.problem(q, k, v, scale=0.2, window=3, causal="top_left")
    selection = op.select(problem, Use(arch_named(arch), training=op is attention_with_lse))
    assert selection.provider.name == "triton"
