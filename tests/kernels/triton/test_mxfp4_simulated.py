"""MXFP4 as gfx950 machine code: the instruction it is for, and its numbers."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.kernels.triton import mxfp4
from aiter_inductor.kernels.triton.simulated import simulating
from aiter_inductor.lowerings.mxfp4 import dequantised
from aiter_inductor.lowerings.mxfp4 import quant_mxfp4 as quantise


@pytest.mark.parametrize(("M", "N", "K"), [(1, 80, 1024), (70, 144, 96)])
def test_gemm_mxfp4(M, N, K):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    of_weight = quantise(weight)
    with simulating("gfx950") as launched:
        of_x = mxfp4.quant_mxfp4(x)
        operands = of_x[0], of_weight[0], of_x[1], of_weight[1]
        out = mxfp4.gemm_mxfp4(*operands, bias, out_dtype=torch.float32)
    assert "v_mfma_scale_f32_" in launched[1].listing
    assert len(launched) == (3 if M == 1 else 2), "one row of 1024 is cut along K"
    for got, wanted in zip(of_x, quantise(x), strict=True):
        assert torch.equal(got, wanted)
    exact = dequantised(*of_x).double() @ dequantised(*of_weight).double().T + bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


def test_quant_mxfp4_of_ties_and_extremes():
    """Every sign and exponent of bf16, ties, zeros, NaN and infinities."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    steps = torch.arange(-32, 32) / 4
    x = torch.cat((every.float(), steps, steps * 2.0**-126)).reshape(-1, 32)
    with simulating("gfx950"):
        got = mxfp4.quant_mxfp4(x)
    for ours, theirs in zip(got, quantise(x), strict=True):
        assert torch.equal(ours, theirs)
