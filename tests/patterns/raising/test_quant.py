"""Quantisation: every spelling is recognised, with eager's numbers, special values included."""

from __future__ import annotations

import pytest
import torch

from tests.patterns.raising.quant_spellings import (
    FN,
    FNUZ,
    INT8,
    PER_GROUP,
    PER_TENSOR,
    PER_TOKEN,
    STATIC,
    Program,
    amax_kept,
    as_q,
    deepseek,
    dequantised_again,
    grouped_view,
    max_first,
    rows,
    scale_bounded,
    whole_amax,
)
from tests.patterns.rewrite_check import check_rewrite


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
