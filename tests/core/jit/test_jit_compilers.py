"""Each way to a code object: the commands it runs, and what it says when it fails."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aiter_inductor.core.code_object import CodeObject
from aiter_inductor.core.jit import (
    BuildError,
    JitWarning,
    Module,
    NoCompilerError,
    find_compiler,
    load,
)
from aiter_inductor.core.jit.assemble import AssemblerError, assemble
from aiter_inductor.core.jit.compilers import Rtc, artifact_name
from aiter_inductor.core.jit.discovery import _rtc

SOURCE = """
#include "twice.h"
#if defined(__CUDACC__)
#define KERNEL extern "C" __global__ void
#define INDEX threadIdx.x
#else
#define KERNEL extern "C" __attribute__((global)) void
#define INDEX __builtin_amdgcn_workitem_id_x()
#endif
KERNEL twice(const number *x, number *out) { out[INDEX] = FACTOR * x[INDEX]; }
"""


@pytest.fixture
def twice(tmp_path: Path) -> Module:
    source = tmp_path / "twice.hip"
    source.write_text(SOURCE)
    (tmp_path / "twice.h").write_text("typedef float number;\n")
    return Module("twice", (source,), defines=(("FACTOR", "2.0f"),))


def have_compiler(arch, settings) -> None:
    try:
        find_compiler(arch, settings)
    except NoCompilerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_90"])
def test_builds_for(arch, twice, settings):
    have_compiler(arch, settings)
    artifact = load(twice, arch, settings)
    facts = CodeObject.parse(artifact.read(), arch).kernels["twice"]
    assert facts.vgprs > 0
    assert facts.spills == 0
    if arch.startswith("gfx"):
        assert f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"' in artifact.listing()


def test_zig_reports_the_line(twice, settings):
    settings = replace(settings, rocm_clang=None)
    have_compiler("gfx942", settings)
    broken = replace(twice, defines=(("FACTOR", "no_such_name"),))
    with pytest.warns(JitWarning), pytest.raises(BuildError, match=r"use of undeclared identifier"):
        load(broken, "gfx942", settings)


def test_assembler_errors_become_an_exception_with_the_line():
    pytest.importorskip("triton")
    text = (
        '.amdgcn_target "amdgcn-amd-amdhsa--gfx942"\n.text\nk:\n  v_bogus_f32 v0, v1\n  s_endpgm\n'
    )
    with pytest.raises(AssemblerError, match="line 4: error: invalid instruction"):
        assemble(text, "gfx942")


def test_link_errors_become_an_exception():
    pytest.importorskip("triton")
    text = '.amdgcn_target "amdgcn-amd-amdhsa--gfx942"\n.text\nk:\n  v_mov_b32 v0, missing\n'
    with pytest.raises(AssemblerError, match="missing"):
        assemble(text, "gfx942")


def test_instruction_of_another_chip_is_refused():
    pytest.importorskip("triton")
    text = ".text\nk:\n  v_permlane32_swap_b32 v0, v1\n  s_endpgm\n"
    assert assemble(text, "gfx950")[:4] == b"\x7fELF"
    with pytest.raises(AssemblerError, match="not supported on this GPU"):
        assemble(text, "gfx942")


def test_assembly_source_needs_no_compiler_pass(tmp_path, settings):
    have_compiler("gfx942", settings)
    source = tmp_path / "nothing.s"
    source.write_text(".text\n.globl k\nk:\n  s_endpgm\n")
    module = Module("nothing", (source,))
    (edge,) = find_compiler("gfx942", settings).edges(module, "gfx942")
    assert edge.inputs[0] == str(source)
    assert load(module, "gfx942", settings).read()[:4] == b"\x7fELF"


STAND_IN = """#!/bin/sh
if [ "$1" = --version ]; then echo "AMD clang version 19.0.0"; exit 0; fi
for last; do :; done
echo "$@" > "$last"
"""


def test_rocm_clang_is_preferred_and_assembles_by_itself(twice, settings, tmp_path):
    clang = tmp_path / "clang++"
    clang.write_text(STAND_IN)
    clang.chmod(0o755)
    settings = replace(settings, rocm_clang=clang)
    assert find_compiler("gfx950", settings).identity == "rocm-clang AMD clang version 19.0.0"
    said = load(twice, "gfx950", settings).read().decode()
    assert "-target amdgcn-amd-amdhsa -mcpu=gfx950" in said
    assert said.strip().endswith("twice.s -o twice.co")


def test_every_missing_compiler_is_named(settings, tmp_path):
    nowhere = replace(
        settings,
        rocm_clang=tmp_path / "clang",
        nvcc=tmp_path / "nvcc",
        use_zig=False,
        use_rtc=False,
    )
    with pytest.raises(
        NoCompilerError, match=r"clang does not answer.*ziglang wheel is switched off"
    ):
        find_compiler("gfx942", nowhere)
    with pytest.raises(NoCompilerError, match="nvcc does not answer --version; nvrtc is switched"):
        find_compiler("sm_90", nowhere)


def test_a_gpu_module_takes_one_source(twice, settings):
    have_compiler("gfx942", settings)
    two = replace(twice, sources=twice.sources * 2)
    with pytest.warns(JitWarning), pytest.raises(BuildError, match="has 2 sources; a code object"):
        load(two, "gfx942", settings)


def nvrtc(settings) -> Rtc:
    found = _rtc("nvrtc", settings)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def test_nvrtc_builds_what_nvcc_builds(twice, settings, tmp_path):
    (edge,) = nvrtc(settings).edges(twice, "sm_90")
    subprocess.run(edge.command, cwd=tmp_path, check=True)
    content = (tmp_path / artifact_name(twice, "sm_90")).read_bytes()
    assert CodeObject.parse(content, "sm_90").kernels["twice"].vgprs > 0


def test_nvrtc_reports_the_line(twice, settings, tmp_path):
    broken = replace(twice, defines=(("FACTOR", "no_such_name"),))
    (edge,) = nvrtc(settings).edges(broken, "sm_90")
    run = subprocess.run(edge.command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'twice.hip(10): error: identifier "no_such_name" is undefined' in run.stderr


FAKE_RTC = r"""
#include <string.h>
int hiprtcCreateProgram(void **p, const char *s, const char *n, int c, char **h, char **i)
{ *p = (void *)s; return 0; }
int hiprtcCompileProgram(void *p, int n, const char **o)
{ return n != 4 || strcmp(o[0], "--offload-arch=gfx942"); }
int hiprtcGetProgramLogSize(void *p, size_t *n) { *n = 3; return 0; }
int hiprtcGetProgramLog(void *p, char *log) { memcpy(log, "ok", 3); return 0; }
int hiprtcGetCodeSize(void *p, size_t *n) { *n = 4; return 0; }
int hiprtcGetCode(void *p, char *code) { memcpy(code, "code", 4); return 0; }
"""


def test_hiprtc_speaks_the_same_interface(twice, tmp_path, host_compiler):
    source, library = tmp_path / "rtc.c", tmp_path / "libhiprtc.so"
    source.write_text(FAKE_RTC)
    subprocess.run([host_compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    (edge,) = Rtc(str(library), "hiprtc", "fake").edges(twice, "gfx942")
    assert edge.command[0] == sys.executable
    run = subprocess.run(edge.command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "ok"
    assert (tmp_path / "twice.co").read_bytes() == b"code"
