"""Each check finds a planted defect, names its line, and is silent on the right program."""

from __future__ import annotations

import numpy as np
import pytest

import cdnasim
from cdnasim import Check, FindingKind
from tests.cdnasim import formats
from tests.cdnasim.machine import PROLOGUE, SETTLE, build
from tests.cdnasim.programs import EXCHANGE, MATRIX, replaced, without

KINDS = FindingKind


def findings(body, *, arch="gfx942", block=64, args=None, lds=8192, scratch=0, **options):
    kernel = build(body, arch, lds, scratch)
    if args is None:
        args = [
            np.arange(4096, dtype=np.uint32),
            np.zeros(4096, np.uint32),
            np.zeros(4096, np.uint32),
        ]
    return kernel.launch((1,), (block,), args, strict=False, num_threads=1, **options).findings


def only(found, kind, text):
    """There is a finding of this kind at the line with this text, and no other kind."""
    assert {f.kind for f in found} == {kind}, [str(f) for f in found]
    assert any(text in f.place.text for f in found), [str(f) for f in found]


def test_exchange_is_right():
    data, out = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    assert findings(EXCHANGE, block=256, args=[data, out, None]) == ()
    np.testing.assert_array_equal(out, data ^ 64)


@pytest.mark.parametrize(
    ("line", "occurrence", "kind", "at"),
    [
        ("s_waitcnt vmcnt(0)", 0, KINDS.MISSING_WAIT, "ds_write_b32"),
        ("s_waitcnt lgkmcnt(0)", 1, KINDS.MISSING_WAIT, "s_barrier"),
        ("s_barrier", 0, KINDS.LDS_RACE, "ds_read_b32"),
        ("s_waitcnt lgkmcnt(0)", 2, KINDS.MISSING_WAIT, "global_store_dword"),
        ("global_load_dword v10, v0, s[4:5]", 0, KINDS.UNDEFINED_VALUE, "global_store_dword"),
    ],
)
def test_exchange_less_a_line(line, occurrence, kind, at):
    found = findings(without(EXCHANGE, line, occurrence), block=256)
    assert kind in {f.kind for f in found}
    assert any(f.kind is kind and at in f.place.text for f in found), [str(f) for f in found]


@pytest.mark.parametrize(
    ("change", "kind", "at"),
    [
        (("0x100, v0", "0x104, v0"), None, ""),  # another exchange, also right
        (
            ("0x100, v0", "0x1100, v0"),
            KINDS.UNDEFINED_VALUE,
            "global_store",
        ),  # reads what nobody wrote
        (
            ("ds_read_b32 v11, v1", "ds_read_b32 v11, v1 offset:65280"),
            KINDS.OUT_OF_BOUNDS,
            "ds_read_b32",
        ),
        (
            ("s[4:5]\ns_waitcnt", "s[4:5] offset:4\ns_waitcnt"),
            KINDS.OUT_OF_BOUNDS,
            "global_load_dword",
        ),
        (("v11, s[6:7]", "v11, s[6:7] offset:-4"), KINDS.OUT_OF_BOUNDS, "global_store_dword"),
    ],
)
def test_exchange_with_an_index_off(change, kind, at):
    args = [np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32), None]
    found = findings(replaced(EXCHANGE, *change), block=256, args=args)
    if kind is None:
        assert found == ()
    else:
        only(found, kind, at)


def matrix_arguments(arch):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 16, 32)).astype(np.float32) for _ in range(2))
    flavour = formats.FP8[arch]
    codes = [flavour.encode(x, True).astype(np.uint8) for x in (a, b)]
    want = sum(
        flavour.decode(codes[0][k]).astype(np.float64) @ flavour.decode(codes[1][k]).T
        for k in range(2)
    )
    return [*codes, np.zeros(256, np.float32)], want


