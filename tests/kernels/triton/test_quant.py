"""Every quantising Triton kernel against its reference, under the interpreter."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core.op import OPS
from aiter_inductor.lowerings import quant  # noqa: F401  registers the ops
from tests.kernels.triton.test_norm import run_kernel
from tests.lowerings.checks import assert_close, assert_same_layout, layouts

DTYPES = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8]
DYNAMIC = {
    "quant_per_tensor": {},
    "quant_per_token": {},
    "quant_per_group": {"group_size": 64},
}


def rows(*shape, dtype=torch.bfloat16):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def check(name, *args, **kwargs):
    expected = OPS[name].reference(*args, **kwargs)
    actual = run_kernel(OPS[name], *args, **kwargs)
    assert_close(actual, expected, what=name)
    assert_same_layout(actual, expected)
    return actual, expected


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic(name, dtype, source):
    check(name, rows(5, 640, dtype=source), dtype=dtype, **DYNAMIC[name])


@pytest.mark.parametrize("shape", [(64,), (1, 64), (33, 192), (2, 3, 320), (3, 8192), (1, 65536)])
@pytest.mark.parametrize("name", DYNAMIC)
def test_shapes(name, shape):
    check(name, rows(*shape), dtype=torch.float8_e4m3fn, **DYNAMIC[name])


@pytest.mark.parametrize("name", ["quant_per_token", "quant_per_group"])
def test_no_rows(name):
    check(name, rows(0, 128), dtype=torch.float8_e4m3fn, **DYNAMIC[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_static(dtype, scale_shape):
    scale = torch.full(scale_shape, 0.011)
    check("quant_static", rows(5, 640) * 8, scale, dtype=dtype)


def test_static_int8_keeps_minus_128_where_asked():
    x = torch.tensor([[-200.0, -127.6, -3.0, 127.6]]).repeat(3, 16)
    for qmin in (None, -128.0, 0.0):
        check("quant_static", x, torch.ones(()), dtype=torch.int8, qmin=qmin)


@pytest.mark.parametrize("name", DYNAMIC)
def test_layouts(name):
    for _, x in layouts(rows(3, 4, 192)):
        check(name, x, dtype=torch.float8_e4m3fn, **DYNAMIC[name])


@pytest.mark.parametrize("amax_min", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", DYNAMIC)
def test_nan_infinity_and_zeros(name, dtype, amax_min):
    for odd in (torch.nan, torch.inf, -torch.inf, 0.0, 1e-30):
        x = rows(5, 256)
        x[1] = 0
        x[2, 70] = odd
        x[3, 64:128] = odd
        check(name, x, dtype=dtype, amax_min=amax_min, **DYNAMIC[name])


def test_magnitudes_whose_inverse_scale_overflows_stay_finite():
    x = rows(2, 64, dtype=torch.float32) * 1e-38
    q, scale = run_kernel(OPS["quant_per_token"], x, dtype=torch.float8_e4m3fn)
    assert q.float().isfinite().all()
    assert (q.double() * scale - x).abs().max() < 1.4e-36


def test_int8_rounds_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0, 3.5]])
    q, scale = run_kernel(OPS["quant_per_token"], x, dtype=torch.int8)
    assert scale.item() == 1.0
    assert q.tolist() == [[0, 2, 2, 0, -2, -2, 127, 4]]


@pytest.mark.parametrize("shape", [(4, 256), (2, 3, 128), (0, 64)])
@pytest.mark.parametrize("group_size", [2, 32, 64])
def test_int4(shape, group_size):
    (packed, scale), (expected, expected_scale) = (
        run_kernel(OPS["quant_int4_per_group"], rows(*shape), group_size=group_size),
        OPS["quant_int4_per_group"].reference(rows(*shape), group_size=group_size),
    )
    torch.testing.assert_close(scale, expected_scale)
    for shift in (0, 4):
        ours, theirs = (((p.int() >> shift) & 15) ^ 8 for p in (packed, expected))
        assert (ours - theirs).abs().sum() <= 0.01 * ours.numel()
