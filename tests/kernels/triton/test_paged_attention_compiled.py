"""Attention over pages compiles for every chip: matrix instructions, wide loads, within its LDS."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.kernels.triton import paged_attention
from aiter_inductor.lowerings.paged_attention_problem import PagedAttentionProblem
from tests.kernels.triton.compiled import TARGETS, compiled

BF16 = torch.bfloat16
LLAMA = PagedAttentionProblem(2, 8, 2, 128, 128, 16, 40, BF16, BF16)
ATOMS = {"cuda": r"(?:mma\.sync|wgmma)", "hip": r"v_mfma_f32"}
WIDE = {"cuda": r"(?:ld\.global.*v4\.b32|cp\.async\.c[ga]\S* .*16)", "hip": r"load_dwordx4"}


@pytest.mark.parametrize("layout", ["paged", "packed"])
@pytest.mark.parametrize("target", TARGETS)
def test_paged_attention(target, layout):
    args, kwargs = replace(LLAMA, layout=layout).sample(seed=0, device="cpu")
    launched = compiled(
        [paged_attention], lambda: paged_attention.paged_attention(*args, **kwargs), target
    )
    backend = TARGETS[target].backend
    text = launched[0].asm["ptx" if backend == "cuda" else "amdgcn"]
    assert re.search(ATOMS[backend], text)
    assert re.search(WIDE[backend], text)
    assert len(launched) == 2
    for kernel in launched:
        assert kernel.metadata.shared <= arch_named(target).lds_bytes
    if backend == "hip":
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", text) == ["0"]