def tile(out):
    """Lane l holds rows 4 * (l / 16) + i of column l % 16."""
    return out.reshape(4, 16, 4).transpose(0, 2, 1).reshape(16, 16)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_matrix_program_is_right(arch):
    args, want = matrix_arguments(arch)
    assert findings(MATRIX, arch=arch, args=args, poison=[args[2]]) == ()
    np.testing.assert_allclose(tile(args[2]), want, rtol=1e-5, atol=1e-5)


def test_swapped_fp8_flavour_changes_the_result():
    args, want = matrix_arguments("gfx942")
    findings(MATRIX, arch="gfx950", args=args)
    assert not np.allclose(tile(args[2]), want, rtol=0.5, atol=0.5, equal_nan=True)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    ("line", "kind", "at"),
    [
        ("s_waitcnt vmcnt(0)", KINDS.MISSING_WAIT, "ds_write_b64"),
        ("s_nop 7", KINDS.WAIT_STATES, "v_accvgpr_read_b32"),
    ],
)
def test_matrix_program_less_a_line(arch, line, kind, at):
    only(findings(without(MATRIX, line), arch=arch, args=matrix_arguments(arch)[0]), kind, at)


def test_each_wait_of_the_matrix_program_is_needed():
    args, _ = matrix_arguments("gfx942")
    for occurrence in (
        0,
        2,
    ):  # the arguments; the LDS reads. One wave needs no wait before s_barrier.
        found = findings(without(MATRIX, "s_waitcnt lgkmcnt(0)", occurrence), args=args)
        assert KINDS.MISSING_WAIT in {f.kind for f in found}


# ---- wait states: (producer, consumer, wait states needed on gfx942, on gfx950)
DEFINE = (
    "\n".join(f"v_mov_b32 v{i}, 0" for i in range(1, 64))
    + "\ns_mov_b32 s20, 0\ns_mov_b32 s21, 0\ns_mov_b64 vcc, 0\n"
    + SETTLE
)
MFMA4 = "v_mfma_f32_16x16x16_f16 v[20:23], v[10:11], v[12:13], v[20:23]"
MFMA8 = "v_mfma_f32_32x32x8_f16 v[20:35], v[10:11], v[12:13], v[20:35]"
MFMA16_F32 = "v_mfma_f32_32x32x2_f32 v[20:35], v10, v12, v[20:35]"
WAITS = [
    (MFMA4, "v_mov_b32 v40, v21", 7, 8),
    (MFMA8, "v_mov_b32 v40, v35", 11, 12),
    (MFMA16_F32, "v_mov_b32 v40, v35", 18, 18),
    (MFMA4, "v_mov_b32 v22, 0", 7, 8),
    (MFMA4, "ds_write_b32 v1, v20", 7, 8),
    (MFMA4, "v_mfma_f32_16x16x16_f16 v[24:27], v[20:21], v[12:13], v[24:27]", 7, 8),
    (MFMA4, "v_mfma_f32_16x16x16_f16 v[22:25], v[10:11], v[12:13], v[22:25]", 5, 6),
    (MFMA4.replace("v[20:23]", "v[24:27]", 1), "v_mov_b32 v21, 0", 3, 3),
    ("v_mov_b32 v10, 0", MFMA4, 2, 2),
    ("v_exp_f32 v40, v41", "v_add_f32 v42, v40, v41", 1, 1),
    ("v_mov_b32 v40, 0", "v_mov_b32_dpp v41, v40 row_shr:1 row_mask:0xf bank_mask:0xf", 2, 2),
    ("v_cmp_eq_u32 vcc, v40, v41", "v_cndmask_b32 v42, v40, v41, vcc", 2, 2),
    ("v_cmp_eq_u32 vcc, v40, v41", "v_div_fmas_f32 v42, v40, v41, v43", 4, 4),
    ("v_readfirstlane_b32 s20, v40", "v_add_u32 v41, s20, v42", 2, 2),
    ("v_readfirstlane_b32 s22, v40", "v_readlane_b32 s23, v41, s22", 4, 4),
    ("v_mov_b32 v40, 0", "v_readfirstlane_b32 s22, v40", 1, 1),
    ("v_cvt_pk_fp8_f32 v40, v41, v42 op_sel:[0,0,1]", "v_mov_b32 v43, v40", 1, 1),
    ("v_dot4_i32_i8 v40, v41, v42, v43", "v_add_u32 v44, v40, v41", 3, 3),
    ("global_store_dwordx4 v1, v[40:43], s[6:7]", "v_mov_b32 v41, 0", 2, 2),
    ("s_mov_b32 m0, 0", "global_load_lds_dword v1, s[4:5]", 1, 1),
    (
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1",
        "s_getreg_b32 s22, hwreg(HW_REG_MODE, 23, 1)",
        2,
        2,
    ),
]


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    ("producer", "consumer", "gfx942", "gfx950"),
    WAITS,
    ids=lambda v: v.split()[0] if isinstance(v, str) else None,
)
def test_wait_states(producer, consumer, gfx942, gfx950, arch):
    needed = gfx950 if arch == "gfx950" else gfx942

    def run(states):
        nops = "\n".join(
            f"s_nop {min(left, 16) - 1}"
            for left in ([16, states - 16] if states > 16 else [states])
            if left > 0
        )
        body = (
            f"{PROLOGUE}{DEFINE}\n{producer}\n{nops}\n"
            f"{consumer}\n{SETTLE}\ns_waitcnt vmcnt(0) lgkmcnt(0)"
        )
        return findings(body, arch=arch)

    assert run(needed) == ()
    only(run(needed - 1), KINDS.WAIT_STATES, consumer.split()[0])


