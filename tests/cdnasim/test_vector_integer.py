"""Each vector integer and bit instruction against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim.machine import Case, i32, run_case, split, u64

M32 = np.uint64(0xFFFFFFFF)


def wide(x):
    return x.astype(np.uint64)


def signed(x):
    return i32(x).astype(np.int64)


def low(x):
    return (np.asarray(x).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def s24(x):
    return (x.astype(np.int64) << 40) >> 40


def s16(x):
    return (x & 0xFFFF).astype(np.uint16).view(np.int16).astype(np.int64)


def unary(f, kind="u32"):
    return lambda name: Case(f"{name} v20, v10", lambda a, *_: f(a), kind)


def binary(f, kind="u32"):
    return lambda name: Case(f"{name} v20, v10, v11", lambda a, b, *_: f(a, b), kind)


def ternary(f, kind="u32"):
    return lambda name: Case(f"{name} v20, v10, v11, v12", lambda a, b, c, *_: f(a, b, c), kind)


def keeps_high(f):
    return lambda name: Case(
        f"v_mov_b32 v20, v13\ns_nop 1\n{name} v20, v10, v11, v12",
        lambda a, b, c, d, *_: low(f(a, b, c)) & 0xFFFF | d & 0xFFFF0000,
    )


def shifted64(f):
    return lambda name: Case(
        f"{name} v[20:21], v10, v[12:13]",
        lambda a, b, c, d, *_: split(f(wide(a & 63), u64(c, d))),
        outputs=2,
    )


def masked(f, with_carry_in):
    """Two results: the sum and the carry mask, for the lanes below and above 32."""
    carry_in = ", s[22:23]" if with_carry_in else ""

    def expected(a, b, *_):
        carry = (
            np.array([(0x5555555533333333 >> lane) & 1 for lane in range(64)])
            if with_carry_in
            else 0
        )
        total = f(a.astype(np.int64), b.astype(np.int64), carry)
        out = (total < 0) | (total > 0xFFFFFFFF)
        bits = sum(int(bit) << lane for lane, bit in enumerate(out))
        return (
            low(total),
            np.full(64, bits & 0xFFFFFFFF, np.uint64),
            np.full(64, bits >> 32, np.uint64),
        )

    return lambda name: Case(
        "s_mov_b32 s22, 0x33333333\ns_mov_b32 s23, 0x55555555\n"
        f"{name} v20, s[20:21], v10, v11{carry_in}\n"
        "s_nop 4\nv_mov_b32 v21, s20\nv_mov_b32 v22, s21",
        expected,
        outputs=3,
    )


def permuted(a, b, c):
    source = np.stack(
        [(b >> 8 * i) & 255 for i in range(4)] + [(a >> 8 * i) & 255 for i in range(4)]
    )
    result = np.zeros(64, np.uint64)
    words = [b & 0xFFFF, b >> 16, a & 0xFFFF, a >> 16]
    for i in range(4):
        for lane in range(64):
            s = int(c[lane] >> 8 * i) & 255
            if s >= 13:
                byte = 255
            elif s == 12:
                byte = 0
            elif s >= 8:
                byte = 255 if int(words[s - 8][lane]) >> 15 else 0
            else:
                byte = int(source[s][lane])
            result[lane] |= np.uint64(byte << 8 * i)
    return result


def leading(x):
    return np.array([32 - int(v).bit_length() if v else 0xFFFFFFFF for v in x], np.uint64)


def leading_signed(x):
    flipped = np.where(i32(x) < 0, ~x, x)
    return np.array([32 - int(v).bit_length() if v else 0xFFFFFFFF for v in flipped], np.uint64)


def trailing(x):
    return np.array(
        [(int(v) & -int(v)).bit_length() - 1 if v else 0xFFFFFFFF for v in x], np.uint64
    )


def reversed_bits(x):
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], np.uint64)


def population(x):
    return np.array([int(v).bit_count() for v in x], np.uint64)


def field(a, b, c):
    return (wide(a) >> wide(b & 31)) & ((np.uint64(1) << wide(c & 31)) - np.uint64(1))


def signed_field(a, b, c):
    bits = (c & 31).astype(np.int64)
    value = (wide(a) >> wide(b & 31)).astype(np.int64)
    return np.where(bits == 0, 0, low((value << (64 - bits)) >> (64 - bits)))


FORMS = {
    "v_mov_b32": unary(lambda a: a),
    "v_not_b32": unary(lambda a: ~a),
    "v_bfrev_b32": unary(reversed_bits),
    "v_ffbh_u32": unary(leading),
    "v_ffbh_i32": unary(leading_signed),
    "v_ffbl_b32": unary(trailing),
    "v_and_b32": binary(lambda a, b: a & b),
    "v_or_b32": binary(lambda a, b: a | b),
    "v_xor_b32": binary(lambda a, b: a ^ b),
    "v_xnor_b32": binary(lambda a, b: ~(a ^ b)),
    "v_or3_b32": ternary(lambda a, b, c: a | b | c),
    "v_and_or_b32": ternary(lambda a, b, c: a & b | c),
    "v_bfi_b32": ternary(lambda a, b, c: a & b | ~a & c),
    "v_lshlrev_b32": binary(lambda a, b: low(wide(b) << wide(a & 31))),
    "v_lshrrev_b32": binary(lambda a, b: b >> (a & 31)),
    "v_ashrrev_i32": binary(lambda a, b: low(signed(b) >> (a & 31))),
    "v_lshl_or_b32": ternary(lambda a, b, c: low(wide(a) << wide(b & 31)) | c),
    "v_lshl_add_u32": ternary(lambda a, b, c: low((wide(a) << wide(b & 31)) + wide(c))),
    "v_add_lshl_u32": ternary(lambda a, b, c: low(((wide(a) + wide(b)) & M32) << wide(c & 31))),
    "v_alignbit_b32": ternary(lambda a, b, c: low((u64(b, a) >> wide(c & 31)) & M32)),
    "v_alignbyte_b32": ternary(lambda a, b, c: low((u64(b, a) >> wide((c & 3) * 8)) & M32)),
    "v_bfe_u32": ternary(field),
    "v_bfe_i32": ternary(signed_field),
    "v_bfm_b32": binary(
        lambda a, b: low(((np.uint64(1) << wide(a & 31)) - np.uint64(1)) << wide(b & 31))
    ),
    "v_perm_b32": lambda name: Case(
        f"v_and_b32 v12, 0x0f0f0f0f, v12\n{name} v20, v10, v11, v12",
        lambda a, b, c, *_: permuted(a, b, c & 0x0F0F0F0F),
    ),
    "v_lshlrev_b64": shifted64(lambda n, x: x << n),
    "v_lshrrev_b64": shifted64(lambda n, x: x >> n),
    "v_ashrrev_i64": shifted64(
        lambda n, x: (x.view(np.int64) >> n.astype(np.int64)).view(np.uint64)
    ),
    "v_add_u32": binary(lambda a, b: a + b),
    "v_sub_u32": binary(lambda a, b: a - b),
    "v_subrev_u32": binary(lambda a, b: b - a),
    "v_add_i32": binary(lambda a, b: a + b),
    "v_sub_i32": binary(lambda a, b: a - b),
    "v_add3_u32": ternary(lambda a, b, c: a + b + c),
    "v_xad_u32": ternary(lambda a, b, c: (a ^ b) + c),
    "v_mul_lo_u32": binary(lambda a, b: a * b),
    "v_mul_hi_u32": binary(lambda a, b: (wide(a) * wide(b)) >> np.uint64(32)),
    "v_mul_hi_i32": binary(lambda a, b: low((signed(a) * signed(b)) >> 32)),
    "v_mul_u32_u24": binary(lambda a, b: low(wide(a & 0xFFFFFF) * wide(b & 0xFFFFFF))),
    "v_mul_i32_i24": binary(lambda a, b: low(s24(a) * s24(b))),
    "v_mul_hi_u32_u24": binary(
        lambda a, b: (wide(a & 0xFFFFFF) * wide(b & 0xFFFFFF)) >> np.uint64(32)
    ),
    "v_mul_hi_i32_i24": binary(lambda a, b: low((s24(a) * s24(b)) >> 32)),
    "v_mad_u32_u24": ternary(
        lambda a, b, c: low(wide(a & 0xFFFFFF) * wide(b & 0xFFFFFF) + wide(c))
    ),
    "v_mad_i32_i24": ternary(lambda a, b, c: low(s24(a) * s24(b) + signed(c))),
    "v_max_i32": binary(lambda a, b: low(np.maximum(signed(a), signed(b)))),
    "v_min_i32": binary(lambda a, b: low(np.minimum(signed(a), signed(b)))),
    "v_max_u32": binary(np.maximum),
    "v_min_u32": binary(np.minimum),
    "v_max3_i32": ternary(
        lambda a, b, c: low(np.maximum(np.maximum(signed(a), signed(b)), signed(c)))
    ),
    "v_min3_i32": ternary(
        lambda a, b, c: low(np.minimum(np.minimum(signed(a), signed(b)), signed(c)))
    ),
    "v_med3_i32": ternary(lambda a, b, c: low(np.sort([signed(a), signed(b), signed(c)], 0)[1])),
    "v_max3_u32": ternary(lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_u32": ternary(lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_med3_u32": ternary(lambda a, b, c: np.sort([a, b, c], 0)[1]),
    "v_sad_u32": ternary(
        lambda a, b, c: low(
            np.abs(wide(a).astype(np.int64) - wide(b).astype(np.int64)) + wide(c).astype(np.int64)
        )
    ),
    "v_bcnt_u32_b32": binary(lambda a, b: low(population(a) + wide(b))),
    "v_add_co_u32": masked(lambda a, b, c: a + b, False),
    "v_sub_co_u32": masked(lambda a, b, c: a - b, False),
    "v_subrev_co_u32": masked(lambda a, b, c: b - a, False),
    "v_addc_co_u32": masked(lambda a, b, c: a + b + c, True),
    "v_subb_co_u32": masked(lambda a, b, c: a - b - c, True),
    "v_subbrev_co_u32": masked(lambda a, b, c: b - a - c, True),
    "v_add_u16": binary(lambda a, b: (a + b) & 0xFFFF),
    "v_sub_u16": binary(lambda a, b: (a - b) & 0xFFFF),
    "v_subrev_u16": binary(lambda a, b: (b - a) & 0xFFFF),
    "v_add_i16": binary(lambda a, b: (a + b) & 0xFFFF),
    "v_sub_i16": binary(lambda a, b: (a - b) & 0xFFFF),
    "v_mul_lo_u16": binary(lambda a, b: (a * b) & 0xFFFF),
    "v_lshlrev_b16": binary(lambda a, b: (b << (a & 15)) & 0xFFFF),
    "v_lshrrev_b16": binary(lambda a, b: (b & 0xFFFF) >> (a & 15)),
    "v_ashrrev_i16": binary(lambda a, b: low(s16(b) >> (a & 15)) & 0xFFFF),
    "v_max_u16": binary(lambda a, b: np.maximum(a & 0xFFFF, b & 0xFFFF)),
    "v_min_u16": binary(lambda a, b: np.minimum(a & 0xFFFF, b & 0xFFFF)),
    "v_max_i16": binary(lambda a, b: low(np.maximum(s16(a), s16(b))) & 0xFFFF),
    "v_min_i16": binary(lambda a, b: low(np.minimum(s16(a), s16(b))) & 0xFFFF),
    "v_mad_u16": keeps_high(lambda a, b, c: wide(a) * wide(b) + wide(c)),
    "v_mad_i16": keeps_high(lambda a, b, c: wide(a) * wide(b) + wide(c)),
    "v_mad_legacy_u16": keeps_high(lambda a, b, c: wide(a) * wide(b) + wide(c)),
    "v_mad_u32_u16": ternary(lambda a, b, c: low(wide(a & 0xFFFF) * wide(b & 0xFFFF) + wide(c))),
    "v_mad_i32_i16": ternary(lambda a, b, c: low(s16(a) * s16(b) + signed(c))),
    "v_pack_b32_f16": binary(lambda a, b: a & 0xFFFF | b << 16),
}
CASES = {name: form(name) for name, form in FORMS.items()} | {
    "v_mov_b64": Case("v_mov_b64 v[20:21], v[10:11]", lambda a, b, *_: (a, b), outputs=2),
    "v_accvgpr_write_b32": Case(
        "v_accvgpr_write_b32 a3, v10\ns_nop 1\nv_accvgpr_read_b32 v20, a3", lambda a, *_: a
    ),
    "v_accvgpr_mov_b32": Case(
        (
            "v_accvgpr_write_b32 a3, v10\ns_nop 1\n"
            "v_accvgpr_mov_b32 a9, a3\ns_nop 1\nv_accvgpr_read_b32 v20, a9"
        ),
        lambda a, *_: a,
    ),
    "v_bitop3_b32": Case(
        "v_bitop3_b32 v20, v10, v11, v12 bitop3:0xca", lambda a, b, c, *_: a & b | ~a & c
    ),
    "v_bitop3_b16": Case(
        "v_bitop3_b16 v20, v10, v11, v12 bitop3:0x96", lambda a, b, c, *_: (a ^ b ^ c) & 0xFFFF
    ),
    "v_lshl_add_u64": Case(
        "v_lshl_add_u64 v[20:21], v[10:11], 3, v[12:13]",
        lambda a, b, c, d, *_: split((u64(a, b) << np.uint64(3)) + u64(c, d)),
        outputs=2,
    ),
    "v_mad_u64_u32": Case(
        "v_mad_u64_u32 v[20:21], s[20:21], v10, v11, v[12:13]",
        lambda a, b, c, d, *_: split(wide(a) * wide(b) + u64(c, d)),
        outputs=2,
    ),
    "v_mad_i64_i32": Case(
        "v_mad_i64_i32 v[20:21], s[20:21], v10, v11, v[12:13]",
        lambda a, b, c, d, *_: split((signed(a) * signed(b)).view(np.uint64) + u64(c, d)),
        outputs=2,
    ),
}
COVERED = {*CASES, "v_accvgpr_read_b32"}


@pytest.mark.parametrize("name", CASES)
def test_semantics(name):
    run_case(CASES[name], "gfx950")


def saturated(name, f, low_limit, high_limit, convert):
    return Case(
        f"{name} v20, v10, v11 clamp",
        lambda a, b, *_: low(np.clip(f(convert(a), convert(b)), low_limit, high_limit)),
    )


@pytest.mark.parametrize(
    "case",
    [
        saturated("v_add_u32_e64", lambda a, b: a + b, 0, 0xFFFFFFFF, lambda x: x.astype(np.int64)),
        saturated("v_sub_u32_e64", lambda a, b: a - b, 0, 0xFFFFFFFF, lambda x: x.astype(np.int64)),
        saturated("v_add_i32", lambda a, b: a + b, -(1 << 31), (1 << 31) - 1, signed),
        saturated("v_sub_i32", lambda a, b: a - b, -(1 << 31), (1 << 31) - 1, signed),
        saturated(
            "v_sub_u16_e64", lambda a, b: a - b, 0, 0xFFFF, lambda x: (x & 0xFFFF).astype(np.int64)
        ),
    ],
    ids=lambda case: case.body.split()[0],
)
def test_clamp_saturates(case):
    run_case(case, "gfx950")


def test_op_sel_picks_halves_and_keeps_the_other():
    body = "v_mov_b32 v20, v13\ns_nop 1\nv_mad_u16 v20, v10, v11, v12 op_sel:[1,0,0,1]"
    run_case(
        Case(body, lambda a, b, c, d, *_: (((a >> 16) * b + c) & 0xFFFF) << 16 | d & 0xFFFF),
        "gfx950",
    )
