"""Hand-written kernels that are right; the checks' tests break them one line at a time."""

from __future__ import annotations

from tests.cdnasim.machine import PROLOGUE

# Four waves exchange values through LDS: out[i] = in[i ^ 64], 256 work-items.
EXCHANGE = f"""
{PROLOGUE}
global_load_dword v10, v0, s[4:5]
s_waitcnt vmcnt(0)
ds_write_b32 v0, v10
s_waitcnt lgkmcnt(0)
s_barrier
v_xor_b32 v1, 0x100, v0
ds_read_b32 v11, v1
s_waitcnt lgkmcnt(0)
global_store_dword v0, v11, s[6:7]
"""

# One 16x16x32 fp8 tile: A rows at 0, B rows at 512 of LDS, K loop of `s11` steps.
MATRIX = """
s_load_dwordx4 s[4:7], s[0:1], 0x0
s_load_dwordx2 s[8:9], s[0:1], 0x10
v_lshlrev_b32 v4, 3, v0
v_and_b32 v5, 15, v0
v_lshrrev_b32 v6, 4, v0
v_lshlrev_b32 v5, 5, v5
v_lshlrev_b32 v6, 3, v6
v_or_b32 v5, v5, v6
v_accvgpr_write_b32 a0, 0
v_accvgpr_write_b32 a1, 0
v_accvgpr_write_b32 a2, 0
v_accvgpr_write_b32 a3, 0
s_mov_b32 s11, 2
s_waitcnt lgkmcnt(0)
.Lloop:
global_load_dwordx2 v[8:9], v4, s[4:5]
global_load_dwordx2 v[10:11], v4, s[6:7]
s_waitcnt vmcnt(0)
ds_write_b64 v4, v[8:9]
ds_write_b64 v4, v[10:11] offset:512
s_waitcnt lgkmcnt(0)
s_barrier
ds_read_b64 v[12:13], v5
ds_read_b64 v[14:15], v5 offset:512
s_waitcnt lgkmcnt(0)
s_barrier
s_add_u32 s4, s4, 512
s_addc_u32 s5, s5, 0
s_add_u32 s6, s6, 512
s_addc_u32 s7, s7, 0
s_sub_u32 s11, s11, 1
s_cmp_lg_u32 s11, 0
v_mfma_f32_16x16x32_fp8_fp8 a[0:3], v[12:13], v[14:15], a[0:3]
s_cbranch_scc1 .Lloop
s_nop 7
v_accvgpr_read_b32 v20, a0
v_accvgpr_read_b32 v21, a1
v_accvgpr_read_b32 v22, a2
v_accvgpr_read_b32 v23, a3
v_lshlrev_b32 v1, 4, v0
global_store_dwordx4 v1, v[20:23], s[8:9]
"""


def without(program: str, line: str, occurrence: int = 0) -> str:
    """The program less one line; it must hold that line."""
    lines = program.split("\n")
    places = [i for i, text in enumerate(lines) if text.strip() == line]
    assert len(places) > occurrence, f"{line!r} is not in the program"
    del lines[places[occurrence]]
    return "\n".join(lines)


def replaced(program: str, old: str, new: str) -> str:
    assert old in program, f"{old!r} is not in the program"
    return program.replace(old, new, 1)
