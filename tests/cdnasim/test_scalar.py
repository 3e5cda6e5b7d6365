"""Scalar ALU and control flow: values, SCC, EXEC, against Python integers."""

from __future__ import annotations

import pytest

from tests.cdnasim.machine import execute, words

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
PAIRS = [(0, 0), (1, 2), (M32, 1), (0x80000000, 0x7FFFFFFF), (0x12345678, 0x00050004), (40, 33)]
WIDE_PAIRS = [
    (0, 0),
    (M64, 1),
    (0x8000000000000000, 0x0123456789ABCDEF),
    (0xFF00FF00FF00FF00, 0xFFFF),
]


def s(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def overflow(x):
    return not -(1 << 31) <= x < 1 << 31


def nonzero(r):
    return r & M64 != 0


def bfe(x, spec, bits, signed=False):
    offset, width = spec & (bits - 1), spec >> 16 & 127
    value = x >> offset & ((1 << width) - 1)
    if signed and width:
        value = (s(x, bits) >> offset) if width >= bits else s(value, width)
    return value


def count_leading(x, bits):
    return bits - x.bit_length() if x else M32


def trailing(x):
    return (x & -x).bit_length() - 1 if x else M32


KEEP = None  # the instruction leaves SCC alone
BINARY = {  # name: (value of a, b), (scc of a, b, value)
    "s_add_u32": (lambda a, b: a + b, lambda a, b, r: a + b > M32),
    "s_sub_u32": (lambda a, b: a - b, lambda a, b, r: b > a),
    "s_add_i32": (lambda a, b: a + b, lambda a, b, r: overflow(s(a) + s(b))),
    "s_sub_i32": (lambda a, b: a - b, lambda a, b, r: overflow(s(a) - s(b))),
    "s_mul_i32": (lambda a, b: a * b, KEEP),
    "s_mul_hi_u32": (lambda a, b: a * b >> 32, KEEP),
    "s_mul_hi_i32": (lambda a, b: s(a) * s(b) >> 32, KEEP),
    "s_absdiff_i32": (lambda a, b: abs(s(a) - s(b)), nonzero),
    "s_max_i32": (lambda a, b: max(s(a), s(b)), lambda a, b, r: s(a) > s(b)),
    "s_min_i32": (lambda a, b: min(s(a), s(b)), lambda a, b, r: s(a) < s(b)),
    "s_max_u32": (max, lambda a, b, r: a > b),
    "s_min_u32": (min, lambda a, b, r: a < b),
    **{
        f"s_lshl{n}_add_u32": (
            lambda a, b, n=n: (a << n) + b,
            lambda a, b, r, n=n: (a << n) + b > M32,
        )
        for n in (1, 2, 3, 4)
    },
    "s_and_b32": (lambda a, b: a & b, nonzero),
    "s_or_b32": (lambda a, b: a | b, nonzero),
    "s_xor_b32": (lambda a, b: a ^ b, nonzero),
    "s_andn2_b32": (lambda a, b: a & ~b, nonzero),
    "s_orn2_b32": (lambda a, b: a | ~b, nonzero),
    "s_nand_b32": (lambda a, b: ~(a & b), nonzero),
    "s_nor_b32": (lambda a, b: ~(a | b), nonzero),
    "s_xnor_b32": (lambda a, b: ~(a ^ b), nonzero),
    "s_lshl_b32": (lambda a, b: a << (b & 31), nonzero),
    "s_lshr_b32": (lambda a, b: a >> (b & 31), nonzero),
    "s_ashr_i32": (lambda a, b: s(a) >> (b & 31), nonzero),
    "s_bfe_u32": (lambda a, b: bfe(a, b, 32), nonzero),
    "s_bfe_i32": (lambda a, b: bfe(a, b, 32, True), nonzero),
    "s_bfm_b32": (lambda a, b: ((1 << (a & 31)) - 1) << (b & 31), KEEP),
    "s_pack_ll_b32_b16": (lambda a, b: a & 0xFFFF | b << 16, KEEP),
    "s_pack_lh_b32_b16": (lambda a, b: a & 0xFFFF | b & 0xFFFF0000, KEEP),
    "s_pack_hh_b32_b16": (lambda a, b: a >> 16 | b & 0xFFFF0000, KEEP),
}
UNARY = {
    "s_mov_b32": (lambda a: a, KEEP),
    "s_not_b32": (lambda a: ~a, nonzero),
    "s_abs_i32": (lambda a: abs(s(a)), nonzero),
    "s_brev_b32": (lambda a: int(f"{a:032b}"[::-1], 2), KEEP),
    "s_sext_i32_i8": (lambda a: s(a & 255, 8), KEEP),
    "s_sext_i32_i16": (lambda a: s(a & 0xFFFF, 16), KEEP),
    "s_bcnt1_i32_b32": (lambda a: (a).bit_count(), nonzero),
    "s_bcnt0_i32_b32": (lambda a: 32 - (a).bit_count(), nonzero),
    "s_ff1_i32_b32": (trailing, KEEP),
    "s_ff0_i32_b32": (lambda a: trailing(~a & M32), KEEP),
    "s_flbit_i32_b32": (lambda a: count_leading(a, 32), KEEP),
}
WIDE_BINARY = {
    "s_and_b64": (lambda a, b: a & b, nonzero),
    "s_or_b64": (lambda a, b: a | b, nonzero),
    "s_xor_b64": (lambda a, b: a ^ b, nonzero),
    "s_andn2_b64": (lambda a, b: a & ~b, nonzero),
    "s_orn2_b64": (lambda a, b: a | ~b, nonzero),
    "s_nand_b64": (lambda a, b: ~(a & b), nonzero),
    "s_nor_b64": (lambda a, b: ~(a | b), nonzero),
    "s_xnor_b64": (lambda a, b: ~(a ^ b), nonzero),
}
WIDE_SHIFT = {
    "s_lshl_b64": (lambda a, b: a << (b & 63), nonzero),
    "s_lshr_b64": (lambda a, b: a >> (b & 63), nonzero),
    "s_ashr_i64": (lambda a, b: s(a, 64) >> (b & 63), nonzero),
    "s_bfe_u64": (lambda a, b: bfe(a, b, 64), nonzero),
}
WIDE_UNARY = {
    "s_mov_b64": (lambda a: a, KEEP),
    "s_not_b64": (lambda a: ~a, nonzero),
}
COUNTING = {
    "s_bcnt1_i32_b64": (lambda a: (a).bit_count(), nonzero),
    "s_ff1_i32_b64": (trailing, KEEP),
    "s_ff0_i32_b64": (lambda a: trailing(~a & M64), KEEP),
    "s_flbit_i32_b64": (lambda a: count_leading(a, 64), KEEP),
}
PREDICATES = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
COMPARES = [f"s_cmp_{p}_{t}" for p in PREDICATES for t in ("i32", "u32")]
COMPARES_K = [f"s_cmpk_{p}_{t}" for p in PREDICATES for t in ("i32", "u32")]
SAVEEXEC = {
    "s_and_saveexec_b64": lambda a, e: a & e,
    "s_or_saveexec_b64": lambda a, e: a | e,
    "s_xor_saveexec_b64": lambda a, e: a ^ e,
    "s_andn2_saveexec_b64": lambda a, e: a & ~e,
    "s_orn2_saveexec_b64": lambda a, e: a | ~e,
}
OTHERS = (
    "s_movk_i32",
    "s_addk_i32",
    "s_mulk_i32",
    "s_addc_u32",
    "s_subb_u32",
    "s_cselect_b32",
    "s_cselect_b64",
    "s_cmov_b32",
    "s_cmov_b64",
    "s_bfm_b64",
    "s_bitset0_b32",
    "s_bitset1_b32",
    "s_bitcmp0_b32",
    "s_bitcmp1_b32",
    "s_bitcmp0_b64",
    "s_bitcmp1_b64",
    "s_cmp_eq_u64",
    "s_cmp_lg_u64",
    "s_setreg_imm32_b32",
    "s_setreg_b32",
    "s_getreg_b32",
    "s_branch",
    "s_cbranch_scc0",
    "s_cbranch_scc1",
    "s_cbranch_vccz",
    "s_cbranch_vccnz",
    "s_cbranch_execz",
    "s_cbranch_execnz",
)
COVERED = {
    *BINARY,
    *UNARY,
    *WIDE_BINARY,
    *WIDE_SHIFT,
    *WIDE_UNARY,
    *COUNTING,
    *COMPARES,
    *COMPARES_K,
    *SAVEEXEC,
    *OTHERS,
    "s_endpgm",
}


def run(lines, outputs=3):
    """Execute; s20, s21 and SCC come back as three integers."""
    body = (
        "\n".join(lines)
        + "\ns_cselect_b32 s22, 1, 0\nv_mov_b32 v20, s20\nv_mov_b32 v21, s21\nv_mov_b32 v22, s22"
    )
    got = execute(body, words("u32"), 3)
    return [int(row[0]) for row in got][:outputs]


def load(register, value, bits=32):
    low = [f"s_mov_b32 s{register}, {value & M32:#x}"]
    return low if bits == 32 else [*low, f"s_mov_b32 s{register + 1}, {value >> 32:#x}"]


def check(lines, value, scc, arguments, wide):
    result = value(*arguments) & (M64 if wide else M32)
    low, high, flag = run(["s_cmp_eq_u32 0, 0", "s_mov_b32 s21, 0", *lines])
    assert (high << 32 | low if wide else low) == result
    assert flag == (
        1
        if scc is KEEP
        else int(scc(*arguments, result) if scc is not nonzero else nonzero(result))
    )


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("pair", PAIRS)
def test_binary(name, pair):
    check(
        [*load(24, pair[0]), *load(25, pair[1]), "s_cmp_eq_u32 0, 0", f"{name} s20, s24, s25"],
        *BINARY[name],
        pair,
        False,
    )


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("value", [0, 1, 0x80000000, 0x00F0FF80])
def test_unary(name, value):
    check([*load(24, value), f"{name} s20, s24"], *UNARY[name], (value,), False)


@pytest.mark.parametrize("name", [*WIDE_BINARY, *WIDE_SHIFT])
@pytest.mark.parametrize("pair", WIDE_PAIRS)
def test_wide_binary(name, pair):
    value, scc = (WIDE_BINARY | WIDE_SHIFT)[name]
    shift = name in WIDE_SHIFT
    second = (
        (pair[1] & 0xFFFF | 0x100004)
        if name == "s_bfe_u64"
        else pair[1] & M32
        if shift
        else pair[1]
    )
    lines = [
        *load(24, pair[0], 64),
        *load(26, second, 64),
        f"{name} s[20:21], s[24:25], {'s26' if shift else 's[26:27]'}",
    ]
    check(lines, value, scc, (pair[0], second), True)


@pytest.mark.parametrize("name", [*WIDE_UNARY, *COUNTING])
@pytest.mark.parametrize("value", [0, M64, 0x0001000000000000, 0x00F0])
def test_wide_unary(name, value):
    wide = name in WIDE_UNARY
    f, scc = (WIDE_UNARY | COUNTING)[name]
    check(
        [*load(24, value, 64), f"{name} {'s[20:21]' if wide else 's20'}, s[24:25]"],
        f,
        scc,
        (value,),
        wide,
    )


@pytest.mark.parametrize("name", COMPARES)
def test_compare(name):
    _, _, predicate, kind = name.split("_")
    for a, b in PAIRS:
        x, y = (s(a), s(b)) if kind == "i32" else (a, b)
        assert run([*load(20, a), *load(21, b), f"{name} s20, s21"])[2] == int(
            PREDICATES[predicate](x, y)
        )


@pytest.mark.parametrize("name", COMPARES_K)
def test_compare_immediate(name):
    _, _, predicate, kind = name.split("_")
    for a in (5, 0xFFFFFFF6, 0xFFF6):
        constant, x, y = (-10, s(a), -10) if kind == "i32" else (0xFFF6, a, 0xFFF6)
        lines = [*load(20, a), "s_mov_b32 s21, 0", f"{name} s20, {constant:#x}"]
        assert run(lines)[2] == int(PREDICATES[predicate](x, y))


@pytest.mark.parametrize("name", SAVEEXEC)
def test_saveexec(name):
    mask, exec_mask = 0xF0F0F0F00F0F0F0F, M64
    lines = [
        *load(24, mask, 64),
        f"{name} s[20:21], s[24:25]",
        "s_mov_b64 s[26:27], exec",
        "s_mov_b64 exec, s[20:21]",
    ]
    expected = SAVEEXEC[name](mask, exec_mask) & M64
    low, high, flag = run([*lines])
    assert (high << 32 | low, flag) == (exec_mask, int(expected != 0))
    low, high, _ = run([*lines, "s_mov_b64 s[20:21], s[26:27]"])
    assert high << 32 | low == expected


@pytest.mark.parametrize(
    ("lines", "low", "high", "scc"),
    [
        (["s_movk_i32 s20, -3"], M32 - 2, 0, 1),
        (["s_mov_b32 s20, 0x7fffffff", "s_addk_i32 s20, 1"], 0x80000000, 0, 1),
        (["s_mov_b32 s20, 7", "s_mulk_i32 s20, -2"], M32 - 13, 0, 1),
        (["s_mov_b32 s24, -1", "s_addc_u32 s20, s24, 0"], 0, 0, 1),
        (["s_subb_u32 s20, 5, 5"], M32, 0, 1),
        (["s_cselect_b32 s20, 3, 4"], 3, 0, 1),
        (["s_cmp_eq_u32 0, 1", "s_cselect_b32 s20, 3, 4"], 4, 0, 0),
        (["s_cselect_b64 s[20:21], -1, 0"], M32, M32, 1),
        (["s_mov_b32 s20, 9", "s_cmov_b32 s20, 4"], 4, 0, 1),
        (["s_mov_b64 s[20:21], 9", "s_cmp_eq_u32 0, 1", "s_cmov_b64 s[20:21], 4"], 9, 0, 0),
        (["s_bfm_b64 s[20:21], 8, 28"], 0xF0000000, 0xF, 1),
        (["s_mov_b32 s20, 0xff", "s_bitset0_b32 s20, 3"], 0xF7, 0, 1),
        (["s_mov_b32 s20, 0", "s_bitset1_b32 s20, 31"], 0x80000000, 0, 1),
        (["s_mov_b32 s20, 8", "s_bitcmp0_b32 s20, 3"], 8, 0, 0),
        (["s_mov_b32 s20, 8", "s_bitcmp1_b32 s20, 3"], 8, 0, 1),
        (["s_mov_b64 s[20:21], -1", "s_bitcmp0_b64 s[20:21], 40"], M32, M32, 0),
        (["s_mov_b64 s[20:21], -1", "s_bitcmp1_b64 s[20:21], 40"], M32, M32, 1),
        (["s_mov_b64 s[20:21], -1", "s_cmp_eq_u64 s[20:21], -1"], M32, M32, 1),
        (["s_mov_b64 s[20:21], -1", "s_cmp_lg_u64 s[20:21], -1"], M32, M32, 0),
        (
            [
                "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1",
                "s_nop 1",
                "s_getreg_b32 s20, hwreg(HW_REG_MODE, 22, 2)",
            ],
            2,
            0,
            1,
        ),
        (
            [
                "s_mov_b32 s24, 1",
                "s_setreg_b32 hwreg(HW_REG_MODE, 23, 1), s24",
                "s_nop 1",
                "s_getreg_b32 s20, hwreg(HW_REG_MODE, 23, 1)",
            ],
            1,
            0,
            1,
        ),
    ],
    ids=lambda value: value[-1].split()[0] if isinstance(value, list) else None,
)
def test_others(lines, low, high, scc):
    assert run(["s_cmp_eq_u32 0, 0", "s_mov_b64 s[20:21], 0", *lines]) == [low, high, scc]


@pytest.mark.parametrize(
    ("branch", "setup", "taken"),
    [
        ("s_branch", "s_nop 0", True),
        ("s_cbranch_scc0", "s_cmp_eq_u32 0, 0", False),
        ("s_cbranch_scc1", "s_cmp_eq_u32 0, 0", True),
        ("s_cbranch_vccz", "s_mov_b64 vcc, 0", True),
        ("s_cbranch_vccnz", "s_mov_b64 vcc, 0", False),
        ("s_cbranch_execz", "s_mov_b64 exec, exec", False),
        ("s_cbranch_execnz", "s_mov_b64 exec, exec", True),
    ],
)
def test_branches(branch, setup, taken):
    lines = ["s_mov_b64 s[20:21], 0", setup, f"{branch} .Lpast", "s_mov_b32 s20, 7", ".Lpast:"]
    assert run(lines)[0] == (0 if taken else 7)
