"""Vector compares: every predicate and type, the class test, and v_cmpx writing EXEC."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim.machine import execute, f32, f64, half, i32, u64, words

READ_MASK = "s_nop 4\nv_mov_b32 v20, s20\nv_mov_b32 v21, s21"
ORDERED = {
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
INTEGER = ORDERED | {"ne": lambda a, b: a != b}
FLOATING = ORDERED | {
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": lambda a, b: ~(a == b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
}
TYPES = {
    "u32": (INTEGER, "u32", 1, lambda a: a),
    "i32": (INTEGER, "u32", 1, i32),
    "u16": (INTEGER, "u32", 1, lambda a: a & 0xFFFF),
    "i16": (INTEGER, "u32", 1, lambda a: (a & 0xFFFF).astype(np.uint16).view(np.int16)),
    "u64": (INTEGER, "u32", 2, u64),
    "i64": (INTEGER, "u32", 2, lambda a, b: u64(a, b).view(np.int64)),
    "f32": (FLOATING, "f32", 1, f32),
    "f16": (FLOATING, "f16", 1, half),
    "f64": (FLOATING, "f64", 2, f64),
}
ALL = [(suffix, predicate) for suffix, (table, *_) in TYPES.items() for predicate in table]
COVERED = {f"v_{kind}_{p}_{s}" for kind in ("cmp", "cmpx") for s, p in ALL} | {"v_cmp_class_f32"}


def mask_of(outputs):
    bits = int(outputs[0][0]) | int(outputs[1][0]) << 32
    return np.array([bits >> lane & 1 for lane in range(64)], bool)


def operands(suffix, inputs):
    _, _, count, convert = TYPES[suffix]
    inputs[count : 2 * count, 16:32] = inputs[:count, 16:32]  # some equal
    names = ("v10", "v11") if count == 1 else ("v[10:11]", "v[12:13]")
    return names, convert(*inputs[:count]), convert(*inputs[count : 2 * count])


@pytest.mark.parametrize(("suffix", "predicate"), ALL)
def test_compare(suffix, predicate):
    table, kind, *_ = TYPES[suffix]
    inputs = words(kind)
    (x, y), a, b = operands(suffix, inputs)
    got = mask_of(execute(f"v_cmp_{predicate}_{suffix} s[20:21], {x}, {y}\n{READ_MASK}", inputs, 2))
    np.testing.assert_array_equal(got, table[predicate](a, b))


@pytest.mark.parametrize(("suffix", "predicate"), ALL)
def test_compare_and_set_exec(suffix, predicate):
    table, kind, *_ = TYPES[suffix]
    inputs = words(kind)
    (x, y), a, b = operands(suffix, inputs)
    body = (
        f"v_mov_b32 v20, 0\ns_mov_b64 s[22:23], exec\nv_cmpx_{predicate}_{suffix} vcc, {x}, {y}\n"
        "s_nop 4\nv_mov_b32 v20, 1\ns_mov_b64 exec, s[22:23]"
    )
    np.testing.assert_array_equal(execute(body, inputs)[0] == 1, table[predicate](a, b))


@pytest.mark.parametrize("bit", range(10))
def test_class(bit):
    inputs = words("f32")
    inputs[0, 32:34] = [0x7F800001, 0xFF800001]  # signalling NaNs
    x = f32(inputs[0])
    negative, magnitude = np.signbit(x), inputs[0] & 0x7FFFFFFF
    quiet = (magnitude & 0x400000) != 0
    nan = magnitude > 0x7F800000
    kinds = [
        np.isinf(x),
        (magnitude >= 0x800000) & ~np.isinf(x) & ~nan,
        (magnitude > 0) & (magnitude < 0x800000),
        magnitude == 0,
    ]
    classes = [
        nan & ~quiet,
        nan & quiet,
        *(k & negative for k in kinds),
        *(k & ~negative for k in kinds[::-1]),
    ]
    body = f"v_mov_b32 v11, {1 << bit}\nv_cmp_class_f32 s[20:21], v10, v11\n{READ_MASK}"
    np.testing.assert_array_equal(mask_of(execute(body, inputs, 2)), classes[bit])


def test_inactive_lanes_compare_as_zero():
    body = (
        "s_mov_b64 s[22:23], exec\ns_mov_b32 exec_lo, 0xff\ns_mov_b32 exec_hi, 0\n"
        f"v_cmp_eq_u32 s[20:21], v10, v10\ns_mov_b64 exec, s[22:23]\n{READ_MASK}"
    )
    np.testing.assert_array_equal(mask_of(execute(body, words("u32"), 2)), np.arange(64) < 8)
