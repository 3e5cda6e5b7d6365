"""MXFP4 in plain PyTorch, and by this package's operators: hits and near misses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.lowerings.mxfp4 import quant_mxfp4
from tests.patterns.rewrite_check import check_rewrite

BF16 = torch.bfloat16
TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
N, K = 48, 96


def numbers(packed, table, dtype=torch.float32):
    values = torch.tensor(table, dtype=dtype, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return values[codes.long()]


def by_exponent(packed, scale, table=TABLE):
    groups = numbers(packed, table).unflatten(-1, (-1, 32))
    return (groups * torch.exp2(scale.float() - 127)[..., None]).flatten(-2)


def by_e8m0(packed, scale, table=TABLE):
    spread = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, -1)
    return numbers(packed, table) * spread


def operands(*leading):
    torch.manual_seed(0)
    x = quant_mxfp4(torch.randn(*leading, K))
    weight = quant_mxfp4(torch.randn(N, K))
    return x[0], weight[0], x[1], weight[1]


@pytest.mark.parametrize("dequantise", [by_exponent, by_e8m0])
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_dequantised_linear(dequantise, leading, bias):
    b = torch.randn(N) if bias else None

    def program(x, w, s, t):
        return F.linear(dequantise(x, s), dequantise(w, t), b).to(BF16)

    check_rewrite(program, *operands(*leading), expect={"gemm_mxfp4": 1}, target="gfx950")


def test_product_with_the_transpose():
    def program(x, w, s, t):
        return by_exponent(x, s) @ by_exponent(w, t).T

    check_rewrite(program, *operands(5), expect={"gemm_mxfp4": 1}, target="gfx950")


def test_operators():
    def program(x, w, t):
        packed, scale = torch.ops.aiter_inductor.quant_mxfp4(x)
        return torch.ops.aiter_inductor.gemm_mxfp4(packed, w, scale, t)

    _, w, _, t = operands(5)
    expect = {"quant_mxfp4": 1, "gemm_mxfp4": 1}
    check_rewrite(program, torch.randn(5, K), w, t, expect=expect, target="gfx950")


def test_what_two_linears_read_is_quantised_once():
    def program(x, w, t):
        outs = []
        for _ in range(2):
            packed, scale = torch.ops.aiter_inductor.quant_mxfp4(x)
            outs.append(torch.ops.aiter_inductor.gemm_mxfp4(packed, w, scale, t))
        return outs

    _, w, _, t = operands(5)
    expect = {"quant_mxfp4": 2, "gemm_mxfp4": 2}
    check_rewrite(program, torch.randn(5, K), w, t, expect=expect, inserted=3, target="gfx950")


def by_groups_of_16(packed, scale):
    return numbers(packed, TABLE) * torch.exp2(scale.float() - 127).repeat_interleave(16, -1)


def by_any_scale(packed, scale):
    return numbers(packed, TABLE) * (scale.float() / 64).repeat_interleave(32, -1)


NEAR_MISSES = {
    "x in bf16": (
        lambda x, w, s, t: F.linear(x.float()[:, :1].expand(-1, K), by_exponent(w, t)),
        "x, expand, is not in MXFP4; kernels multiply two such operands",
    ),
    "another scale": (
        lambda x, w, s, t: F.linear(by_any_scale(x, s), by_exponent(w, t)),
        "truediv is not known to be a power of two that a byte holds",
    ),
    "groups of 16": (
        lambda x, w, s, t: F.linear(
            by_groups_of_16(x, s.repeat_interleave(2, -1)), by_exponent(w, t)
        ),
        "exp2 is not multiplied with 32 elements of each row",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case):
    program, sentence = NEAR_MISSES[case]
    found = check_rewrite(program, *operands(5), expect={}, inserted=0, target="gfx950")
    assert sentence in found.reasons()


def test_another_table_is_none():
    def program(x, w, s, t):
        other = [*TABLE[:7], 8.0, *TABLE[8:]]
        return F.linear(by_exponent(x, s, other), by_exponent(w, t, other))

    assert not check_rewrite(program, *operands(5), expect={}, inserted=0).reasons()
