"""One quantisation for all linears that read the same rows, and the norm before it taken in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import aiter_inductor
from tests.patterns.fusion.test_into_quant import (
    FP8,
    QMAX,
    op_names,
    per_group,
    per_token,
    rms,
    rows,
)
from tests.patterns.rewrite_check import check_rewrite


def linear(y: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    q, of_rows = per_token(y)
    wide = (q.float() * of_rows).to(y.dtype)
    return F.linear(wide, (weight.float() * scale).to(y.dtype))


def weights(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 256, generator=generator).to(FP8) for _ in range(number)]


def test_several_linears_read_one_quantisation() -> None:
    def program(x: Tensor, scale: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return linear(x, a, scale), linear(x, b, scale), linear(x, c, scale), x.sum(-1)

    done = check_rewrite(
        program,
        rows(),
        torch.rand(32, 1) / 100,
        *weights(3),
        expect={"quant_per_token": 3, "gemm_fp8_rowwise": 3},
        inserted=4,
    )
    assert op_names(done) == ["quant_per_token"] + ["gemm_fp8_rowwise"] * 3


def test_the_norm_before_them_is_taken_in() -> None:
    def program(x: Tensor, weight: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = rms(x, weight)
        return linear(y, a, scale) + linear(y, b, scale)

    done = check_rewrite(
        program,
        rows(),
        rows(256),
        torch.rand(32, 1) / 100,
        *weights(2),
        expect={"rms_norm": 1, "quant_per_token": 2, "gemm_fp8_rowwise": 2},
        inserted=3,
    )
    assert op_names(done)[0] == "rms_norm_quant"


def test_another_group_size_or_floor_is_another_quantisation() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        floor = (x.float().abs().amax(-1, keepdim=True).clamp(min=1e-3)) / QMAX
        return *per_token(x), *per_group(x), (x.float() / floor).clamp(-QMAX, QMAX).to(FP8), floor

    done = check_rewrite(program, rows(), expect={"quant_per_token": 2, "quant_per_group": 1})
    assert len(op_names(done)) == 3


def test_a_write_between_two_keeps_them_apart() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        first = per_token(x)
        x.add_(1)
        return *first, *per_token(x)

    done = check_rewrite(program, rows(), expect={"quant_per_token": 2})
    assert op_names(done) == ["quant_per_token"] * 2


def test_a_converted_block_of_linears_quantises_once() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(256, n, bias=False) for n in (256, 128, 128))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model = aiter_inductor.quantize_(Attention().bfloat16(), "fp8_blockscale")
    report = aiter_inductor.explain(model, torch.randn(8, 256).bfloat16(), target="gfx950")
    quants = [site for site in report.sites if site.pattern == "quant_per_group"]
    assert [site.status for site in quants] == ["fused"] * 3
