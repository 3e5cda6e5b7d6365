"""What the compiler made of the HIP kernels at the shapes of models: registers and accesses."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.core.code_object import CodeObject
from aiter_inductor.kernels.hip import activation, norm_quant, quant, rope
from aiter_inductor.kernels.hip.loading import collecting_modules

BF16, FN = torch.bfloat16, torch.float8_e4m3fn
MAX_VGPRS = 128  # four waves a SIMD, what a block of 1024 threads needs


def modules_of_a_model(arch: str) -> list[jit.Module]:
    """The kernels around the projections of a model of hidden size 7168."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=BF16, device="meta")

    x, w = meta(64, 7168), meta(7168)
    group = {"dtype": FN, "group_size": 128}
    with collecting_modules(arch) as modules:
        norm_quant.add_rms_norm_quant(x, x, w, 1e-6, **group)
        norm_quant.rms_norm_quant(x, w, 1e-6, dtype=FN)
        norm_quant.layer_norm_quant(meta(64, 16384), None, None, 1e-6, dtype=FN)
        quant.quant_per_group(x, **group)
        activation.act_and_mul_quant(meta(64, 18432), meta(64, 18432), activation="silu", **group)
        q, k, table = meta(2, 128, 64, 192), meta(2, 1, 64, 192), meta(1, 1, 64, 64)
        rope.rope_qk(q, k, table, table, rotary_dim=64)
        rope.qk_norm_rope(q, k, meta(192), meta(192), table, table, 1e-6, rotary_dim=64)
    return modules


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_90"])
def test_no_spills_and_wide_accesses(arch):
    settings = jit.default_settings()
    try:
        jit.find_compiler(arch, settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    modules = modules_of_a_model(arch)
    assert len(modules) == 7
    for module in modules:
        artifact = jit.load(module, arch, settings)
        for facts in CodeObject.parse(artifact.read(), arch).kernels.values():
            assert (facts.spills, facts.scratch_bytes) == (0, 0), module
            assert facts.vgprs <= MAX_VGPRS, (module, facts)
        if arch.startswith("gfx"):
            assert "global_load_dwordx4" in artifact.listing(), module
        else:
            assert "0 bytes spill stores, 0 bytes spill loads" in artifact.log, module


@pytest.mark.parametrize("N", [4096, 5120, 7168, 8192, 16384])
def test_many_rows_leave_room_for_others_on_hopper(N):
    """No spills where a multiprocessor is told how many blocks to hold."""
    settings = jit.default_settings()
    try:
        jit.find_compiler("sm_90", settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    x, w = (torch.empty(*shape, dtype=BF16, device="meta") for shape in ((4096, N), (N,)))
    with collecting_modules("sm_90") as modules:
        norm_quant.rms_norm_quant(x, w, 1e-6, dtype=FN)
        norm_quant.rms_norm_quant(x, w, 1e-6, dtype=FN, round_before_weight=True)
        norm_quant.layer_norm_quant(x, w, w, 1e-6, dtype=FN)
    for module in modules:
        artifact = jit.load(module, "sm_90", settings)
        (facts,) = CodeObject.parse(artifact.read(), "sm_90").kernels.values()
        assert "0 bytes spill stores, 0 bytes spill loads" in artifact.log, module
        assert facts.vgprs <= MAX_VGPRS, (module, facts)


def test_modules_are_collected_once_for_each_context():
    assert modules_of_a_model("gfx942") == modules_of_a_model("gfx942")
    assert modules_of_a_model("gfx942") != modules_of_a_model("sm_90")
