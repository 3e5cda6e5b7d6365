"""RMSNorm and LayerNorm: formulas against torch's own, gradients, and torch's checks of the ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Use
from aiter_inductor.core.problem import describe
from aiter_inductor.lowerings.norm import add_rms_norm, layer_norm, rms_norm
from tests.lowerings.checks import assert_close, gradcheck, opcheck, oracle

H200 = Use(arch_named("sm_90"))


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_formulas_agree_with_torch(dtype):
    x, w, b = rows(5, 96, dtype=dtype), rows(96, dtype=dtype, seed=1), rows(96, dtype=dtype, seed=2)
    exact = [t.double() for t in (x, w, b)]
    assert_close(rms_norm(x, w, 1e-6), F.rms_norm(exact[0], (96,), exact[1], 1e-6))
    assert_close(layer_norm(x, w, b, 1e-5), F.layer_norm(exact[0], (96,), *exact[1:], 1e-5))


def test_llama_rounds_before_the_weight():
    x, w = rows(7, 512, dtype=torch.bfloat16), rows(512, dtype=torch.bfloat16, seed=1)
    f = x.float()
    llama = w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    assert torch.equal(rms_norm(x, w, 1e-6, round_before_weight=True), llama)
    assert not torch.equal(rms_norm(x, w, 1e-6), llama)


def test_gemma_adds_one_to_the_weight():
    x, w = rows(7, 512, dtype=torch.bfloat16), rows(512, dtype=torch.bfloat16, seed=1)
    f = x.float()
    gemma = (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).to(
        x.dtype
    )
    assert torch.equal(rms_norm(x, w, 1e-6, weight_offset=1.0), gemma)


def test_the_sum_is_normalised_as_it_is_stored():
    x, r, w = rows(3, 64, dtype=torch.bfloat16), rows(3, 64, dtype=torch.bfloat16, seed=1), None
    out, total = add_rms_norm(x, r, w, 1e-6)
    assert torch.equal(total, x + r)
    assert torch.equal(out, rms_norm(x + r, w, 1e-6))


CASES = {
    "rms_norm": lambda x, r, w, b: (rms_norm, (x, w, 1e-5)),
    "rms_norm without weight": lambda x, r, w, b: (rms_norm, (x, None, 1e-5)),
    "add_rms_norm": lambda x, r, w, b: (add_rms_norm, (x, r, w, 1e-5)),
    "layer_norm": lambda x, r, w, b: (layer_norm, (x, w, b, 1e-5)),
    "layer_norm without bias": lambda x, r, w, b: (layer_norm, (x, w, None, 1e-5)),
    "layer_norm without weight": lambda x, r, w, b: (layer_norm, (x, None, b, 1e-5)),
}
FLAVOURS = [{}, {"weight_offset": 1.0}, {"round_before_weight": True}]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, flavour):
    op, args = CASES[case](rows(2, 3, 8), rows(2, 3, 8, seed=1), rows(8, seed=2), rows(8, seed=3))
    if flavour and op is layer_norm:
        pytest.skip("LayerNorm has one flavour")
    gradcheck(op, args, flavour)


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_bfloat16_keep_dtypes_and_values(case):
    given = [rows(6, 32), rows(6, 32, seed=1), rows(32, seed=2), rows(32, seed=3)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in given]
        op, args = CASES[case](*leaves)
        made = op(*args)
        made = made if isinstance(made, tuple) else (made,)
        loss = sum((m * torch.linspace(-1, 1, 32, dtype=m.dtype)).sum() for m in made)
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for low, exact in zip(*found, strict=True):
        if exact is not None:
            assert low.dtype is torch.bfloat16
            assert_close(low, exact, loosen=4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, grad):
    given = [rows(4, 3, 16), rows(4, 3, 16, seed=1), rows(16, seed=2), rows(16, seed=3)]
    op, args = CASES[case](*(t.requires_grad_(grad) for t in given))
    opcheck(op, args, {})


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_backward_ops_against_float64(name):
    op = OPS[f"{name}_backward"]
    problem = op.problem(*(rows(1, 8) for _ in range(2 + (name == "add_rms_norm"))), rows(8), 1e-6)
    args, kwargs = problem.sample(seed=0, device="cpu")
    opcheck(op, args, kwargs)
    assert_close(op(*args, **kwargs), oracle(op, args, kwargs))


@pytest.mark.parametrize(
    "x, weight, sentence",
    [
        (rows(4, 8).double(), None, "x is float64; row kernels read"),
        (rows(4, 16)[:, ::2], None, "the last dimension is strided"),
        (rows(4, 8).t().contiguous().t(), None, "rows lie transposed or overlap"),
        (rows(11).as_strided((4, 8), (1, 1)), None, "rows lie transposed or overlap"),
        (rows(4, 70000), None, "N=70000 is outside 1 to 65536"),
        (rows(4, 0), None, "N=0 is outside"),
        (rows(4, 8), rows(1), "weight is [1] but rows have 8 elements"),
        (rows(4, 8), rows(16)[::2], "weight has stride 2"),
        (torch.tensor(1.0), None, "x is a scalar"),
        (rows(4, 5, 6, 8).permute(2, 1, 0, 3)[::2], None, None),
        (rows(4, 5, 6, 8)[::2, ::2, ::2], None, "the rows need 3 nested loops"),
    ],
)
def test_refusals(x, weight, sentence):
    selection = rms_norm.select(rms_norm.problem(x, weight, 1e-6), H200)
    if sentence is None:
        assert selection.provider is not None, selection.reason
    else:
        assert selection.provider is None
        assert sentence in selection.reason


def test_refused_inputs_give_the_eager_result():
    assert_close(rms_norm(torch.tensor(3.0), None, 0.0), torch.tensor(1.0))
    assert rms_norm(rows(4, 0), None, 1e-6).shape == (4, 0)
    assert rms_norm(rows(0, 8), None, 1e-6).shape == (0, 8)


def test_a_residual_that_broadcasts_is_refused():
    problem = add_rms_norm.problem(rows(4, 8), rows(1, 8), None, 1e-6)
    assert "kernels do not broadcast" in add_rms_norm.select(problem, H200).reason


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_problem_draws_its_own_inputs(name):
    op = OPS[name]
    args = {"rms_norm": 1, "add_rms_norm": 2, "layer_norm": 1}[name]
    vectors = [rows(32).bfloat16()] * (1 + (name == "layer_norm"))
    problem = op.problem(*[rows(6, 32).bfloat16()] * args, *vectors, 1e-6)
    drawn, kwargs = problem.sample(seed=0, device="cpu")
    assert describe(op.problem(*drawn, **kwargs)) == describe(problem)
    op(*drawn, **kwargs)


def test_bytes_moved():
    x, w = rows(4096, 7168).bfloat16(), rows(7168).bfloat16()
    assert rms_norm.problem(x, w, 1e-6).bytes_moved() == 4096 * 7168 * 4
    assert add_rms_norm.problem(x, x, w, 1e-6).bytes_moved() == 4096 * 7168 * 8
