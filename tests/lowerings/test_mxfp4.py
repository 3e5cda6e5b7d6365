"""MXFP4: the format against its definition, products against float64, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.mxfp4 import (
    E2M1,
    MxGemmProblem,
    MxQuantProblem,
    dequantised,
    gemm_mxfp4,
    powers_of_two,
    quant_mxfp4,
)
from tests.lowerings.checks import opcheck

BF16 = torch.bfloat16
PROBLEM = MxGemmProblem(M=6, N=80, K=224, out_dtype=BF16, bias_dtype=torch.float32)


def decoded(packed, scale):
    """Element by element, in float64."""
    rows = packed.reshape(-1, packed.shape[-1]).tolist()
    powers = scale.reshape(-1, scale.shape[-1]).tolist()
    table = [*E2M1, *(-value for value in E2M1)]
    values = [[table[n] for byte in row for n in (byte & 15, byte >> 4)] for row in rows]
    factors = [[2.0 ** (code - 127) for code in row for _ in range(32)] for row in powers]
    return torch.tensor(values, dtype=torch.float64) * torch.tensor(factors, dtype=torch.float64)


def test_every_scale_is_torchs_e8m0():
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(powers_of_two(codes).nan_to_num(-1), theirs.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_quantises_to_the_nearest_element(dtype):
    torch.manual_seed(0)
    x = (torch.randn(40, 96) * torch.exp2(torch.randint(-20, 12, (40, 1)).float())).to(dtype)
    packed, scale = quant_mxfp4(x)
    groups = x.double().unflatten(-1, (3, 32))
    largest = groups.abs().amax(-1)
    assert torch.equal(scale.double() - 127, torch.floor(torch.log2(largest)) - 2)
    unit = groups / torch.exp2(scale.double() - 127)[..., None]
    elements = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    nearest = (unit.clamp(-6, 6)[..., None] - elements).abs().amin(-1).flatten(-2)
    got = decoded(packed, scale) / torch.exp2(scale.double() - 127).repeat_interleave(32, -1)
    assert torch.equal((unit.clamp(-6, 6).flatten(-2) - got).abs(), nearest)
    assert torch.equal(dequantised(packed, scale).double(), decoded(packed, scale))


def test_ties_go_to_the_even_code():
    halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9]
    x = torch.tensor([[4.0, *halves, *(-h for h in halves), *([0.0] * 15)]])
    packed, scale = quant_mxfp4(x)
    assert scale.item() == 127
    wanted = [4.0, 0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -1, -2, -2, -4, -4, -6, *([0.0] * 15)]
    assert decoded(packed, scale)[0].tolist() == wanted


def test_zeros_nan_and_infinity():
    x = torch.ones(4, 64)
    x[0, :32], x[1, 5], x[2, 5] = 0, torch.nan, -torch.inf
    packed, scale = quant_mxfp4(x)
    assert scale[:, 0].tolist() == [0, 255, 255, 125]
    out = dequantised(packed, scale)
    assert torch.equal(out[0, :32], torch.zeros(32))
    assert out[1:3, :32].isnan().all()
    assert torch.equal(out[:, 32:], torch.ones(4, 32))


@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,), ()])
def test_product(leading):
    (x, weight, x_scale, w_scale, bias), kwargs = PROBLEM.sample(seed=1, device="cpu")
    count = torch.Size(leading).numel()
    x, x_scale = (t[:count].reshape(*leading, t.shape[-1]) for t in (x, x_scale))
    exact = decoded(x, x_scale) @ decoded(weight, w_scale).T + bias.double() if count else None
    for out_dtype, near in ((BF16, 2**-8), (torch.float32, 1e-5)):
        out = gemm_mxfp4(x, weight, x_scale, w_scale, bias, out_dtype=out_dtype)
        assert (out.dtype, out.shape) == (out_dtype, (*leading, 80))
        if exact is not None:
            torch.testing.assert_close(out.double().reshape(-1, 80), exact, rtol=near, atol=near)
    typed = x.view(torch.float4_e2m1fn_x2), x_scale.view(torch.float8_e8m0fnu)
    again = gemm_mxfp4(typed[0], weight, typed[1], w_scale, bias, **kwargs)
    assert torch.equal(again, gemm_mxfp4(x, weight, x_scale, w_scale, bias, **kwargs))


def test_operators():
    args, kwargs = PROBLEM.sample(seed=2, device="cpu")
    assert gemm_mxfp4.problem(*args, **kwargs) == PROBLEM
    opcheck(gemm_mxfp4, args, kwargs)
    opcheck(quant_mxfp4, MxQuantProblem(5, 96, BF16).sample(seed=3, device="cpu")[0], {})


def test_sizes():
    assert PROBLEM.flops() == 2 * 6 * 80 * 224
    assert PROBLEM.bytes_moved() == 86 * (112 + 7) + 2 * 6 * 80 + 4 * 80
    assert MxQuantProblem(5, 96, BF16).bytes_moved() == 5 * (192 + 48 + 3)


@pytest.mark.parametrize("chip", ["gfx942", "sm_90", "cpu"])
def test_other_chips_have_no_such_products(chip):
    found = gemm_mxfp4.select(PROBLEM, Use(arch_named(chip)))
    assert found.reason == f"no gemm_mxfp4 kernel for {chip}: Inductor compiles it"


def test_refusals_are_sentences():
    use = Use(arch_named("gfx950"))
    assert gemm_mxfp4.select(PROBLEM, use).provider is gemm_mxfp4.providers["triton"]
    (x, weight, x_scale, w_scale, _), kwargs = PROBLEM.sample(seed=1, device="cpu")
    wrong = {
        "x has 224 elements a row and weight 192": (x, weight[:, :96], x_scale, w_scale),
        "K=208 is not made of groups of 32": (x[:, :104], weight[:, :104], x_scale, w_scale),
        "x_scale is [6, 5], x wants [6, 7]": (x, weight, x_scale[:, :5], w_scale),
        "x is int8, not uint8 or float4_e2m1fn_x2": (x.char(), weight, x_scale, w_scale),
        "bias is [7] but the result has 80 columns": (
            x, weight, x_scale, w_scale, torch.zeros(7)),
    }  # fmt: skip
    for sentence, args in wrong.items():
        found = gemm_mxfp4.select(gemm_mxfp4.problem(*args, **kwargs), use)
        assert found.reason == f"triton: {sentence}"
    odd = quant_mxfp4.select(quant_mxfp4.problem(torch.ones(3, 48)), use)
    assert odd.reason == "triton: N=48 is not made of groups of 32"
    double = quant_mxfp4.select(MxQuantProblem(3, 64, torch.float64), use)
    assert double.reason == "triton: x is float64, which no kernel reads"
    wide = gemm_mxfp4.select(replace(PROBLEM, out_dtype=torch.float64), use)
    assert wide.reason == "triton: no kernel writes float64"