def test_an_accumulator_written_anew_hides_what_overlapped_it():
    """Of two matrix results in a third's accumulator the last counts, if it is all of it."""
    apart = "v_mfma_f32_16x16x16_f16 v[{}:{}], v[10:11], v[12:13], v[{}:{}]"
    first, last = apart.format(26, 29, 26, 29), apart.format(24, 27, 26, 29)
    reader = apart.format(40, 43, 24, 27)
    assert findings(f"{PROLOGUE}{DEFINE}\n{first}\n{last}\n{reader}\n{SETTLE}") == ()
    only(
        findings(f"{PROLOGUE}{DEFINE}\n{first}\n{reader}\n{SETTLE}"),
        KINDS.WAIT_STATES,
        "v_mfma_f32_16x16x16_f16",
    )


def test_scalar_written_by_a_vector_instruction_and_read_by_memory():
    body = (
        f"{PROLOGUE}v_mov_b32 v1, s6\nv_mov_b32 v2, s7\n"
        "v_readfirstlane_b32 s10, v1\nv_readfirstlane_b32 s11, v2\n"
        "s_nop {}\nglobal_store_dword v0, v1, s[10:11]"
    )
    assert findings(replaced(body.format(4), "v_mov_b32 v2, s7", "v_mov_b32 v2, s7\ns_nop 0")) == ()
    only(
        findings(replaced(body.format(3), "v_mov_b32 v2, s7", "v_mov_b32 v2, s7\ns_nop 0")),
        KINDS.WAIT_STATES,
        "global_store_dword",
    )


# ---- waits
def loads(count, wait):
    lines = [f"global_load_ubyte v{10 + i}, v0, s[4:5]" for i in range(count)]
    return f"{PROLOGUE}" + "\n".join([*lines, wait, "global_store_dword v0, v10, s[6:7]"])


def test_a_full_counter_waits_for_the_oldest():
    """With 64 loads outstanding the first is done: compilers leave the wait out."""
    assert findings(loads(64, "")) == ()
    only(findings(loads(63, "")), KINDS.MISSING_WAIT, "global_store_dword")
    assert findings(loads(63, "s_waitcnt vmcnt(62)")) == ()


