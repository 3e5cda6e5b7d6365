"""From source to launch: the built kernel, its signature and the runtime library agree."""

from __future__ import annotations

import ctypes
import time
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.code_object import CodeObject, CodeObjectError
from aiter_inductor.core.launch import (
    Kernel,
    KernelSignature,
    RuntimeLibraryError,
    f32,
    i32,
    i64,
    loaded_library,
    pointer,
)
from aiter_inductor.core.launch.ctypes_launcher import CtypesLauncher
from aiter_inductor.core.launch.kernel import _described
from aiter_inductor.core.launch.native import launcher_class
from aiter_inductor.core.launch.runtime import _open_library

SCALE = KernelSignature(
    "scale",
    (
        pointer("x", torch.float32),
        pointer("out", torch.float32),
        i32("n"),
        i64("stride"),
        f32("by"),
    ),
)
OVERHEAD_GOAL_US = 1.0
OVERHEAD_LIMIT_US = 4.0  # for a machine that others use at the same time


@pytest.fixture(scope="session")
def artifact(kernel_source, jit_settings):
    try:
        return jit.load(jit.Module("scale", (kernel_source,)), "gfx942", jit_settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))


def test_kernel_of_a_real_code_object(artifact, jit_settings, runtime, launcher, seen):
    kernel = Kernel(artifact, SCALE, jit_settings, runtime, launcher)
    x = torch.ones(64)
    with pytest.raises(ValueError, match="a block of 512 x 1 x 1 threads exceeds 256"):
        kernel(1, 512, 0, x, x, 64, 1, 2.0)
    with pytest.raises(ValueError, match="scale: x is on the CPU; the kernel runs on a GPU"):
        kernel(1, 64, 0, x, x, 64, 1, 2.0)
    assert (seen.loads, seen.launches) == (0, 0)


def test_facts_of_a_real_code_object(artifact):
    code = CodeObject.parse(artifact.read(), "gfx942")
    facts = code.kernels["scale"]
    assert code.sha256 == artifact.sha256
    assert (facts.spills, facts.scratch_bytes, facts.kernarg_bytes) == (0, 0, 36)
    assert facts.max_threads == 256
    assert 0 < facts.vgprs <= 16
    assert "s_endpgm" in artifact.listing()


@pytest.mark.parametrize("cut", [0, 3, 64, 1000])
def test_truncated_code_object_is_a_sentence(artifact, cut):
    with pytest.raises(CodeObjectError, match=f"{cut} bytes|section|no kernel metadata"):
        CodeObject.parse(artifact.read()[:cut], "gfx942")


def test_code_object_for_another_chip_is_refused(artifact):
    with pytest.raises(CodeObjectError, match="is for gfx942, not for gfx950"):
        CodeObject.parse(artifact.read(), "gfx950")


def test_kernel_that_is_not_there_is_refused(artifact, jit_settings, runtime):
    with pytest.raises(CodeObjectError, match=r"scale\.co holds scale, not other"):
        Kernel(artifact, replace(SCALE, name="other"), jit_settings, runtime)


def test_signature_with_more_than_the_kernel_reads_is_refused(artifact, jit_settings, runtime):
    longer = replace(SCALE, parameters=(*SCALE.parameters, i64("extra")))
    with pytest.raises(CodeObjectError, match="scale reads 36 bytes of arguments, but 48 are"):
        Kernel(artifact, longer, jit_settings, runtime)


def test_launcher_falls_back_to_ctypes_without_a_compiler(tmp_path):
    nothing = jit.JitSettings(tmp_path / "cache", host_compiler=tmp_path / "nothing")
    with pytest.warns(jit.JitWarning, match="launcher for host: no compiler"):
        assert launcher_class(nothing) is CtypesLauncher


def test_library_already_in_the_process_is_found(fake_hip):
    assert loaded_library("libamdhip64.so") == fake_hip._name
    assert loaded_library("libnothing.so") is None


def test_missing_library_says_what_was_tried():
    with pytest.raises(
        RuntimeLibraryError, match=r"no libnothing\.so can be loaded: .*cannot open"
    ):
        _open_library("libnothing.so", ())


def overhead_us(launcher, fake_hip, repeats: int = 20000) -> float:
    """Least of five means; CPU tensors stand for GPU tensors, which a launcher asks the same."""
    address = ctypes.cast(fake_hip.hipModuleLaunchKernel, ctypes.c_void_p).value
    launch = launcher(
        name="scale",
        parameters=_described(SCALE),
        max_grid=(2**31 - 1, 65535, 65535),
        max_items_x=2**32 - 1,
        max_threads=1024,
        max_shared_bytes=65536,
        launch_address=address,
        early_address=0,
        device_address=0,
        replace_address=0,
        end_marker=3,
        load=lambda _: 0x1000,
        stream_of=abs,
        enter=abs,
        fail=abs,
    )
    x, out = torch.ones(64), torch.empty(64)
    means_us = []
    for _ in range(5):
        started_s = time.perf_counter()
        for _ in range(repeats):
            launch(4096, 256, 0, x, out, 64, 1, 2.0)
        means_us.append((time.perf_counter() - started_s) / repeats * 1e6)
    return min(means_us)


def test_overhead_of_a_launch(jit_settings, fake_hip, capsys):
    built = launcher_class(jit_settings)
    if built is CtypesLauncher:
        pytest.skip("no C compiler, or no Python headers, for the C launcher")
    in_c = overhead_us(built, fake_hip)
    in_ctypes = overhead_us(CtypesLauncher, fake_hip, repeats=2000)
    with capsys.disabled():
        print(f"\nlaunch overhead: {in_c:.2f} us in C (goal {OVERHEAD_GOAL_US:.0f}),"
              f" {in_ctypes:.1f} us in ctypes")  # fmt: skip
    assert in_c < OVERHEAD_LIMIT_US
    assert in_c < in_ctypes
