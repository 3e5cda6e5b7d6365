"""Latent attention compiles for every chip: matrix instructions, wide loads, within its LDS."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.kernels.triton import mla
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.kernels.triton.compiled import TARGETS, compiled

DEEPSEEK = MlaProblem(2, 16, 1, 128, 512, 128, 64, 128, torch.bfloat16)
ATOMS = {"cuda": r"(?:mma\.sync|wgmma)", "hip": r"v_mfma_f32"}
WIDE = {"cuda": r"(?:ld\.global.*v4\.b32|cp\.async\.c[ga]\S* .*16)", "hip": r"load_dwordx4"}


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("target", TARGETS)
def test_mla_decode(target, mask):
    args, kwargs = replace(DEEPSEEK, mask=mask).sample(seed=0, device="cpu")
    split, reduce = compiled([mla], lambda: mla.mla_decode(*args, **kwargs), target)
    backend = TARGETS[target].backend
    text = split.asm["ptx" if backend == "cuda" else "amdgcn"]
    assert re.search(ATOMS[backend], text)
    assert re.search(WIDE[backend], text)
    for kernel in (split, reduce):
        assert kernel.metadata.shared <= arch_named(target).lds_bytes
    if backend == "hip":
        spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert spilled == ["0"]
