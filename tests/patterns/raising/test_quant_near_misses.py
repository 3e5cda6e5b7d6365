"""Near misses of quantisation say why, with their values, and other casts are left alone."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.patterns.raising.quant_spellings import (
    FNUZ,
    INT8,
    Program,
    as_q,
    rows,
)
from tests.patterns.rewrite_check import check_rewrite


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def over(x, top, qdtype=FNUZ, **clamp):
    scale = x.float().abs().amax(-1, keepdim=True) / top
    return as_q(x / scale, qdtype), scale


def another_constant(x, qdtype):
    return over(x, 224.0)


def divided_by_inverse(x, qdtype):
    return as_q(x / (240.0 / x.float().abs().amax(-1, keepdim=True)), qdtype)


def scale_in_half(x, qdtype):
    return as_q(x / (x.abs().amax(-1, keepdim=True) / 240.0), qdtype)


def quotient_in_half(x, qdtype):
    scale = x.abs().max().float() / 240.0
    return as_q(x / scale, qdtype), scale


def eps_added(x, qdtype):
    return as_q(x / ((x.float().abs().amax(-1, keepdim=True) + 1e-6) / 240.0), qdtype)


def bounded_above(x, qdtype):
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6, max=10.0)
    return as_q(x / (amax / 240.0), qdtype)


def power_of_two(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 240.0
    return as_q(x / torch.exp2(torch.ceil(torch.log2(scale))), qdtype)


def zero_replaced(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 240.0
    return as_q(x / torch.where(scale == 0, 1.0, scale), qdtype)


def clamped_tighter(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 240.0
    return (x / scale).clamp(-200, 200).to(qdtype)


def integers_in_fp8(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 240.0
    return (x / scale).round().clamp(-240, 240).to(qdtype)


def narrowed_before(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 240.0
    return (x / scale).clamp(-240, 240).to(torch.bfloat16).to(qdtype)


def over_the_columns(x, qdtype):
    return as_q(x / (x.float().abs().amax(0, keepdim=True) / 240.0), qdtype)


def of_another_tensor(x, qdtype):
    return as_q(x / ((x.float() * 2).abs().amax(-1, keepdim=True) / 240.0), qdtype)


def straddling_rows(x, qdtype):
    groups = x.float().reshape(-1, 160)
    return as_q(groups / (groups.abs().amax(-1, keepdim=True) / 240.0), qdtype)


def bounded_by_tensor(x, qdtype):
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=x.float().mean())
    return as_q(x / (amax / 240.0), qdtype)


def truncated_int8(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x / scale).clamp(-127, 127).to(INT8), scale


def over_half_steps(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127).to(INT8), scale


def asymmetric_int8(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() + 3).clamp(-128, 127).to(INT8), scale


def asymmetric_uint8(x, qdtype):
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    return ((x - low) / ((high - low) / 255)).round().clamp(0, 255).to(torch.uint8)


def given_number(x, qdtype):
    return as_q(x.float() / 0.05, qdtype)


def given_for_each_row(x, qdtype):
    return as_q(x.float() / x.float().mean(-1, keepdim=True), qdtype)


def given_without_clamp(x, qdtype):
    return (x.float() / x.float().mean()).to(qdtype)


def given_to_part_of_int8(x, qdtype):
    return (x.float() / x.float().mean()).round().clamp(-100, 127).to(INT8)


def given_in_half(x, qdtype):
    return as_q(x / x.float().mean(), qdtype)


def given_half_scale(x, qdtype):
    return as_q(x.float() / x.mean(), qdtype)


def returned_as_wide_as_rows(x, qdtype):
    scale = (x.float().abs().amax(-1, keepdim=True) / 240.0).expand_as(x)
    return as_q(x.float() / scale, qdtype), scale


TAKES = "kernels for float8_e4m3fnuz take"
MISSES = {
    another_constant: f"the scale is amax / 224, {TAKES} amax / 240",
    divided_by_inverse: "x is divided by 240 / amax",
    scale_in_half: "the scale is computed in bfloat16; kernels compute it in float32",
    quotient_in_half: "x over its scale is rounded to bfloat16 before the cast",
    eps_added: "1e-06 is added to the scale; kernels take a lower bound of amax",
    bounded_above: "the scale is clamped to keep amax below 10",
    power_of_two: "the scale passes through exp2, which no kernel computes",
    zero_replaced: "the scale passes through where, which no kernel computes",
    clamped_tighter: "the clamp is to [-200, 200], kernels keep ±240",
    integers_in_fp8: "x over its scale is rounded to integers before the cast to float8_e4m3fnuz",
    narrowed_before: "x over its scale is rounded to bfloat16 before the cast",
    over_the_columns: "the largest magnitude is over dimensions 0, not the last or all",
    of_another_tensor: "add is divided by a scale that comes from mul",
    straddling_rows: "group_size 160 does not divide N=256",
    bounded_by_tensor: "the scale is clamped by a tensor, not by a number known when compiling",
    truncated_int8: "the cast to int8 truncates; kernels round to the nearest integer",
    over_half_steps: "the scale is amax / 127.5, kernels for int8 take amax / 127",
    asymmetric_int8: "asymmetric: the zero point 3 is added, kernels have none",
    asymmetric_uint8: "asymmetric: uint8 has a zero point, kernels write int8 around zero",
    given_number: "the scale is the number 0.05, kernels read it from a tensor",
    given_for_each_row: "the given scale has shape [2, 5, 1], kernels take one element",
    given_without_clamp: "the clamp is to [-inf, inf], kernels clamp to [-240, 240]",
    given_to_part_of_int8: "the clamp is to [-100, 127], kernels clamp to [-127, 127]",
    given_in_half: "x over its scale is rounded to bfloat16 before the cast",
    given_half_scale: "the scale is bfloat16, kernels read float32",
    returned_as_wide_as_rows: "the scale is shaped [2, 5, 256]",
}


@pytest.mark.parametrize("program", MISSES, ids=lambda f: f.__name__)
def test_near_misses_say_why(program):
    found = check_rewrite(Program(program, FNUZ, torch.bfloat16), rows(torch.bfloat16), expect={})
    assert [m.reason for m in found.misses if m.pattern.startswith("quant")] == [MISSES[program]]


def plain_cast(x, qdtype):
    return x.to(qdtype)


def mask(x, qdtype):
    return (x > 0).to(INT8)


def scaled_indices(x, qdtype):
    return (torch.arange(8) * 2).to(INT8)


def norm_then_cast(x, qdtype):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)


def clamp_then_integers(x, qdtype):
    return x.float().clamp(-128, 127).round().to(INT8)


@pytest.mark.parametrize(
    "program",
    [plain_cast, mask, scaled_indices, clamp_then_integers],
    ids=lambda f: f.__name__,
)
def test_other_casts_are_left_alone(program):
    found = check_rewrite(Program(program, FNUZ, torch.bfloat16), rows(torch.bfloat16), expect={})
    assert [m.reason for m in found.misses if m.pattern.startswith("quant")] == []


def test_a_norm_is_no_quantisation():
    check_rewrite(Program(norm_then_cast, FNUZ, torch.bfloat16), rows(torch.bfloat16),
                  expect={"rms_norm": 1})  # fmt: skip


def decomposed(x, scale, zero_point, qdtype):
    return torch.ops.quantized_decomposed.quantize_per_tensor(
        x.float(), scale, zero_point, -128, 127, INT8
    )


def decomposed_per_token(x, qdtype):
    scales, zero_points = torch.ops.quantized_decomposed.choose_qparams_per_token(x, INT8)
    return torch.ops.quantized_decomposed.quantize_per_token(
        x, scales, zero_points, -128, 127, INT8
    )


def decomposed_per_channel(x, qdtype):
    scales, zero_points = torch.ones(x.shape[-1]), torch.zeros(x.shape[-1], dtype=torch.int64)
    return torch.ops.quantized_decomposed.quantize_per_channel(
        x.float(), scales, zero_points, x.dim() - 1, -128, 127, INT8
    )


def fake_quantised(x, qdtype):
    return torch.fake_quantize_per_tensor_affine(x.float(), 0.05, 0, -128, 127)


@pytest.mark.parametrize(
    ("program", "args", "reason"),
    [
        (
            decomposed_per_channel,
            (),
            "its scales are given by channel, kernels compute one for each row",
        ),
        (fake_quantised, (), "it gives floats again, kernels write eight bits"),
        (decomposed, (0.05, 0), "the scale is the number 0.05, kernels read it from a tensor"),
        (decomposed, (0.05, 3), "asymmetric: the zero point 3 is added, kernels have none"),
        (
            decomposed_per_token,
            (),
            "the zero points zero_points are a tensor, not known to be 0 when compiling",
        ),
    ],
)
def test_decomposed_operators_say_why(program, args, reason):
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    model = Program(program, INT8, torch.float32, *args)
    found = check_rewrite(model, rows(torch.float32), expect={})
    assert [m.reason for m in found.misses if m.pattern.startswith("quant")] == [reason]
