"""Quantised products in training: their numbers, and gradients of the dequantised ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.gemm import spread
from aiter_inductor.lowerings.gemm_training import TRAINED, TrainedGemmProblem

FN, INT8 = torch.float8_e4m3fn, torch.int8
BLOCKS = TrainedGemmProblem(
    M=6, N=200, K=320, dtype=FN, weight_dtype=FN, out_dtype=torch.float32, scaling="block",
    bias_dtype=torch.float32, group_size=128, block_n=128, block_k=128,
)  # fmt: skip
ROWS = replace(BLOCKS, scaling="row", group_size=0, block_n=0, block_k=0)
PROBLEMS = {
    "gemm_fp8_blockscale_straight_through": BLOCKS,
    "gemm_fp8_rowwise_straight_through": ROWS,
    "gemm_int8_straight_through": replace(ROWS, dtype=INT8, weight_dtype=INT8),
}
CASES = [(product, trained, PROBLEMS[trained.name]) for product, trained in TRAINED.items()]
every = pytest.mark.parametrize(("product", "op", "problem"), CASES, ids=PROBLEMS)


@every
@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,)])
def test_gradients_are_those_of_the_dequantised_linear(product, op, problem, leading):
    (wide, x, weight, x_scale, w_scale, bias), kwargs = problem.sample(seed=1, device="cpu")
    count = torch.Size(leading).numel()
    wide, x, x_scale = (t[:count].reshape(*leading, t.shape[-1]) for t in (wide, x, x_scale))
    wide, bias = wide.requires_grad_(), bias.requires_grad_()
    args = wide, x, weight, x_scale, w_scale, bias
    out = op(*args, **kwargs)
    assert torch.equal(out, product(*args[1:], **kwargs))
    grad = torch.randn(out.shape)
    got = torch.autograd.grad(out, (wide, bias), grad)
    factor = w_scale[:, None]
    if problem.scaling == "block":
        factor = spread(w_scale, (200, 320), (128, 128))
    # x is quantised from `wide`, exactly here, so the dequantised linear has the same result.
    plain = F.linear(wide, weight.float() * factor, bias)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=2e-5)
    wanted = torch.autograd.grad(plain, (wide, bias), grad)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@every
def test_the_product_decides_whether_a_kernel_takes_it(product, op, problem):
    cdna = Use(arch_named("gfx942"), training=True)
    assert op.select(problem, cdna).provider is op.providers["torch"]
    refused = op.select(replace(problem, dtype=torch.float16), cdna)
    assert "x is float16, which no kernel of this op reads" in refused.reason


@every
def test_hopper_leaves_few_rows_to_inductor(product, op, problem):
    found = op.select(problem, Use(arch_named("sm_90"), training=True))
    sentence = "M=6: 2048 rows of 4 x 4096 x 4096 take 1136 us a step on sm_90, Inductor 954"
    assert (found.reason, found.declined) == (f"torch: {sentence}", True)
    many = op.select(replace(problem, M=4096), Use(arch_named("sm_90"), training=True))
    by_rows = "torch: 4 x 4096 x 4096 x 4096 by rows took 1968 us a step on sm_90, Inductor 1889"
    taken = (op.providers["torch"], "torch takes it")
    wanted = taken if problem.scaling == "block" else (None, by_rows)
    assert (many.provider, many.reason) == wanted
    forced = op.select(problem, Use(arch_named("sm_90"), training=True, force=True))
    assert forced.provider is op.providers["torch"]


@every
def test_operator(product, op, problem):
    args, kwargs = problem.sample(seed=2, device="cpu")
    assert op.problem(*args, **kwargs) == problem
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)