def test_halves_of_one_register_need_no_wait_between_them():
    body = (
        f"{PROLOGUE}ds_write_b32 v0, v0\nds_read_u8_d16 v10, v0\n"
        "ds_read_u8_d16_hi v10, v0 offset:1\n"
        "s_waitcnt lgkmcnt(0)\nglobal_store_dword v0, v10, s[6:7]"
    )
    assert findings(body) == ()
    only(
        findings(without(body, "s_waitcnt lgkmcnt(0)", 1)), KINDS.MISSING_WAIT, "global_store_dword"
    )


def test_scalar_loads_need_a_wait_for_zero():
    body = (
        "s_load_dwordx2 s[6:7], s[0:1], 0x8\ns_load_dword s8, s[0:1], 0x0\n"
        "{}\nv_lshlrev_b32 v0, 2, v0\nglobal_store_dword v0, v0, s[6:7]"
    )
    only(findings(body.format("s_waitcnt lgkmcnt(1)")), KINDS.MISSING_WAIT, "global_store_dword")
    assert findings(body.format("s_waitcnt lgkmcnt(0)")) == ()
    assert findings(body.format("s_waitcnt 0")) == ()


def test_direct_to_lds_load_must_be_waited_for():
    body = (
        f"{PROLOGUE}s_mov_b32 m0, 0\ns_nop 1\nglobal_load_lds_dword v0, s[4:5]\n"
        "s_waitcnt vmcnt(0)\nds_read_b32 v10, v0\n"
        "s_waitcnt lgkmcnt(0)\nglobal_store_dword v0, v10, s[6:7]"
    )
    assert findings(body) == ()
    only(findings(without(body, "s_waitcnt vmcnt(0)")), KINDS.MISSING_WAIT, "ds_read_b32")


# ---- undefined values
@pytest.mark.parametrize(
    ("body", "at"),
    [
        ("global_store_dword v0, v30, s[6:7]", "global_store_dword"),
        ("v_add_u32 v31, v30, v0\nglobal_store_dword v0, v31, s[6:7]", "global_store_dword"),
        ("v_and_b32 v30, 4, v30\nglobal_load_dword v31, v30, s[4:5]", "global_load_dword"),
        (
            "v_fma_mixlo_f16 v31, v0, v0, 0\nglobal_store_dword v0, v31, s[6:7]",
            "global_store_dword",
        ),
        (
            (
                "v_mov_b32 v31, v0\nv_fma_mixhi_f16 v31, v0, v30, 0\n"
                "global_store_dword v0, v31, s[6:7]"
            ),
            "global_store_dword",
        ),
        ("s_cmp_eq_u32 s30, 0\ns_cbranch_scc1 .Lend\n.Lend:", "s_cbranch_scc1"),
        ("v_cmp_eq_u32 vcc, v30, v0\ns_and_saveexec_b64 s[20:21], vcc", "s_and_saveexec_b64"),
        ("v_cmp_eq_u32 vcc, v30, v30\ns_cbranch_vccz .Lend\n.Lend:", "s_cbranch_vccz"),
        (
            "ds_read_b32 v31, v0\ns_waitcnt lgkmcnt(0)\nglobal_store_dword v0, v31, s[6:7]",
            "global_store_dword",
        ),
        (
            (
                "scratch_load_dword v31, off, off\n"
                "s_waitcnt vmcnt(0)\nglobal_store_dword v0, v31, s[6:7]"
            ),
            "global_store_dword",
        ),
    ],
)
def test_undefined_values_may_not_matter(body, at):
    only(findings(PROLOGUE + body, scratch=16), KINDS.UNDEFINED_VALUE, at)


