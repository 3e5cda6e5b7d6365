"""`residual + linear(x)` as one product, where no norm has a better use for the sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import aiter_inductor
from tests.patterns.rewrite_check import check_rewrite

BF16 = torch.bfloat16


class Layer(nn.Module):
    def __init__(self, scheme, bias=True):
        super().__init__()
        self.linear = nn.Linear(256, 256, bias=bias, dtype=BF16)
        self.norm = nn.RMSNorm(256, eps=1e-6, dtype=BF16)
        aiter_inductor.quantize_(self, scheme).requires_grad_(False)

    def forward(self, x):
        return x + self.linear(x)


class Normed(Layer):
    def forward(self, x):
        return self.norm(x + self.linear(x))


class Twice(Layer):
    def forward(self, x):
        y = self.linear(x)
        return x + y, y


class Wider(Layer):
    def forward(self, x):
        return x.float() + self.linear(x)


def rows():
    return torch.randn(2, 5, 256, dtype=BF16)


def fused(found):
    return [d.match.op.name for d in found.decisions if d.match.op.name.startswith("gemm")]


@pytest.mark.parametrize("scheme", ["fp8_blockscale", "fp8_rowwise"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_is_added_in_the_product(scheme, bias, dynamic):
    quant = "quant_per_group" if scheme == "fp8_blockscale" else "quant_per_token"
    expect = {quant: 1, f"gemm_{scheme}": 1}
    found = check_rewrite(Layer(scheme, bias), rows(), expect=expect, dynamic=dynamic)
    assert fused(found) == [f"gemm_{scheme}_add"]


@pytest.mark.parametrize("kind", [Normed, Twice])
def test_is_left_where_others_read_the_terms(kind):
    expect = {"quant_per_group": 1, "gemm_fp8_blockscale": 1}
    expect |= {"rms_norm": 1} if kind is Normed else {}
    found = check_rewrite(kind("fp8_blockscale"), rows(), expect=expect)
    assert fused(found) == ["gemm_fp8_blockscale"]


def test_another_dtype_is_a_near_miss():
    with torch.no_grad():
        report = aiter_inductor.explain(Wider("fp8_blockscale"), rows(), target="gfx950")
    assert report.sites[-1].fused_into == "gemm_fp8_blockscale"
    sentence = "residual_into_gemm at linear: add adds float32 to bfloat16"
    assert sentence in report.notes


def test_hopper_adds_behind_the_product():
    with torch.no_grad():
        report = aiter_inductor.explain(Layer("fp8_blockscale"), rows(), target="sm_90")
    gemm = report.sites[-1]
    assert (gemm.pattern, gemm.fused_into) == ("gemm_fp8_blockscale", "gemm_fp8_blockscale")
