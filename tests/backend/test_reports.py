"""What a report says is missing, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import aiter_inductor
from aiter_inductor import Report
from aiter_inductor.core.report import Site

FP8 = torch.float8_e4m3fnuz
QMAX = torch.finfo(FP8).max


def explain(model: Callable[..., Any], *args: Any) -> Report:
    return aiter_inductor.explain(model, *args, target="gfx942")


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def per_token(x: torch.Tensor) -> Any:
    scale = x.abs().amax(-1, keepdim=True) / QMAX
    return (x / scale).clamp(-QMAX, QMAX).to(FP8), scale


def per_column(x: torch.Tensor) -> Any:
    scale = x.abs().amax(0, keepdim=True) / QMAX
    return (x / scale).clamp(-QMAX, QMAX).to(FP8), scale


def largest_value_not_magnitude(x: torch.Tensor) -> Any:
    scale = x.amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def reciprocal_power_of_two(x: torch.Tensor) -> Any:
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / QMAX)))
    return (x * scale.reciprocal()).to(FP8), scale


def zero_point(x: torch.Tensor) -> Any:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() + 3).clamp(-127, 127).to(torch.int8), scale


class Static(torch.nn.Module):
    def __init__(self, bound: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))
        self.bound = bound

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / self.scale).clamp(-self.bound, self.bound).to(FP8)


def by_number(x: torch.Tensor) -> torch.Tensor:
    return (x / 0.02).clamp(-QMAX, QMAX).to(FP8)


def by_inverse_number(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x.float() * 50.0, -QMAX, QMAX).to(FP8)


def quants(report: Report) -> list[Site]:
    return [site for site in report.sites if site.pattern.startswith("quant")]


@pytest.mark.parametrize("program", [per_token, Static(QMAX)])
def test_a_recognised_quantisation_is_no_miss(program: Callable[..., Any]) -> None:
    (site,) = quants(explain(program, rows(8, 64)))
    assert site.status == "fused", site


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (per_column, "the largest magnitude is over dimensions 0, not the last"),
        (largest_value_not_magnitude, "the given scale has shape [8, 1]"),
        (reciprocal_power_of_two, "the scale passes through exp2, which no kernel computes"),
        (zero_point, "asymmetric: the zero point 3 is added"),
        (by_number, "the scale is the number 0.02, kernels read it from a tensor"),
        (by_inverse_number, "the scale is the number 50.0, kernels read it from a tensor"),
        (Static(3.0), "the clamp is to [-3, 3], kernels clamp to [-240, 240]"),
    ],
)
def test_a_quantisation_nobody_recognised_is_missed(
    program: Callable[..., Any], sentence: str
) -> None:
    (site,) = quants(explain(program, rows(8, 64)))
    assert site.status == "missed"
    assert sentence in site.reason
    assert site.source.startswith("test_reports.py:")


def mask(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(torch.int8)


def plain_cast(x: torch.Tensor) -> torch.Tensor:
    return x.to(FP8)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return (x * 10).round().clamp(-127, 127).to(torch.int8)


def weighted(x: torch.Tensor) -> torch.Tensor:
    return (x * x.mean(-1, keepdim=True)).to(FP8)


def bounded(x: torch.Tensor) -> torch.Tensor:
    return (x * 10).clamp(-3, 3).to(FP8)


def already_integer(x: torch.Tensor) -> torch.Tensor:
    return x.argmax(-1).clamp(0, 100).to(torch.int8)


def normalised_image(x: torch.Tensor) -> torch.Tensor:
    return (x / x.amax() * 255).to(torch.uint8)


@pytest.mark.parametrize(
    "program", [mask, plain_cast, rounded, bounded, weighted, already_integer, normalised_image]
)
def test_plain_casts_are_no_quantisations(program: Callable[..., Any]) -> None:
    assert quants(explain(program, rows(8, 64))) == []


def test_operators_of_torch_ao_are_missed() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)

    import torch.ao.quantization.fx._decomposed

    (site,) = quants(explain(run, rows(8, 64)))
    assert (site.pattern, site.status) == ("quant_static", "missed")
    assert "the scale is the number 0.1" in site.reason


class FlatAttention(torch.nn.Module):
    """Batch and heads as one dimension, as XGLM and Bloom have them."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.softmax(torch.bmm(q, q.transpose(1, 2)), -1), q)


class Mixture(FlatAttention):
    """The same under a name that promises nothing."""


class PlainLayerNorm(torch.nn.Module):
    """An RMSNorm under T5's name for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def within(module: torch.nn.Module, *sizes: int) -> tuple[Site, ...]:
    return explain(torch.nn.Sequential(module), rows(*sizes)).sites


def test_attention_in_an_unread_spelling_is_missed_where_a_name_promises_it() -> None:
    (site,) = within(FlatAttention(), 4, 8, 16)
    assert (site.pattern, site.status, site.module) == ("attention", "missed", "0")
    assert site.reason == "its scores have 3 dimensions, not 4"
    assert within(Mixture(), 4, 8, 16) == ()


def test_a_layer_norm_without_a_mean_is_an_rms_norm_and_no_miss() -> None:
    (site,) = within(PlainLayerNorm(), 4, 64)
    assert (site.pattern, site.status) == ("rms_norm", "fused")
