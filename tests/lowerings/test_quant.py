"""Quantisation alone and behind a normalisation: formulas, odd values, refusals."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Use
from aiter_inductor.core.problem import describe
from aiter_inductor.lowerings import norm_quant  # noqa: F401  registers the ops
from aiter_inductor.lowerings.norm import layer_norm, rms_norm
from aiter_inductor.lowerings.quant import (
    quant_int4_per_group,
    quant_per_group,
    quant_per_tensor,
    quant_per_token,
    quant_static,
)
from tests.lowerings.checks import dequantise, opcheck

FP8 = torch.float8_e4m3fn
DTYPES = {FP8: 448.0, torch.float8_e4m3fnuz: 240.0, torch.int8: 127.0}


def rows(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype, limit", DTYPES.items(), ids=str)
def test_scales_map_the_largest_magnitude_to_the_limit(dtype, limit):
    x = rows(3, 4, 256)
    _, per_tensor = quant_per_tensor(x, dtype=dtype)
    _, per_token = quant_per_token(x, dtype=dtype)
    _, per_group = quant_per_group(x, group_size=64, dtype=dtype)
    f = x.float().abs()
    assert torch.equal(per_tensor, f.amax() / limit)
    assert torch.equal(per_token, f.amax(-1, keepdim=True) / limit)
    assert torch.equal(per_group, f.unflatten(-1, (4, 64)).amax(-1) / limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_values_are_near(dtype):
    x = rows(3, 4, 256)
    for q, scale in (
        quant_per_tensor(x, dtype=dtype),
        quant_per_token(x, dtype=dtype),
        quant_per_group(x, group_size=64, dtype=dtype),
    ):
        error = (dequantise(q, scale) - x).abs()
        step = 2.0**-4 * x.abs() if dtype.is_floating_point else 0.0
        floor = dequantise(torch.ones_like(q, dtype=torch.float64), scale)
        assert (error <= step + floor * (0.51 if dtype is torch.int8 else 2**-9)).all()


def test_static_clamps():
    q = quant_static(torch.tensor([1000.0, -1000.0, 1.0]), torch.tensor(1.0), dtype=FP8)
    assert q.float().tolist() == [448.0, -448.0, 1.0]


def test_int8_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, -2.5, 127.0])
    assert quant_per_token(x, dtype=torch.int8)[0].tolist() == [0, 2, -2, 127]


def test_odd_values_follow_the_formula():
    x = torch.zeros(4, 2)
    x[1, 0], x[2, 0], x[3] = torch.nan, torch.inf, 1.0
    q, scale = quant_per_token(x, dtype=FP8)
    assert q[0].isnan().all()
    assert scale[0] == 0
    assert q[1].isnan().all()
    assert q[2].float()[0].isnan()
    assert q[2].float()[1] == 0
    assert scale[2].isinf()
    q, scale = quant_per_token(x, dtype=FP8, amax_min=1e-12)
    assert q[0].float().tolist() == [0, 0]
    assert scale[0] == torch.tensor(1e-12) / 448


def test_int4_packs_the_even_element_low():
    x = torch.tensor([[7.0, -7.0, 1.0, 2.0]])
    packed, scale = quant_int4_per_group(x, group_size=4)
    assert scale.tolist() == [[1.0]]
    assert packed.tolist() == [[0x97, 0x21]]


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("stem", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_fused_is_norm_then_quantisation(stem, group_size):
    x, r, w, b = rows(5, 64), rows(5, 64, seed=1), rows(64, seed=2), rows(64, seed=3)
    args = {"rms_norm": (x, w), "add_rms_norm": (x, r, w), "layer_norm": (x, w, b)}[stem]
    f = x + r if stem == "add_rms_norm" else x
    y = layer_norm(f, w, b, 1e-6) if stem == "layer_norm" else rms_norm(f, w, 1e-6)
    q, scale, *total = OPS[f"{stem}_quant"](*args, 1e-6, dtype=FP8, group_size=group_size)
    if group_size is None:
        expected = quant_per_token(y, dtype=FP8)
    else:
        expected = quant_per_group(y, group_size=group_size, dtype=FP8)
    assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale, expected[1])
    assert all(torch.equal(t, f) for t in total)
    fixed = torch.tensor([0.01])
    static = OPS[f"{stem}_quant_static"](*args, 1e-6, fixed, dtype=FP8)
    static = static[0] if stem == "add_rms_norm" else static
    expected_static = quant_static(y, fixed, dtype=FP8)
    assert torch.equal(static.view(torch.uint8), expected_static.view(torch.uint8))


def problems():
    x, w = rows(6, 64), rows(64)
    scale = torch.tensor([0.01])
    yield OPS["quant_static"], (x, scale), {"dtype": FP8}
    yield OPS["quant_per_tensor"], (x,), {"dtype": torch.int8}
    yield OPS["quant_per_token"], (x,), {"dtype": FP8}
    yield OPS["quant_per_group"], (x,), {"group_size": 16, "dtype": FP8}
    yield OPS["quant_int4_per_group"], (x,), {"group_size": 16}
    for group in (None, 32):
        dynamic = {"dtype": FP8, **({} if group is None else {"group_size": group})}
        yield OPS["rms_norm_quant"], (x, w, 1e-6), dynamic
        yield OPS["add_rms_norm_quant"], (x, x.clone(), w, 1e-6), dynamic
        yield OPS["layer_norm_quant"], (x, w, w, 1e-6), dynamic
    yield OPS["rms_norm_quant_static"], (x, w, 1e-6, scale), {"dtype": FP8}
    yield OPS["add_rms_norm_quant_static"], (x, x.clone(), w, 1e-6, scale), {"dtype": FP8}
    yield OPS["layer_norm_quant_static"], (x, None, None, 1e-6, scale), {"dtype": FP8}


PROBLEMS = list(problems())


@pytest.mark.parametrize("op, args, kwargs", PROBLEMS, ids=lambda v: getattr(v, "name", None))
def test_opcheck_and_sample(op, args, kwargs):
    opcheck(op, args, kwargs)
    problem = op.problem(*args, **kwargs)
    drawn, keywords = problem.sample(seed=0, device="cpu")
    assert keywords == kwargs
    assert describe(op.problem(*drawn, **keywords)) == describe(problem)
    op(*drawn, **keywords)


def test_refusals():
    x = rows(4, 96)
    h200, mi300 = Use(arch_named("sm_90")), Use(arch_named("gfx942"))
    fn, fnuz = FP8, torch.float8_e4m3fnuz

    def reason(use, op, *args, **kwargs):
        return op.select(op.problem(*args, **kwargs), use).reason

    assert "not to float8_e4m3fnuz" in reason(h200, quant_per_token, x, dtype=fnuz)
    assert reason(mi300, quant_per_token, x, dtype=fn) == "triton takes it"  # by integer operations
    hip = quant_per_token.providers["hip"].refuse(quant_per_token.problem(x, dtype=fn), mi300)
    assert hip == "gfx942 converts to float8_e4m3fnuz, not to float8_e4m3fn"
    groups = {"dtype": torch.int8}
    assert "group_size=48 is not" in reason(h200, quant_per_group, x, group_size=48, **groups)
    assert "96 do not divide" in reason(h200, quant_per_group, x, group_size=64, **groups)
    assert "is odd" in reason(h200, quant_int4_per_group, x, group_size=1)
    assert "no elements" in reason(h200, quant_per_tensor, x[:0], dtype=fn)
    assert "3 elements" in reason(h200, quant_static, x, torch.ones(3), dtype=fn)
    assert "takes it" in reason(h200, quant_per_group, x, group_size=32, **groups)


def test_bytes_moved():
    x = rows(4096, 7168)
    assert quant_per_token.problem(x, dtype=FP8).bytes_moved() == 4096 * (7168 * 3 + 4)
    grouped = quant_per_group.problem(x, group_size=128, dtype=FP8)
    assert grouped.bytes_moved() == 4096 * (7168 * 3 + 56 * 4)
    assert quant_int4_per_group.problem(x, group_size=128).bytes_moved() == 4096 * (
        7168 * 2 + 3584 + 56 * 4
    )
