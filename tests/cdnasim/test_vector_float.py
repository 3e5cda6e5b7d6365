"""Each vector float instruction against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim.machine import Case, bits16, f32, f64, half, run_case, split

FLT = np.float32


def maximum(x, y):
    """maxNum: a NaN loses, +0 is above -0."""
    bigger = np.where(
        (x == y), (x.view(np.uint32) & y.view(np.uint32)).view(FLT), np.where(x > y, x, y)
    )
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, bigger)).astype(FLT)


def minimum(x, y):
    smaller = np.where(
        (x == y), (x.view(np.uint32) | y.view(np.uint32)).view(FLT), np.where(x < y, x, y)
    )
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, smaller)).astype(FLT)


def median(x, y, z):
    return maximum(minimum(x, y), minimum(maximum(x, y), z))


def fma(x, y, z):
    return (x.astype(np.float64) * y + z).astype(FLT)


def unary(name, f, kind="f32"):
    return Case(f"{name} v20, v10", lambda a, *_: f(f32(a)), kind)


def binary(name, f, kind="f32"):
    return Case(f"{name} v20, v10, v11", lambda a, b, *_: f(f32(a), f32(b)), kind)


def ternary(name, f, kind="f32"):
    return Case(f"{name} v20, v10, v11, v12", lambda a, b, c, *_: f(f32(a), f32(b), f32(c)), kind)


def half1(name, f):
    return Case(f"{name} v20, v10", lambda a, *_: bits16(f(half(a).astype(FLT))), "f16")


def half2(name, f):
    return Case(
        f"{name} v20, v10, v11",
        lambda a, b, *_: bits16(f(half(a).astype(FLT), half(b).astype(FLT))),
        "f16",
    )


def half3(name, f):
    """Three-source forms keep the upper half of the destination."""
    return Case(
        f"v_mov_b32 v20, v13\ns_nop 1\n{name} v20, v10, v11, v12",
        lambda a, b, c, d, *_: (
            bits16(f(*(half(x).astype(np.float64) for x in (a, b, c)))) | (d & 0xFFFF0000)
        ),
        "f16",
    )


def double1(name, f):
    return Case(f"{name} v[20:21], v[10:11]", lambda a, b, *_: split(f(f64(a, b))), "f64", 2)


def double2(name, f):
    return Case(
        f"{name} v[20:21], v[10:11], v[12:13]",
        lambda a, b, c, d, *_: split(f(f64(a, b), f64(c, d))),
        "f64",
        2,
    )


CASES = {
    "v_add_f32": binary("v_add_f32", lambda x, y: x + y),
    "v_sub_f32": binary("v_sub_f32", lambda x, y: x - y),
    "v_subrev_f32": binary("v_subrev_f32", lambda x, y: y - x),
    "v_mul_f32": binary("v_mul_f32", lambda x, y: x * y),
    "v_mul_legacy_f32": binary(
        "v_mul_legacy_f32", lambda x, y: np.where((x == 0) | (y == 0), FLT(0), x * y)
    ),
    "v_max_f32": binary("v_max_f32", maximum),
    "v_min_f32": binary("v_min_f32", minimum),
    "v_fma_f32": ternary("v_fma_f32", fma, "finite"),
    "v_fmamk_f32": Case(
        "v_fmamk_f32 v20, v10, 0x40600000, v11",
        lambda a, b, *_: fma(f32(a), FLT(3.5), f32(b)),
        "finite",
    ),
    "v_fmaak_f32": Case(
        "v_fmaak_f32 v20, v10, v11, 0x40600000",
        lambda a, b, *_: fma(f32(a), f32(b), FLT(3.5)),
        "finite",
    ),
    "v_fmac_f32": Case(
        "v_mov_b32 v20, v12\nv_fmac_f32 v20, v10, v11",
        lambda a, b, c, *_: fma(f32(a), f32(b), f32(c)),
        "finite",
    ),
    "v_max3_f32": ternary("v_max3_f32", lambda x, y, z: maximum(maximum(x, y), z)),
    "v_min3_f32": ternary("v_min3_f32", lambda x, y, z: minimum(minimum(x, y), z)),
    "v_med3_f32": ternary("v_med3_f32", median, "finite"),
    "v_minimum3_f32": ternary(
        "v_minimum3_f32", lambda x, y, z: np.minimum(np.minimum(x, y), z), "finite"
    ),
    "v_maximum3_f32": ternary(
        "v_maximum3_f32", lambda x, y, z: np.maximum(np.maximum(x, y), z), "finite"
    ),
    "v_floor_f32": unary("v_floor_f32", np.floor),
    "v_ceil_f32": unary("v_ceil_f32", np.ceil),
    "v_trunc_f32": unary("v_trunc_f32", np.trunc),
    "v_rndne_f32": unary("v_rndne_f32", np.rint),
    "v_fract_f32": unary("v_fract_f32", lambda x: x - np.floor(x), "finite"),
    "v_frexp_mant_f32": unary("v_frexp_mant_f32", lambda x: np.frexp(x)[0]),
    "v_frexp_exp_i32_f32": unary(
        "v_frexp_exp_i32_f32",
        lambda x: np.where(np.isfinite(x), np.frexp(x)[1], 0).astype(np.int32).view(np.uint32),
    ),
    "v_ldexp_f32": Case(
        "v_and_b32 v11, 15, v11\nv_ldexp_f32 v20, v10, v11",
        lambda a, b, *_: np.ldexp(f32(a), (b & 15).astype(np.int32)),
        "f32",
    ),
    "v_rcp_f32": unary("v_rcp_f32", lambda x: FLT(1) / x),
    "v_rcp_iflag_f32": unary("v_rcp_iflag_f32", lambda x: FLT(1) / x),
    "v_sqrt_f32": unary("v_sqrt_f32", np.sqrt),
    "v_rsq_f32": unary("v_rsq_f32", lambda x: FLT(1) / np.sqrt(x)),
    "v_add_f16": half2("v_add_f16", lambda x, y: x + y),
    "v_sub_f16": half2("v_sub_f16", lambda x, y: x - y),
    "v_subrev_f16": half2("v_subrev_f16", lambda x, y: y - x),
    "v_mul_f16": half2("v_mul_f16", lambda x, y: x * y),
    "v_max_f16": half2("v_max_f16", np.maximum),
    "v_min_f16": half2("v_min_f16", np.minimum),
    "v_fma_f16": half3("v_fma_f16", lambda x, y, z: x * y + z),
    "v_max3_f16": half3("v_max3_f16", lambda x, y, z: np.maximum(np.maximum(x, y), z)),
    "v_min3_f16": half3("v_min3_f16", lambda x, y, z: np.minimum(np.minimum(x, y), z)),
    "v_med3_f16": half3(
        "v_med3_f16", lambda x, y, z: np.maximum(np.minimum(x, y), np.minimum(np.maximum(x, y), z))
    ),
    "v_floor_f16": half1("v_floor_f16", np.floor),
    "v_ceil_f16": half1("v_ceil_f16", np.ceil),
    "v_trunc_f16": half1("v_trunc_f16", np.trunc),
    "v_rndne_f16": half1("v_rndne_f16", np.rint),
    "v_rcp_f16": half1("v_rcp_f16", lambda x: 1 / x),
    "v_add_f64": double2("v_add_f64", np.add),
    "v_mul_f64": double2("v_mul_f64", np.multiply),
    "v_max_f64": double2("v_max_f64", np.maximum),
    "v_min_f64": double2("v_min_f64", np.minimum),
    "v_floor_f64": double1("v_floor_f64", np.floor),
    "v_ceil_f64": double1("v_ceil_f64", np.ceil),
    "v_trunc_f64": double1("v_trunc_f64", np.trunc),
    "v_rndne_f64": double1("v_rndne_f64", np.rint),
    "v_rcp_f64": double1("v_rcp_f64", lambda x: 1 / x),
    "v_sqrt_f64": double1("v_sqrt_f64", np.sqrt),
    "v_rsq_f64": double1("v_rsq_f64", lambda x: 1 / np.sqrt(x)),
    "v_ldexp_f64": Case(
        "v_and_b32 v12, 15, v12\nv_ldexp_f64 v[20:21], v[10:11], v12",
        lambda a, b, c, *_: split(np.ldexp(f64(a, b), (c & 15).astype(np.int32))),
        "f64",
        2,
    ),
}

# Results that the hardware gives to within an ulp: compared with a tolerance.
APPROXIMATE = {
    "v_exp_f32": np.exp2,
    "v_log_f32": lambda x: np.log2(np.abs(x)),
    "v_sin_f32": lambda x: np.sin(x * 2 * np.pi),
    "v_cos_f32": lambda x: np.cos(x * 2 * np.pi),
    "v_exp_f16": np.exp2,
    "v_log_f16": lambda x: np.log2(np.abs(x)),
    "v_sqrt_f16": lambda x: np.sqrt(np.abs(x)),
    "v_rsq_f16": lambda x: 1 / np.sqrt(np.abs(x)),
}
DIVISION = ("v_div_scale_f32", "v_div_fmas_f32", "v_div_fixup_f32")
FUSED_DOUBLE = ("v_fma_f64", "v_fmac_f64")
COVERED = {*CASES, *APPROXIMATE, *DIVISION, *FUSED_DOUBLE}


@pytest.mark.parametrize("name", CASES)
def test_exact(name):
    run_case(CASES[name], "gfx950")


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate(name):
    from tests.cdnasim.machine import execute, words

    is_half = name.endswith("f16")
    inputs = words("f16" if is_half else "finite")
    inputs &= 0x7FFF if is_half and name != "v_exp_f16" else 0xFFFFFFFF
    source = "|v10|" if name == "v_log_f32" else "v10"
    got = execute(f"{name}{'_e64' if '|' in source else ''} v20, {source}", inputs)[0]
    x = half(inputs[0]).astype(np.float64) if is_half else f32(inputs[0]).astype(np.float64)
    actual = half(got).astype(np.float64) if is_half else f32(got)
    np.testing.assert_allclose(
        actual, APPROXIMATE[name](x), rtol=1e-3 if is_half else 3e-7, atol=3e-7
    )


@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30])
def test_division_sequence_is_correctly_rounded(magnitude):
    """The sequence that compilers emit for an IEEE f32 division."""
    from tests.cdnasim.machine import execute, words

    body = """
