"""Packed (VOP3P) instructions and dot products, with op_sel and negation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim.formats import from_bf16
from tests.cdnasim.machine import Case, bits16, execute, f32, half, run_case, words

WIDE = {
    "v_pk_mul_f32": lambda x, y, z: x * y,
    "v_pk_add_f32": lambda x, y, z: x + y,
    "v_pk_fma_f32": lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32),
}
HALVES = {
    "v_pk_add_f16": lambda x, y, z: x + y,
    "v_pk_mul_f16": lambda x, y, z: x * y,
    "v_pk_max_f16": lambda x, y, z: np.maximum(x, y),
    "v_pk_min_f16": lambda x, y, z: np.minimum(x, y),
    "v_pk_fma_f16": lambda x, y, z: x.astype(np.float64) * y + z,
}
UNSIGNED = {
    "v_pk_add_u16": lambda a, b, c: a + b,
    "v_pk_sub_u16": lambda a, b, c: a - b,
    "v_pk_mul_lo_u16": lambda a, b, c: a * b,
    "v_pk_mad_u16": lambda a, b, c: a * b + c,
    "v_pk_max_u16": lambda a, b, c: np.maximum(a, b),
    "v_pk_min_u16": lambda a, b, c: np.minimum(a, b),
    "v_pk_lshlrev_b16": lambda a, b, c: b << (a & 15),
    "v_pk_lshrrev_b16": lambda a, b, c: b >> (a & 15),
}
SIGNED = {
    "v_pk_add_i16": lambda a, b, c: a + b,
    "v_pk_sub_i16": lambda a, b, c: a - b,
    "v_pk_mad_i16": lambda a, b, c: a * b + c,
    "v_pk_max_i16": lambda a, b, c: np.maximum(a, b),
    "v_pk_min_i16": lambda a, b, c: np.minimum(a, b),
    "v_pk_ashrrev_i16": lambda a, b, c: b >> (a & 15),
}
THREE = ("v_pk_fma_f32", "v_pk_fma_f16", "v_pk_mad_u16", "v_pk_mad_i16")


def bytes_of(word, signed):
    parts = np.stack([word >> 8 * i & 255 for i in range(4)]).astype(np.uint8)
    return (parts.view(np.int8) if signed else parts).astype(np.int64)


def dot4(signed):
    def value(a, b, c):
        total = (bytes_of(a, signed) * bytes_of(b, signed)).sum(0) + c.astype(np.int64)
        return (total & 0xFFFFFFFF).astype(np.uint32)

    return value


def dot2(decode):
    def value(a, b, c):
        low = decode(a & 0xFFFF).astype(np.float64) * decode(b & 0xFFFF)
        high = decode(a >> 16).astype(np.float64) * decode(b >> 16)
        return ((low + f32(c)).astype(np.float32) + high).astype(np.float32)

    return value


def from_half(word):
    return half(word).astype(np.float32)


def accumulating(name, f, kind):
    return Case(f"v_mov_b32 v20, v12\n{name} v20, v10, v11", lambda a, b, c, *_: f(a, b, c), kind)


def three(name, f, kind):
    return Case(f"{name} v20, v10, v11, v12", lambda a, b, c, *_: f(a, b, c), kind)


DOTS = {
    "v_dot4_i32_i8": three("v_dot4_i32_i8", dot4(True), "u32"),
    "v_dot4_u32_u8": three("v_dot4_u32_u8", dot4(False), "u32"),
    "v_dot4c_i32_i8": accumulating("v_dot4c_i32_i8", dot4(True), "u32"),
}
FLOAT_DOTS = {
    "v_dot2_f32_f16": ("v_dot2_f32_f16 v20, v10, v11, v12", dot2(from_half), "f16"),
    "v_dot2_f32_bf16": ("v_dot2_f32_bf16 v20, v10, v11, v12", dot2(from_bf16), "finite"),
    "v_dot2c_f32_f16": (
        "v_mov_b32 v20, v12\nv_dot2c_f32_f16 v20, v10, v11",
        dot2(from_half),
        "f16",
    ),
    "v_dot2c_f32_bf16": (
        "v_mov_b32 v20, v12\nv_dot2c_f32_bf16 v20, v10, v11",
        dot2(from_bf16),
        "finite",
    ),
}
MIXED = ("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16")
COVERED = {*WIDE, *HALVES, *UNSIGNED, *SIGNED, *DOTS, *FLOAT_DOTS, *MIXED, "v_pk_mov_b32"}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("swap", [False, True])
def test_wide_pairs(name, swap):
    """With op_sel:[1,..] op_sel_hi:[0,..] source 0 is taken crosswise; neg_lo and neg_hi negate."""
    inputs = words("finite")
    sources = "v[10:11], v[12:13]" + (", v[14:15]" if name in THREE else "")
    count = 3 if name in THREE else 2
    zeros, ones = ",".join("0" * (count - 1)), ",".join("1" * (count - 1))
    modifiers = f" op_sel:[1,{zeros}] op_sel_hi:[0,{ones}] neg_lo:[1,{zeros}]" if swap else ""
    got = execute(f"{name} v[20:21], {sources}{modifiers}", inputs, 2)
    x, y, z = ([f32(inputs[2 * k]), f32(inputs[2 * k + 1])] for k in range(3))
    if swap:
        x = [-x[1], x[0]]
    for i in range(2):
        np.testing.assert_array_equal(f32(got[i]), WIDE[name](x[i], y[i], z[i]))


def test_pk_mov():
    inputs = words("u32")
    got = execute("v_pk_mov_b32 v[20:21], v[10:11], v[12:13] op_sel:[1,0]", inputs, 2)
    np.testing.assert_array_equal(got, [inputs[1], inputs[2]])


@pytest.mark.parametrize("name", HALVES)
def test_half_pairs(name):
    inputs = words("f16")
    got = execute(f"{name} v20, v10, v11{', v12' if name in THREE else ''}", inputs)[0]
    want = [
        bits16(HALVES[name](*(half(inputs[k], high) for k in range(3)))) for high in (False, True)
    ]
    np.testing.assert_array_equal(got, want[0] | want[1] << 16)


@pytest.mark.parametrize("name", [*UNSIGNED, *SIGNED])
def test_integer_pairs(name):
    inputs = words("u32")
    got = execute(f"{name} v20, v10, v11{', v12' if name in THREE else ''}", inputs)[0]
    table = UNSIGNED if name in UNSIGNED else SIGNED
    want = np.zeros(64, np.int64)
    for shift in (0, 16):
        parts = [(inputs[k] >> shift & 0xFFFF).astype(np.uint16) for k in range(3)]
        parts = [(p if name in UNSIGNED else p.view(np.int16)).astype(np.int64) for p in parts]
        want |= (table[name](*parts) & 0xFFFF) << shift
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", DOTS)
def test_dot(name):
    run_case(DOTS[name], "gfx950")


@pytest.mark.parametrize("name", FLOAT_DOTS)
def test_float_dot(name):
    body, f, kind = FLOAT_DOTS[name]
    inputs = words(kind)
    inputs[2] = words("finite", 3)[2]
    np.testing.assert_allclose(f32(execute(body, inputs)[0]), f(*inputs[:3]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_fma(name):
    """Source 0 f32 negated, source 1 the high half as f16, source 2 f32."""
    inputs = words("finite")
    inputs[1] = words("f16")[1]
    body = f"v_mov_b32 v20, v15\n{name} v20, -v10, v11, v12 op_sel:[0,1,0] op_sel_hi:[0,1,0]"
    got = execute(body, inputs)[0]
    x = -f32(inputs[0]).astype(np.float64)
    value = (x * half(inputs[1], True) + f32(inputs[2])).astype(np.float32)
    if name == "v_fma_mix_f32":
        np.testing.assert_array_equal(f32(got), value)
    elif name == "v_fma_mixlo_f16":
        np.testing.assert_array_equal(got, bits16(value) | inputs[5] & 0xFFFF0000)
    else:
        np.testing.assert_array_equal(got, bits16(value) << 16 | inputs[5] & 0xFFFF)


@pytest.mark.parametrize(
    ("written", "select", "high", "f"),
    [
        ("-v11", "op_sel:[0,0,0]", False, np.negative),
        ("-v11", "op_sel:[0,1,0]", True, np.negative),
        ("|v11|", "op_sel:[0,0,0]", False, np.abs),
    ],
)
def test_mixed_fma_has_the_sign_of_a_half_changed(written, select, high, f):
    inputs = words("finite")
    inputs[1] = words("f16")[1]
    got = execute(f"v_fma_mix_f32 v20, v10, {written}, v12 {select} op_sel_hi:[0,1,0]", inputs)[0]
    product = f32(inputs[0]).astype(np.float64) * f(half(inputs[1], high))
    np.testing.assert_array_equal(f32(got), (product + f32(inputs[2])).astype(np.float32))


def test_clamped_packed_integers_saturate():
    inputs = words("u32")
    got = execute("v_pk_sub_u16 v20, v10, v11 clamp", inputs)[0]
    want = np.zeros(64, np.int64)
    for shift in (0, 16):
        a, b = ((inputs[k] >> shift & 0xFFFF).astype(np.int64) for k in range(2))
        want |= np.maximum(a - b, 0) << shift
    np.testing.assert_array_equal(got, want)
