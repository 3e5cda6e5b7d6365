"""The matrix products compile for every chip to its matrix instructions, and fit in its memory."""

from __future__ import annotations

import re

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.kernels.triton import gemm, gemm_weight
from aiter_inductor.kernels.triton.gemm_config import GemmConfig
from tests.kernels.triton.compiled import TARGETS, compiled

N, K = 1024, 2048
FP8 = {
    "sm_90": torch.float8_e4m3fn,
    "gfx942": torch.float8_e4m3fnuz,
    "gfx950": torch.float8_e4m3fn,
}
MATRIX = {"cuda": re.compile(r"wgmma\.mma_async\S+"), "hip": re.compile(r"v_mfma_\w+")}


def launch(target, style, M):
    amd = TARGETS[target].backend == "hip"
    config = GemmConfig.default(M, N, K, amd=amd)
    x, weight = torch.ones(M, K).to(FP8[target]), torch.ones(N, K).to(FP8[target])
    of_x, of_weight, of_blocks = torch.rand(M, 1), torch.rand(N), torch.rand(N // 128, K // 128)
    if style == "block":
        of_groups = torch.rand(M, K // 128)
        return gemm.gemm_fp8_blockscale(x, weight, of_groups, of_blocks, config=config)
    if style == "row":
        return gemm.gemm_fp8_rowwise(x, weight, of_x, of_weight, config=config)
    if style == "int8":
        x, weight = x.to(torch.int8), weight.to(torch.int8)
        return gemm.gemm_int8(x, weight, of_x, of_weight, config=config)
    return gemm_weight.gemm_w8a16(torch.ones(M, K).bfloat16(), weight, of_blocks, config=config)


@pytest.mark.parametrize("M", [16, 512])
@pytest.mark.parametrize("style", ["block", "row", "int8", "w8a16"])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_use_matrix_instructions_and_fit(target, style, M):
    kernels = compiled([gemm, gemm_weight], lambda: launch(target, style, M), target)
    backend = TARGETS[target].backend
    text = kernels[0].asm["ptx" if backend == "cuda" else "amdgcn"]
    found = set(MATRIX[backend].findall(text))
    assert found
    kind = {"block": r"fp8|e4m3|f8", "row": r"fp8|e4m3|f8", "int8": r"s32|i8|i32", "w8a16": "bf16"}
    assert all(re.search(kind[style], name) for name in found), found
    assert kernels[0].metadata.shared <= arch_named(target).lds_bytes
    if backend == "hip":
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert spills == ["0"]
    split = GemmConfig.default(M, N, K, amd=backend == "hip").split_k > 1
    assert len(kernels) == (2 if split and style != "int8" else 1)
