"""Quantisation: spellings are recognised, near misses say why, and other casts are left alone."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.patterns.rewrite_check import check_rewrite

FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8
N, G = 256, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def limit(qdtype):
    return 127.0 if qdtype == INT8 else torch.finfo(qdtype).max


def as_q(y, qdtype):
    """The usual end: round for int8, clamp to the symmetric range, cast."""
    top = limit(qdtype)
    return (y.round() if qdtype == INT8 else y).clamp(-top, top).to(qdtype)


def amax_kept(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x.float() / scale, qdtype), scale


def amax_before_upcast(x, qdtype):
    scale = x.abs().amax(dim=-1, keepdim=True).to(torch.float32) / limit(qdtype)
    return as_q(x / scale, qdtype), scale


def max_values(x, qdtype):
    scale = x.abs().max(dim=-1, keepdim=True).values.float() / limit(qdtype)
    return as_q(x * (1.0 / scale), qdtype), scale


def max_first(x, qdtype):
    scale = torch.max(x.float().abs(), -1, True)[0] * (1.0 / limit(qdtype))
    return as_q(x * scale.reciprocal(), qdtype), scale


def max_squeezed(x, qdtype):
    scale = x.float().abs().max(-1)[0].div(limit(qdtype))
    return as_q(x.float() / scale.unsqueeze(-1), qdtype), scale


def max_indexed(x, qdtype):
    scale = torch.amax(torch.abs(x.float()), dim=-1) / limit(qdtype)
    return as_q(x.float() / scale[..., None], qdtype), scale


def squeezed_for_return(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype), scale.squeeze(-1)


def two_ends(x, qdtype):
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = torch.maximum(low.abs(), high.abs()).float() / limit(qdtype)
    return as_q(x / scale, qdtype), scale


def two_reductions(x, qdtype):
    amax = torch.max(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()
    return as_q(x * (limit(qdtype) / amax), qdtype), amax / limit(qdtype)


def vector_norm(x, qdtype):
    amax = torch.linalg.vector_norm(x.float(), ord=float("inf"), dim=-1, keepdim=True)
    return as_q(x.float() / (amax / limit(qdtype)), qdtype), amax / limit(qdtype)


def norm_method(x, qdtype):
    scale = x.float().norm(p=float("inf"), dim=-1, keepdim=True) / limit(qdtype)
    return as_q(x.float() / scale, qdtype), scale


def inverse_returned(x, qdtype):
    inverse = limit(qdtype) / x.abs().amax(-1, keepdim=True).float()
    return as_q(x.float() * inverse, qdtype), inverse


def both_returned(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    inverse = 1 / scale
    return as_q(x * inverse, qdtype), scale, inverse


def nothing_returned(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype)


def clamp_in_two(x, qdtype):
    top, scale = limit(qdtype), x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    y = x / scale if qdtype != INT8 else torch.round(x / scale)
    return y.clamp_min(-top).clamp_max(max=top).to(qdtype), scale


def no_clamp(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return (x / scale).to(qdtype) if qdtype != INT8 else (x / scale).round().to(qdtype), scale


def clamped_to_all_of_int8(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    low = -128 if qdtype == INT8 else -limit(qdtype)
    y = torch.clamp(x / scale, min=low, max=limit(qdtype))
    return (y.round() if qdtype == INT8 else y).to(dtype=qdtype), scale


def amax_bounded(x, qdtype):
    amax = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-4)
    return as_q(x * (limit(qdtype) / amax), qdtype), amax / limit(qdtype)


def amax_bounded_by_maximum(x, qdtype):
    amax = torch.maximum(x.float().abs().amax(-1, keepdim=True), torch.tensor(1e-4))
    return as_q(x / (amax / limit(qdtype)), qdtype), amax / limit(qdtype)


def scale_bounded(x, qdtype):
    scale = (x.float().abs().amax(-1, keepdim=True) / limit(qdtype)).clamp_min(1e-6)
    return as_q(x / scale, qdtype), scale


def inverse_bounded(x, qdtype):
    inverse = (limit(qdtype) / x.float().abs().amax(-1, keepdim=True)).clamp(max=1e6)
    return as_q(x * inverse, qdtype), inverse.reciprocal()


def dequantised_again(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype).to(torch.float32) * scale


def spread_out(x, qdtype):
    scale = x.float().abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(x / scale.expand_as(x), qdtype), scale


PER_TOKEN = {
    f.__name__: f
    for f in (
        amax_kept, amax_before_upcast, max_values, max_first, max_squeezed, max_indexed,
        squeezed_for_return, two_ends, two_reductions, vector_norm, norm_method, inverse_returned,
        both_returned, nothing_returned, clamp_in_two, no_clamp, clamped_to_all_of_int8,
        amax_bounded, amax_bounded_by_maximum, scale_bounded, inverse_bounded, dequantised_again,
        spread_out,
    )
}  # fmt: skip


def grouped_view(x, qdtype):
    groups = x.float().view(*x.shape[:-1], x.shape[-1] // G, G)
    scale = groups.abs().amax(-1, keepdim=True) / limit(qdtype)
    return as_q(groups / scale, qdtype).view(x.shape), scale.squeeze(-1)


def grouped_unflatten(x, qdtype):
    groups = x.unflatten(-1, (-1, G))
    scale = groups.abs().amax(-1).float() / limit(qdtype)
    return as_q(groups / scale.unsqueeze(-1), qdtype).flatten(-2), scale


def grouped_flat(x, qdtype):
    groups = x.reshape(-1, G)
    amax = groups.abs().max(dim=-1, keepdim=True)[0].float().clamp(min=1e-10)
    scale = amax / limit(qdtype)
    q = as_q(groups / scale, qdtype).reshape(x.shape)
    return q, scale.reshape(*x.shape[:-1], x.shape[-1] // G)


def grouped_left_in_groups(x, qdtype):
    groups = x.view(-1, x.shape[-1] // G, G)
    scale = groups.abs().float().amax(dim=2) / limit(qdtype)
    return as_q(groups * (1.0 / scale[:, :, None]), qdtype), scale


def deepseek(x, qdtype):
    rows = x.reshape(-1, x.shape[-1])
    groups = rows.view(rows.shape[0], -1, G)
    amax = groups.abs().float().amax(dim=2).view(rows.shape[0], -1).clamp(1e-4)
    q = groups * (limit(qdtype) / amax.unsqueeze(2))
    q = (q.round() if qdtype == INT8 else q).to(qdtype).view(rows.shape)
    return q, (amax / limit(qdtype)).view(rows.shape[0], -1)


def grouped_repeated(x, qdtype):
    scale = x.float().unflatten(-1, (-1, G)).abs().amax(-1) / limit(qdtype)
    return as_q(x / scale.repeat_interleave(G, dim=-1), qdtype), scale


def grouped_scale_bounded(x, qdtype):
    groups = x.float().unflatten(-1, (x.shape[-1] // G, G))
    scale = torch.clamp(groups.abs().amax(-1, keepdim=True) / limit(qdtype), min=1e-6)
    return as_q(groups / scale, qdtype).reshape(x.shape), scale


PER_GROUP = {
    f.__name__: f
    for f in (
        grouped_view, grouped_unflatten, grouped_flat, grouped_left_in_groups, deepseek,
        grouped_repeated, grouped_scale_bounded,
    )
}  # fmt: skip


def whole_max(x, qdtype):
    scale = x.abs().max().float() / limit(qdtype)
    return as_q(x.float() / scale, qdtype), scale


def whole_amax(x, qdtype):
    scale = (x.float().abs().amax() / limit(qdtype)).clamp(min=1e-9)
    return as_q(x.float() / scale, qdtype), scale


def whole_vector(x, qdtype):
    amax = x.flatten().abs().max().float()
    return as_q(x.float() * (limit(qdtype) / amax), qdtype), (amax / limit(qdtype)).reshape(1)


def whole_ends(x, qdtype):
    low, high = x.float().aminmax()
    scale = torch.max(high, -low) / limit(qdtype)
    return as_q(x.float() * scale.reciprocal(), qdtype), scale.view(1)


def whole_with_dims(x, qdtype):
    scale = x.float().abs().amax((0, 1, 2), keepdim=True) / limit(qdtype)
    return as_q(x / scale, qdtype), scale


PER_TENSOR = {
    f.__name__: f for f in (whole_max, whole_amax, whole_vector, whole_ends, whole_with_dims)
}


def given_scalar(x, scale, qdtype):
    return as_q(x.float() / scale, qdtype)


def given_inverse(x, scale, qdtype):
    return as_q(x.float() * (1.0 / scale), qdtype)


def given_reciprocal(x, scale, qdtype):
    return as_q(scale.reciprocal() * x.float(), qdtype)


def given_quantising(x, scale, qdtype):
    return as_q(x.to(torch.float32) * scale, qdtype)


STATIC = {f.__name__: f for f in (given_scalar, given_inverse, given_reciprocal, given_quantising)}


class Program(torch.nn.Module):
    """A spelling whose row length is known under `dynamic=True` too."""

    def __init__(self, spelling, qdtype, dtype, *args):
        super().__init__()
        self.spelling, self.qdtype, self.args = spelling, qdtype, args
        self.shift = torch.nn.Parameter(torch.zeros(N, dtype=dtype))

    def forward(self, x):
        return self.spelling(x + self.shift, *self.args, self.qdtype)


def rows(dtype, mode="static", *, lead=(2, 5)):
    x = torch.randn(*lead, N).to(dtype)
    if mode == "mark_dynamic":
        torch._dynamo.mark_dynamic(x, 1)
    return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SETTINGS = [
    (torch.bfloat16, FNUZ, "static"),
    (torch.bfloat16, FN, "dynamic"),
    (torch.float16, INT8, "mark_dynamic"),
    (torch.float32, INT8, "dynamic"),
]


@pytest.mark.parametrize(("dtype", "qdtype", "mode"), SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *(("quant_per_token", name) for name in PER_TOKEN),
        *(("quant_per_group", name) for name in PER_GROUP),
        *(("quant_per_tensor", name) for name in PER_TENSOR),
    ],
)
def test_every_spelling_is_recognised(pattern, name, dtype, qdtype, mode):
    spelling = {**PER_TOKEN, **PER_GROUP, **PER_TENSOR}[name]
    check_rewrite(Program(spelling, qdtype, dtype), rows(dtype, mode), expect={pattern: 1},
                  dynamic=True if mode == "dynamic" else None)  # fmt: skip


@pytest.mark.parametrize(("dtype", "qdtype", "mode"), SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", STATIC)
def test_a_given_scale_is_recognised(name, shape, dtype, qdtype, mode):
    program = Program(
        STATIC[name], qdtype, dtype, torch.full(shape, 50.0 if name == "given_quantising" else 0.02)
    )
    dynamic = True if mode == "dynamic" else None
    check_rewrite(program, rows(dtype, mode), expect={"quant_static": 1}, dynamic=dynamic)


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


def given_to_all_of_int8(x, qdtype):
    return (x.float() / x.float().mean()).round().clamp(-128, 127).to(INT8)


def given_in_half(x, qdtype):
    return as_q(x / x.float().mean(), qdtype)


def given_half_scale(x, qdtype):
    return as_q(x.float() / x.mean(), qdtype)


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
    given_to_all_of_int8: "the clamp is to [-128, 127], kernels clamp to [-127, 127]",
    given_in_half: "x over its scale is rounded to bfloat16 before the cast",
    given_half_scale: "the scale is bfloat16, kernels read float32",
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


def test_an_intermediate_that_is_read_elsewhere_stays():
    def program(x, qdtype):
        y = x.float() / (x.float().abs().amax(-1, keepdim=True) / 240.0)
        return as_q(y, qdtype), y

    found = check_rewrite(Program(program, FNUZ, torch.bfloat16), rows(torch.bfloat16),
                          expect={"quant_per_token": 1}, inserted=0)  # fmt: skip
    assert found.reasons() == ["intermediate y has 2 users, 1 of them outside (output)"]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("qdtype", [FN, FNUZ], ids=str)
@pytest.mark.parametrize("spelling", [amax_kept, max_first, deepseek, whole_amax])
def test_special_values_come_out_as_in_eager(spelling, qdtype, value):
    x = rows(torch.float32)
    x[0, 1] = 0.0
    x[1, 2, 3] = value
    pattern = {"deepseek": "quant_per_group", "whole_amax": "quant_per_tensor"}
    check_rewrite(Program(spelling, qdtype, torch.float32), x,
                  expect={pattern.get(spelling.__name__, "quant_per_token"): 1})  # fmt: skip


def test_a_bound_that_half_precision_cannot_hold_is_none():
    def program(x, qdtype):
        amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        return as_q(x / (amax.float() / 240.0), qdtype), amax.float() / 240.0

    found = check_rewrite(Program(program, FNUZ, torch.float16), rows(torch.float16),
                          expect={"quant_per_token": 1})  # fmt: skip
    assert found.decisions[0].match.argument("amax_min") == 0.0


def test_a_bound_of_the_scale_becomes_one_of_the_magnitude():
    found = check_rewrite(Program(scale_bounded, FNUZ, torch.float32), rows(torch.float32),
                          expect={"quant_per_token": 1})  # fmt: skip
    assert found.decisions[0].match.argument("amax_min") == pytest.approx(1e-6 * 240)


def test_gradients_keep_the_program():
    x = rows(torch.float32).requires_grad_()
    found = check_rewrite(dequantised_again, x, FNUZ, expect={"quant_per_token": 1},
                          backward=True, inserted=0)  # fmt: skip
    assert found.reasons() == ["gradients flow through it and quant_per_token has no backward"]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 5), (0, 5)], ids=str)
def test_any_number_of_rows(lead):
    check_rewrite(Program(grouped_view, FNUZ, torch.bfloat16), rows(torch.bfloat16, lead=lead),
                  expect={"quant_per_group": 1})  # fmt: skip


def test_two_quantisations_of_one_tensor():
    def program(x, qdtype):
        return amax_kept(x, FN), deepseek(x, qdtype)

    check_rewrite(Program(program, FNUZ, torch.bfloat16), rows(torch.bfloat16),
                  expect={"quant_per_token": 1, "quant_per_group": 1})  # fmt: skip


def decomposed(x, scale, zero_point, qdtype):
    return torch.ops.quantized_decomposed.quantize_per_tensor(
        x.float(), scale, zero_point, -128, 127, INT8
    )


def decomposed_per_token(x, qdtype):
    scales, zero_points = torch.ops.quantized_decomposed.choose_qparams_per_token(x, INT8)
    return torch.ops.quantized_decomposed.quantize_per_token(
        x, scales, zero_points, -128, 127, INT8
    )


@pytest.mark.parametrize(
    ("program", "args", "reason"),
    [
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
