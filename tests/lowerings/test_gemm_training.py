"""The block-scaled product in training: its numbers, and gradients of the dequantised one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, spread
from aiter_inductor.lowerings.gemm_training import (
    TrainedGemmProblem,
    gemm_fp8_blockscale_straight_through,
)

FN = torch.float8_e4m3fn
PROBLEM = TrainedGemmProblem(
    M=6, N=200, K=320, dtype=FN, weight_dtype=FN, out_dtype=torch.float32, scaling="block",
    bias_dtype=torch.float32, group_size=128, block_n=128, block_k=128,
)  # fmt: skip


@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,)])
def test_gradients_are_those_of_the_dequantised_linear(leading):
    (wide, x, weight, x_scale, w_scale, bias), kwargs = PROBLEM.sample(seed=1, device="cpu")
    count = torch.Size(leading).numel()
    wide, x, x_scale = (t[:count].reshape(*leading, t.shape[-1]) for t in (wide, x, x_scale))
    wide, bias = wide.requires_grad_(), bias.requires_grad_()
    args = wide, x, weight, x_scale, w_scale, bias
    out = gemm_fp8_blockscale_straight_through(*args, **kwargs)
    assert torch.equal(out, gemm_fp8_blockscale(*args[1:], **kwargs))
    grad = torch.randn(out.shape)
    got = torch.autograd.grad(out, (wide, bias), grad)
    columns = weight.float() * spread(w_scale, (200, 320), (128, 128))
    # x is quantised from `wide`, exactly here, so the dequantised linear has the same result.
    plain = F.linear(wide, columns, bias)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(plain, (wide, bias), grad)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_product_decides_whether_a_kernel_takes_it():
    op = gemm_fp8_blockscale_straight_through
    cdna = Use(arch_named("gfx942"), training=True)
    assert op.select(PROBLEM, cdna).provider is op.providers["torch"]
    refused = op.select(replace(PROBLEM, dtype=torch.int8), cdna)
    assert "x is int8, which no kernel of this op reads" in refused.reason


def test_hopper_leaves_it_to_inductor():
    op = gemm_fp8_blockscale_straight_through
    found = op.select(PROBLEM, Use(arch_named("sm_90"), training=True))
    sentence = "a step of 4096 x 4096 x 4096 took 582 us on an H100 and Inductor's code 469"
    assert (found.reason, found.declined) == (f"torch: {sentence}", True)
    forced = op.select(PROBLEM, Use(arch_named("sm_90"), training=True, force=True))
    assert forced.provider is op.providers["torch"]


def test_operator():
    args, kwargs = PROBLEM.sample(seed=2, device="cpu")
    op = gemm_fp8_blockscale_straight_through
    assert op.problem(*args, **kwargs) == PROBLEM
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)
