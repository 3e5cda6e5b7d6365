"""Text, code object, arguments and build: what is read, and how each refusal reads."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

import cdnasim
from cdnasim import arguments, asm_parse, elfload, guarded, msgpack, native
from cdnasim.encode import swizzle, wait_counts
from tests.cdnasim.machine import KERNEL, PROLOGUE, build


def one(text):
    (instruction,) = asm_parse.parse(text).instructions
    return instruction


def test_instruction_parts():
    instruction = one("  buffer_load_dwordx4 v[4:7], v1, s[8:11], 0 offen offset:16 sc0 ; comment")
    assert instruction.mnemonic == "buffer_load_dwordx4"
    assert instruction.operands == ("v[4:7]", "v1", "s[8:11]", "0")
    assert instruction.modifiers == {"offen": "1", "offset": "16", "sc0": "1"}


def test_tabs_separate_words_too():
    assert one("\tv_mov_b32_e32\tv0, v1").operands == ("v0", "v1")


@pytest.mark.parametrize(
    ("text", "mnemonic", "encoding"),
    [
        ("v_add_f32_e32 v0, v1, v2", "v_add_f32", "e32"),
        ("v_add_f32_e64_dpp v0, v1, v2 row_shr:1", "v_add_f32", "e64_dpp"),
        (
            "v_mfma_f32_32x32x8bf16_1k v[0:15], v[0:1], v[2:3], v[0:15]",
            "v_mfma_f32_32x32x8_bf16",
            "",
        ),
    ],
)
def test_mnemonics(text, mnemonic, encoding):
    assert (one(text).mnemonic, one(text).encoding) == (mnemonic, encoding)


def test_labels_and_source_lines():
    parsed = asm_parse.parse('.file 1 "dir" "k.py"\nk:\ns_nop 0\n.loc 1 42 3\n.L1: s_endpgm')
    assert parsed.labels == {"k": 0, ".L1": 1}
    assert [i.source for i in parsed.instructions] == [None, "dir/k.py:42"]
    assert [i.line for i in parsed.instructions] == [3, 5]


def test_metadata_is_not_code():
    assert (
        asm_parse.parse(".amdgpu_metadata\ns_nop 0\n.end_amdgpu_metadata\ns_endpgm")
        .instructions[0]
        .mnemonic
        == "s_endpgm"
    )


def test_symbols_in_registers_and_immediates():
    body = (
        f"{PROLOGUE}.set first, 20\nv_mov_b32 v[first], first + 3\n"
        "v_mov_b32 v21, 0\nglobal_store_dwordx2 v0, v[first:first+1], s[6:7]"
    )
    out = np.zeros(1024, np.uint32)
    build(body, "gfx942").launch((1,), (1,), [None, out, None])
    assert out[0] == 23


def test_macros_are_refused_with_the_line():
    with pytest.raises(cdnasim.AssemblyError, match=r"line 2: \.macro"):
        asm_parse.parse("s_nop 0\n.macro twice")


def test_unreadable_operand_names_its_line():
    text = KERNEL.format(arch="gfx942", body="s_nop 0", lds=0, scratch=0)
    code = cdnasim.assemble(text, "gfx942")
    with pytest.raises(cdnasim.AssemblyError, match=r"line \d+: v_mov_b32 v0, what\?"):
        cdnasim.load(text.replace("s_nop 0", "v_mov_b32 v0, what?"), code, arch="gfx942")


def test_assembler_diagnostics_become_an_exception():
    with pytest.raises(cdnasim.AssemblyError, match="invalid instruction"):
        cdnasim.assemble("v_bogus v0", "gfx942")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("vmcnt(3)", (3, -1)),
        ("vmcnt(0) lgkmcnt(1)", (0, 1)),
        ("lgkmcnt(0)", (-1, 0)),
        ("0", (0, 0)),
        ("0xc07f", (-1, 0)),
    ],
)
def test_wait_counts(text, counts):
    assert wait_counts([text]) == counts


def test_swizzle_patterns():
    assert swizzle("swizzle(SWAP,16)") == 0x401F
    assert swizzle('swizzle(BITMASK_PERM,"ppppp")') == 0x1F


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an object at all", "starts with 7f454c46"),
        (b"\x7fELF" + b"\0" * 100, "not for AMDGPU"),
    ],
)
def test_bad_code_objects(data, message):
    with pytest.raises(cdnasim.CodeObjectError, match=message):
        elfload.CodeObject(data)


def test_truncated_code_object():
    data = cdnasim.assemble(
        KERNEL.format(arch="gfx942", body="s_nop 0", lds=0, scratch=0), "gfx942"
    )
    for keep in (100, len(data) // 2, len(data) - 64):
        with pytest.raises(cdnasim.CodeObjectError, match="cut short"):
            elfload.CodeObject(data[:keep])


def test_descriptor():
    kernel = build("s_nop 0", "gfx950", lds=256, scratch=32)
    d = kernel.descriptor
    assert (d.lds_bytes, d.scratch_bytes, d.vgprs, d.accum_offset, d.agprs) == (
        256,
        32,
        512,
        256,
        256,
    )
    assert d.user_sgprs == {"kernarg_segment_ptr": 0}
    assert d.group_id_enable == (True, False, False)


def test_names_and_architectures():
    text = KERNEL.format(arch="gfx942", body="s_nop 0", lds=0, scratch=0)
    code = cdnasim.assemble(text, "gfx942")
    with pytest.raises(ValueError, match="arch is gfx90a"):
        cdnasim.load(text, code, arch="gfx90a")
    with pytest.raises(cdnasim.CodeObjectError, match=r"no kernel other among \['probe'\]"):
        cdnasim.load(text, code, arch="gfx942", name="other")
    with pytest.raises(cdnasim.CodeObjectError, match="not this kernel's text"):
        cdnasim.load("s_endpgm", code, arch="gfx942")


def test_launches_that_hardware_would_refuse():
    kernel = build("s_nop 0", "gfx942")
    with pytest.raises(ValueError, match="257 work-items, probe allows 1 to 256"):
        kernel.launch((1,), (257,), [])
    with pytest.raises(ValueError, match="65544 bytes of LDS, gfx942 has 65536"):
        kernel.launch((1,), (64,), [], shared_bytes=(64 << 10) - 8192 + 8)
    with pytest.raises(ValueError, match="4 arguments were given, the kernel takes 3"):
        kernel.launch((1,), (64,), [None] * 4)
    with pytest.raises(ValueError, match="grid .* has 4 axes"):
        kernel.launch((1, 1, 1, 1), (64,), [])


def test_empty_grid_runs_nothing():
    assert build("s_nop 0", "gfx942").launch((0,), (64,), []).instructions == 0


@pytest.mark.parametrize(
    ("value", "size", "packed"),
    [
        (1, 4, b"\1\0\0\0"),
        (-1, 8, b"\xff" * 8),
        (True, 1, b"\1"),
        (0xFFFFFFFF, 4, b"\xff" * 4),
        (1.5, 4, struct.pack("<f", 1.5)),
        (1.5, 8, struct.pack("<d", 1.5)),
        (np.float16(1.0), 2, b"\0\x3c"),
        (b"ab", 2, b"ab"),
    ],
)
def test_values_are_packed_by_declared_size(value, size, packed):
    assert arguments.pack_value(value, size, 0) == packed


@pytest.mark.parametrize(
    ("value", "size", "message"),
    [
        (1 << 32, 4, "does not fit 32 bits"),
        (1.5, 2, "is a float"),
        (b"abc", 2, "has 3 bytes"),
        (None, 4, "NoneType"),
    ],
)
def test_values_that_do_not_fit(value, size, message):
    with pytest.raises(ValueError, match=message):
        arguments.pack_value(value, size, 0)


def test_workgroup_ids_and_hidden_arguments():
    geometry = arguments.Geometry(grid=(2, 3, 4), block=(64, 2, 1))
    assert arguments.hidden_value("hidden_block_count_y", geometry, 0) == 3
    assert arguments.hidden_value("hidden_group_size_x", geometry, 0) == 64
    assert arguments.hidden_value("hidden_grid_dims", geometry, 0) == 3
    assert arguments.hidden_value("hidden_hostcall_buffer", geometry, 0) is None


def test_extent_of_strided_views():
    base = np.zeros((4, 8), np.float32)
    first, last = arguments.extent(base[1:3, 2:4])
    assert (first - base.ctypes.data, last - first) == (40, 8 + 32)
    first, last = arguments.extent(base[::-1])
    assert (first, last) == (base.ctypes.data, base.ctypes.data + base.nbytes)


def test_overlapping_tensors_stay_together():
    base = np.arange(64, dtype=np.uint32)
    memory = guarded.GuardedMemory([base[:40], base[20:], np.zeros(4, np.uint32)])
    assert len(memory.blocks) == 2
    assert memory.locate(base[20:]) - memory.locate(base[:40]) == 80


def test_messagepack():
    assert msgpack.unpack(b"\x83\xa1a\x01\xa1b\x92\xff\xcd\x01\x00\xa1c\xc3") == {
        "a": 1,
        "b": [-1, 256],
        "c": True,
    }
    with pytest.raises(ValueError, match="0xc1"):
        msgpack.unpack(b"\xc1")


def test_missing_compiler_is_named():
    with pytest.raises(cdnasim.BuildError, match="no-such-compiler is not installed"):
        native.build("no-such-compiler")


def test_failed_compilation_shows_the_compilers_lines():
    with pytest.raises(cdnasim.BuildError, match="no-such-file"):
        native.run_compiler(["g++", "-c", "no-such-file.cpp"])


def test_cache_that_others_can_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = native.cache_directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    os.chmod(directory, 0o777)
    with pytest.raises(cdnasim.BuildError, match="can be written by other users"):
        native.cache_directory()


def test_unwritable_home_falls_back_to_a_temporary_directory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    directory = native.cache_directory()
    assert directory.is_dir()
    directory.rmdir()


def test_many_workgroups_on_several_threads_agree():
    """Each of 64 workgroups adds its lanes into one counter."""
    body = f"{PROLOGUE}v_mov_b32 v1, 0\nv_mov_b32 v2, 1\nglobal_atomic_add v1, v2, s[6:7]"
    kernel = build(body, "gfx942")
    for num_threads in (1, 4):
        out = np.zeros(4, np.uint32)
        run = kernel.launch((4, 4, 4), (128,), [None, out, None], num_threads=num_threads)
        assert out[0] == 64 * 128
        assert run.instructions == 64 * 2 * 8


def test_profile_counts():
    profile = build(f"{PROLOGUE}s_nop 0", "gfx942").launch((3,), (128,), [None] * 3).profile()
    assert profile.count_by_mnemonic["s_load_dwordx4"] == 6
    assert sum(row.count for row in profile.rows) == 6 * 6
    assert profile.cycles_by_unit["vector"] == 6 * 4