@pytest.mark.parametrize(
    "body",
    [
        "v_and_b32 v31, 0, v30",
        "v_mov_b32 v31, 1\nv_lshlrev_b32 v30, 16, v30\nv_and_or_b32 v31, 7, v30, v31",
        "s_mov_b64 vcc, -1\nv_cndmask_b32 v31, v30, v0, vcc",
        "v_perm_b32 v31, v30, v0, s10\n",
        (
            "v_mov_b32 v31, v0\nv_cvt_pk_fp8_f32 v30, v0, v0\ns_nop 0\n"
            "v_cvt_pk_fp8_f32 v30, v0, v0 op_sel:[0,0,1]\ns_nop 1\nv_mov_b32 v31, v30"
        ),
        "v_fma_mixlo_f16 v30, v0, v0, 0\nv_fma_mixhi_f16 v30, v0, v0, 0\nv_mov_b32 v31, v30",
        "v_mov_b32 v12, v0\nv_mad_u64_u32 v[30:31], s[20:21], v0, 4, v[12:13]\nv_mov_b32 v31, v30",
    ],
)
def test_undefined_bits_that_do_not_reach_the_result_are_not_findings(body):
    setup = "s_mov_b32 s10, 0x03020100\n"  # v_perm: the four bytes of the second source
    assert findings(f"{PROLOGUE}{setup}{body}\nglobal_store_dword v0, v31, s[6:7]") == ()


def test_a_finding_names_its_origin():
    (found,) = findings(f"{PROLOGUE}v_add_u32 v31, v30, v0\nglobal_store_dword v0, v31, s[6:7]")
    assert "v30, which was never written" in found.message
    assert found.related is not None
    assert "v_add_u32 v31" in found.related.text


# ---- races, bounds, the rest
def test_equal_values_written_by_several_waves_do_not_race():
    body = (
        f"{PROLOGUE}v_and_b32 v1, 0xff, v0\nv_mov_b32 v2, {{}}\n"
        "ds_write_b32 v1, v2\ns_waitcnt lgkmcnt(0)"
    )
    assert findings(body.format("7"), block=128) == ()
    only(findings(body.format("v0"), block=128), KINDS.LDS_RACE, "ds_write_b32")


def test_equal_wide_values_do_not_race_in_their_second_half():
    body = (
        f"{PROLOGUE}v_and_b32 v1, 0xff, v0\nv_lshlrev_b32 v1, 2, v1\nv_mov_b32 v2, 1\n"
        "v_mov_b32 v3, 2\nv_mov_b32 v4, {}\nds_write_b96 v1, v[2:4]\ns_waitcnt lgkmcnt(0)"
    )
    assert findings(body.format("3"), block=128) == ()
    only(findings(body.format("v0"), block=128), KINDS.LDS_RACE, "ds_write_b96")


def test_byte_accesses_race_by_bytes():
    body = f"{PROLOGUE}v_lshrrev_b32 v1, 2, v0\n{{}}ds_write_b8 v1, v0\ns_waitcnt lgkmcnt(0)"
    assert findings(body.format(""), block=256) == ()
    only(findings(body.format("v_and_b32 v1, 31, v1\n"), block=256), KINDS.LDS_RACE, "ds_write_b8")


def test_long_kernels_keep_their_epochs_apart():
    body = (
        f"{PROLOGUE}s_mov_b32 s10, 3000\n.Lagain:\ns_barrier\n"
        "s_sub_u32 s10, s10, 1\ns_cmp_lg_u32 s10, 0\ns_cbranch_scc1 .Lagain\n"
    )
    assert findings(EXCHANGE.replace(PROLOGUE, body), block=256) == ()
    assert KINDS.LDS_RACE in {
        f.kind
        for f in findings(without(EXCHANGE.replace(PROLOGUE, body), "s_barrier", 1), block=256)
    }


def test_tensors_are_kept_apart():
    """One past the end of a tensor is out of bounds even where another tensor follows."""
    both = np.arange(512, dtype=np.uint32)
    args = [both[:256], both[256:], None]
    only(
        findings(
            replaced(EXCHANGE, "v10, v0, s[4:5]", "v10, v0, s[4:5] offset:4"), block=256, args=args
        ),
        KINDS.OUT_OF_BOUNDS,
        "global_load",
    )


