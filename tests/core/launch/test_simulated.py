"""The stand-in that executes a code object in the simulator takes the same launches."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.launch import (
    KernelSignature,
    SimulatedKernel,
    SimulationUnavailableError,
    f32,
    i32,
    i64,
    pointer,
)

SCALE = KernelSignature("scale", (pointer("x"), pointer("out"), i32("n"), i64("stride"), f32("by")))


def test_runs_a_code_object_on_cpu_tensors(kernel_source, jit_settings):
    try:
        artifact = jit.load(jit.Module("scale", (kernel_source,)), "gfx950", jit_settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    x, out = torch.arange(60.0), torch.full((120,), float("nan"))
    SimulatedKernel(artifact, SCALE).launch(1, (64,), 0, x, out, 60, 2, 3.0)
    assert torch.equal(out[::2], 3 * x)
    assert out[1::2].isnan().all()


def test_needs_the_listing(kernel_source, jit_settings):
    try:
        jit.find_compiler("sm_90", jit_settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    source = kernel_source.with_name("empty.hip")
    source.write_text('extern "C" __global__ void scale() {}\n')
    artifact = jit.load(jit.Module("empty", (source,)), "sm_90", jit_settings)
    with pytest.raises(
        SimulationUnavailableError, match=r"empty\.cubin was built by nvcc .* without"
    ):
        SimulatedKernel(artifact, SCALE)
