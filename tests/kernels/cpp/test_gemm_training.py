"""The products of a training step, computed by the kernel that takes the product."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.cpp import gemm
from aiter_inductor.lowerings.gemm_training import (
    TrainedGemmProblem,
    gemm_fp8_blockscale_straight_through,
    gemm_fp8_rowwise_straight_through,
    gemm_int8_straight_through,
)

FN = torch.float8_e4m3fn
BLOCKS = TrainedGemmProblem(
    M=1, N=1024, K=1024, dtype=FN, weight_dtype=FN, out_dtype=torch.bfloat16,
    scaling="block", group_size=128, block_n=128, block_k=128,
)  # fmt: skip
ROWS = replace(BLOCKS, scaling="row", group_size=0, block_n=0, block_k=0)


@pytest.mark.parametrize(
    ("op", "problem"),
    [(gemm_fp8_blockscale_straight_through, BLOCKS), (gemm_fp8_rowwise_straight_through, ROWS)],
    ids=str,
)
def test_the_kernel_of_the_product_runs(op, problem):
    try:
        jit.find_compiler("host", jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    args, kwargs = problem.sample(seed=1, device="cpu")
    wide, product = args[0].requires_grad_(), op.name.removesuffix("_straight_through")
    with mock.patch.object(gemm, product, wraps=getattr(gemm, product)) as kernel:
        out = op(*args, **kwargs)
    assert kernel.call_count == 1
    wanted = op.reference(*args, **kwargs)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2**-7)
    out.sum().backward()
    assert wide.grad is not None
    assert wide.grad.shape == wide.shape


def test_a_product_without_a_kernel_has_none_in_training():
    problem = replace(ROWS, dtype=torch.int8, weight_dtype=torch.int8)
    found = gemm_int8_straight_through.select(problem, Use(arch_named("cpu")))
    assert found.provider is None
    args, kwargs = problem.sample(seed=1, device="cpu")
    wanted = gemm_int8_straight_through.reference(*args, **kwargs)
    assert torch.equal(gemm_int8_straight_through(*args, **kwargs), wanted)