v_div_scale_f32 v30, s[20:21], v11, v11, v10
v_div_scale_f32 v31, vcc, v10, v11, v10
v_rcp_f32 v32, v30
s_nop 1
v_fma_f32 v33, -v30, v32, 1.0
v_fmac_f32 v32, v33, v32
v_mul_f32 v33, v31, v32
v_fma_f32 v34, -v30, v33, v31
v_fmac_f32 v33, v34, v32
v_fma_f32 v30, -v30, v33, v31
s_nop 3
v_div_fmas_f32 v30, v30, v32, v33
v_div_fixup_f32 v20, v30, v11, v10
"""
    inputs = words("f32")
    inputs[0] = (f32(inputs[0]) * np.float32(magnitude)).view(np.uint32)
    with np.errstate(all="ignore"):
        want = f32(inputs[0]) / f32(inputs[1])
    np.testing.assert_array_equal(f32(execute(body, inputs)[0]), want)


@pytest.mark.parametrize("name", FUSED_DOUBLE)
def test_fused_double(name):
    from tests.cdnasim.machine import execute, words

    inputs = words("f64")
    third = "v[14:15]" if name == "v_fma_f64" else None
    setup = "" if third else "v_mov_b32 v20, v14\nv_mov_b32 v21, v15\n"
    body = f"{setup}{name} v[20:21], v[10:11], v[12:13]{', ' + third if third else ''}"
    got = execute(body, inputs, 2)
    a, b, c = (f64(inputs[2 * i], inputs[2 * i + 1]) for i in range(3))
    np.testing.assert_allclose(f64(got[0], got[1]), a * b + c, rtol=1e-13)


@pytest.mark.parametrize(
    ("suffix", "source", "want"),
    [
        ("", "-v10, |v11|", lambda x, y: -x + np.abs(y)),
        (" mul:2", "v10, v11", lambda x, y: (x + y) * 2),
        (" mul:4", "v10, v11", lambda x, y: (x + y) * 4),
        (" div:2", "v10, v11", lambda x, y: (x + y) / 2),
        (" clamp", "v10, v11", lambda x, y: np.clip(x + y, 0, 1)),
    ],
)
def test_modifiers(suffix, source, want):
    run_case(
        Case(
            f"v_add_f32_e64 v20, {source}{suffix}",
            lambda a, b, *_: want(f32(a), f32(b)).astype(FLT),
            "finite",
        ),
        "gfx950",
    )
