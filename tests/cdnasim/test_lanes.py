"""Selection between lanes, movement across lanes, DPP and SDWA."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim.machine import Case, execute, f32, run_case, words

LANE = np.arange(64)
MASK = 0x0F0F33335555AAAA
SET_MASK = f"s_mov_b32 s20, {MASK & 0xFFFFFFFF:#x}\ns_mov_b32 s21, {MASK >> 32:#x}\n"
BITS = np.array([MASK >> lane & 1 for lane in range(64)], bool)


def counted(a, low, high):
    """Bits of a below the lane, among lanes low..high."""
    return np.array(
        [
            (int(a[lane]) & ((1 << min(max(lane - low, 0), 32)) - 1)).bit_count()
            for lane in range(64)
        ],
        np.uint64,
    )


def permlane_swapped(width):
    def expected(a, b, *_):
        d, s = a.copy(), b.copy()
        for group in range(0, 64, 2 * width):
            for i in range(group, group + width):
                d[i + width], s[i] = s[i], d[i + width]
        return d, s

    return expected


CASES = {
    "v_cndmask_b32": Case(
        f"{SET_MASK}v_cndmask_b32_e64 v20, v10, v11, s[20:21]",
        lambda a, b, *_: np.where(BITS, b, a),
    ),
    "v_readfirstlane_b32": Case(
        "v_readfirstlane_b32 s20, v10\ns_nop 4\nv_mov_b32 v20, s20", lambda a, *_: a[0]
    ),
    "v_readlane_b32": Case(
        "v_readlane_b32 s20, v10, 37\ns_nop 4\nv_mov_b32 v20, s20", lambda a, *_: a[37]
    ),
    "v_writelane_b32": Case(
        "v_mov_b32 v20, v10\ns_mov_b32 s20, 77\nv_writelane_b32 v20, s20, 5",
        lambda a, *_: np.where(LANE == 5, 77, a),
    ),
    "v_mbcnt_lo_u32_b32": Case(
        "v_mbcnt_lo_u32_b32 v20, v10, v11", lambda a, b, *_: (counted(a, 0, 32) + b) & 0xFFFFFFFF
    ),
    "v_mbcnt_hi_u32_b32": Case(
        "v_mbcnt_hi_u32_b32 v20, v10, v11", lambda a, b, *_: (counted(a, 32, 64) + b) & 0xFFFFFFFF
    ),
    "v_swap_b32": Case(
        "v_mov_b32 v20, v10\nv_mov_b32 v21, v11\nv_swap_b32 v20, v21",
        lambda a, b, *_: (b, a),
        outputs=2,
    ),
    "v_permlane32_swap_b32": Case(
        "v_mov_b32 v20, v10\nv_mov_b32 v21, v11\ns_nop 1\nv_permlane32_swap_b32 v20, v21",
        permlane_swapped(32),
        outputs=2,
    ),
    "v_permlane16_swap_b32": Case(
        "v_mov_b32 v20, v10\nv_mov_b32 v21, v11\ns_nop 1\nv_permlane16_swap_b32 v20, v21",
        permlane_swapped(16),
        outputs=2,
    ),
}
COVERED = set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_semantics(name):
    run_case(CASES[name], "gfx950")


ROW, Q = LANE & ~15, LANE & 15
DPP = {  # control: source lane, valid
    "quad_perm:[3,1,0,2]": ((LANE & ~3) + np.array([3, 1, 0, 2])[LANE & 3], LANE >= 0),
    "row_shl:3": (LANE + 3, Q + 3 < 16),
    "row_shr:5": (LANE - 5, Q >= 5),
    "row_ror:6": (ROW + (Q - 6) % 16, LANE >= 0),
    "wave_shl:1": (LANE + 1, LANE < 63),
    "wave_shr:1": (LANE - 1, LANE > 0),
    "wave_rol:1": ((LANE + 1) % 64, LANE >= 0),
    "wave_ror:1": ((LANE - 1) % 64, LANE >= 0),
    "row_mirror": (ROW + 15 - Q, LANE >= 0),
    "row_half_mirror": (ROW + (Q ^ 7), LANE >= 0),
    "row_bcast:15": (ROW - 1, LANE >= 16),
    "row_bcast:31": (np.full(64, 31), LANE >= 32),
    "row_newbcast:4": (ROW + 4, LANE >= 0),
}


@pytest.mark.parametrize("control", DPP)
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("masks", [(0xF, 0xF), (0xA, 0x6)])
def test_dpp(control, bound, masks):
    inputs = words("u32")
    source, valid = DPP[control]
    row_mask, bank_mask = masks
    suffix = f"row_mask:{row_mask:#x} bank_mask:{bank_mask:#x}{' bound_ctrl:0' if bound else ''}"
    body = f"v_mov_b32 v20, v12\ns_nop 1\nv_add_u32_dpp v20, v10, v11 {control} {suffix}"
    moved = np.where(valid, inputs[0][np.clip(source, 0, 63)], 0).astype(np.uint32)
    enabled = (row_mask >> (LANE >> 4) & 1).astype(bool) & (bank_mask >> (Q >> 2) & 1).astype(bool)
    written = enabled & (valid | bound)
    np.testing.assert_array_equal(
        execute(body, inputs)[0], np.where(written, moved + inputs[1], inputs[2])
    )


def test_dpp_does_not_read_inactive_lanes():
    body = (
        "v_mov_b32 v20, v12\ns_mov_b64 s[22:23], exec\ns_mov_b32 exec_lo, 0xfffffffe\ns_nop 4\n"
        "v_mov_b32_dpp v20, v10 row_shr:1 row_mask:0xf bank_mask:0xf\ns_mov_b64 exec, s[22:23]"
    )
    inputs = words("u32")
    got = execute(body, inputs)[0]
    assert got[1] == inputs[2][1], "lane 0 is inactive: lane 1 keeps its old value"
    assert got[2] == inputs[0][1]


PARTS = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
}


def part(word, name, sign=False):
    shift, bits = PARTS[name]
    value = (word.astype(np.int64) >> shift) & ((1 << bits) - 1)
    return np.where(sign & (value >> (bits - 1) == 1), value - (1 << bits), value)


@pytest.mark.parametrize("selected", PARTS)
@pytest.mark.parametrize("sign", [False, True])
def test_sdwa_sources(selected, sign):
    operand = "sext(v10)" if sign else "v10"
    body = (
        f"v_add_u32_sdwa v20, {operand}, v11 dst_sel:DWORD "
        f"dst_unused:UNUSED_PAD src0_sel:{selected} src1_sel:WORD_1"
    )
    run_case(
        Case(body, lambda a, b, *_: (part(a, selected, sign) + part(b, "WORD_1")) & 0xFFFFFFFF),
        "gfx950",
    )


@pytest.mark.parametrize("selected", PARTS)
@pytest.mark.parametrize("unused", ["UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"])
def test_sdwa_destinations(selected, unused):
    shift, bits = PARTS[selected]
    field = ((1 << bits) - 1) << shift

    def expected(a, b, c, *_):
        value = (a & b).astype(np.int64) & ((1 << bits) - 1)
        if unused == "UNUSED_PRESERVE":
            return c.astype(np.int64) & ~field & 0xFFFFFFFF | value << shift
        if unused == "UNUSED_SEXT":
            value = np.where(value >> (bits - 1) == 1, value - (1 << bits), value)
        return value << shift & 0xFFFFFFFF

    body = (
        "v_mov_b32 v20, v12\ns_nop 1\n"
        f"v_and_b32_sdwa v20, v10, v11 dst_sel:{selected} dst_unused:{unused} "
        "src0_sel:DWORD src1_sel:DWORD"
    )
    run_case(Case(body, expected), "gfx950")


def test_results_are_written_under_exec():
    body = (
        "v_mov_b32 v20, v11\ns_mov_b64 s[22:23], exec\n"
        "s_mov_b32 exec_hi, 0xff00\nv_mov_b32 v20, v10\ns_mov_b64 exec, s[22:23]"
    )
    active = (LANE < 32) | ((LANE >= 40) & (LANE < 48))
    run_case(Case(body, lambda a, b, *_: np.where(active, a, b)), "gfx950")


def test_scalar_operands_and_constants():
    body = "s_mov_b32 s20, 0x40000000\nv_fma_f32 v20, v10, s20, -0.5"
    run_case(
        Case(
            body, lambda a, *_: (f32(a).astype(np.float64) * 2 - 0.5).astype(np.float32), "finite"
        ),
        "gfx950",
    )
