"""The block-scaled product of a training step, computed by the kernel that takes the product."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.kernels.cpp import gemm
from aiter_inductor.lowerings.gemm_training import (
    TrainedGemmProblem,
    gemm_fp8_blockscale_straight_through,
)

FN = torch.float8_e4m3fn


def test_the_kernel_of_the_product_runs():
    try:
        jit.find_compiler("host", jit.default_settings())
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    problem = TrainedGemmProblem(
        M=1, N=1024, K=1024, dtype=FN, weight_dtype=FN, out_dtype=torch.bfloat16,
        scaling="block", group_size=128, block_n=128, block_k=128,
    )  # fmt: skip
    args, kwargs = problem.sample(seed=1, device="cpu")
    wide = args[0].requires_grad_()
    run = gemm.gemm_fp8_blockscale
    with mock.patch.object(gemm, "gemm_fp8_blockscale", wraps=run) as kernel:
        out = gemm_fp8_blockscale_straight_through(*args, **kwargs)
    assert kernel.call_count == 1
    wanted = gemm_fp8_blockscale_straight_through.reference(*args, **kwargs)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2**-7)
    out.sum().backward()
    assert wide.grad is not None
    assert wide.grad.shape == wide.shape