def test_scratch_bounds():
    only(
        findings(f"{PROLOGUE}scratch_store_dword off, v0, off offset:16", scratch=16),
        KINDS.OUT_OF_BOUNDS,
        "scratch_store",
    )


def test_scalar_load_bounds():
    only(
        findings(f"{PROLOGUE}s_load_dword s20, s[8:9], 0x4000\ns_waitcnt lgkmcnt(0)"),
        KINDS.OUT_OF_BOUNDS,
        "s_load_dword",
    )


def test_endless_loop_is_stuck():
    only(
        findings("s_nop 0\n.Lagain:\ns_branch .Lagain", max_instructions=1000),
        KINDS.STUCK,
        "s_branch",
    )


def test_trap_is_a_finding():
    only(findings("s_trap 2"), KINDS.STUCK, "s_trap")


def test_waves_may_wait_for_each_other_through_lds():
    """Wave 1 raises a flag, wave 0 sleeps until it sees it."""
    body = f"""{PROLOGUE}
v_mov_b32 v1, 0
v_mov_b32 v2, 1
v_cmp_eq_u32 vcc, 0, v0
v_readfirstlane_b32 s10, v0
ds_write_b32 v1, v1
s_waitcnt lgkmcnt(0)
s_barrier
s_cmp_eq_u32 s10, 0
s_cbranch_scc0 .Lraise
.Lpoll:
s_sleep 1
ds_add_rtn_u32 v3, v1, v1
s_waitcnt lgkmcnt(0)
v_readfirstlane_b32 s11, v3
s_cmp_eq_u32 s11, 0
s_cbranch_scc1 .Lpoll
s_endpgm
.Lraise:
ds_add_u32 v1, v2
s_waitcnt lgkmcnt(0)
"""
    checks = Check.ALL & ~Check.RACES
    assert findings(body, block=128, checks=checks, max_instructions=10_000) == ()


def test_unsupported_instruction_is_refused_when_reached():
    kernel = build("s_getpc_b64 s[20:21]\ns_setpc_b64 s[20:21]", "gfx942")
    assert "s_setpc_b64" in kernel.unsupported
    with pytest.raises(cdnasim.SimulationError, match="s_setpc_b64"):
        kernel.launch((1,), (64,), [])


def test_checks_can_be_switched_off():
    assert (
        findings(
            without(EXCHANGE, "s_waitcnt vmcnt(0)"), block=256, checks=Check.ALL & ~Check.WAITS
        )
        == ()
    )
    assert (
        findings(
            without(MATRIX, "s_nop 7"),
            args=matrix_arguments("gfx942")[0],
            checks=Check.ALL & ~Check.WAIT_STATES,
        )
        == ()
    )
    assert (
        findings(
            f"{PROLOGUE}global_store_dword v0, v30, s[6:7]", checks=Check.ALL & ~Check.UNDEFINED
        )
        == ()
    )


def test_each_lds_check_is_switched_off_alone():
    """Both use the same record of LDS accesses."""
    race = without(EXCHANGE, "s_barrier")
    everything = {f.kind for f in findings(race, block=256)}
    assert everything == {KINDS.LDS_RACE, KINDS.UNDEFINED_VALUE}
    for check, left in ((Check.RACES, KINDS.UNDEFINED_VALUE), (Check.UNDEFINED, KINDS.LDS_RACE)):
        found = findings(race, block=256, checks=Check.ALL & ~check)
        assert {f.kind for f in found} == {left}


def test_strict_launch_raises_with_the_line():
    with pytest.raises(cdnasim.SimulationError, match=r"line \d+: ds_write_b32 v0, v10") as caught:
        build(without(EXCHANGE, "s_waitcnt vmcnt(0)"), "gfx942").launch(
            (1,), (256,), [np.zeros(256, np.uint32), np.zeros(256, np.uint32), None]
        )
    assert caught.value.findings[0].kind is KINDS.MISSING_WAIT
    assert "global_load_dword" in str(caught.value.findings[0].related)
