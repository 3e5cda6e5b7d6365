"""Calls of torch's scaled products: recognised, with torch's own numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from tests.patterns.rewrite_check import Rewritten, check_rewrite, rewrite

BF16, FN = torch.bfloat16, torch.float8_e4m3fn
SCALES = {
    "gemm_fp8_per_tensor": (torch.tensor(0.02), torch.tensor(0.03)),
    "gemm_fp8_rowwise": (0.01 + torch.rand(16, 1) / 50, 0.01 + torch.rand(1, 32) / 50),
}
GPU_ONLY = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12", reason="torch 2.11 has this product on a GPU only"
)
BY_SCALES = ["gemm_fp8_per_tensor", pytest.param("gemm_fp8_rowwise", marks=GPU_ONLY)]


def operands():
    torch.manual_seed(0)
    return torch.randn(16, 64).to(FN), torch.randn(32, 64).to(FN)


@pytest.mark.parametrize("op", BY_SCALES)
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_mm(op, bias):
    bias = torch.randn(32).to(BF16) if bias else None

    def program(x, w, sa, sb):
        return torch._scaled_mm(x, w.t(), scale_a=sa, scale_b=sb, bias=bias, out_dtype=BF16)

    check_rewrite(program, *operands(), *SCALES[op], expect={op: 1})


@GPU_ONLY
@pytest.mark.parametrize("op", SCALES)
def test_scaled_mm_with_recipes(op):
    kinds = F.ScalingType
    recipe = kinds.TensorWise if op == "gemm_fp8_per_tensor" else kinds.RowWise

    def program(x, w, sa, sb):
        return F.scaled_mm(x, w.t(), sa, recipe, sb, recipe, output_dtype=BF16)

    check_rewrite(program, *operands(), *SCALES[op], expect={op: 1})


def test_a_permutation_that_changes_nothing_is_no_transpose():
    """Of a square weight the shapes would not tell."""
    x, _ = operands()
    weight = torch.randn(64, 64).to(FN)

    def program(x, w, sa, sb):
        turned = w.t().permute(0, 1)
        return torch._scaled_mm(x, turned, scale_a=sa, scale_b=sb, out_dtype=BF16)

    scales = SCALES["gemm_fp8_per_tensor"]
    check_rewrite(program, x, weight, *scales, expect={"gemm_fp8_per_tensor": 1})


def test_an_fp8_result_is_a_near_miss():
    def program(x, w, sa, sb):
        return torch._scaled_mm(x, w.t(), scale_a=sa, scale_b=sb, out_dtype=FN)

    found = check_rewrite(program, *operands(), *SCALES["gemm_fp8_per_tensor"], expect={},
                          inserted=0)  # fmt: skip
    assert found.reasons() == ["the result is float8_e4m3fn; kernels write 16 or 32 bits"]


def by_blocks(x, w, sa, sb, **recipes):
    recipes = {"a": F.ScalingType.BlockWise1x128, "b": F.ScalingType.BlockWise128x128, **recipes}
    return F.scaled_mm(x, w.t(), sa, recipes["a"], sb, recipes["b"], output_dtype=BF16)


@GPU_ONLY
@pytest.mark.parametrize("K", [512, 640])
def test_scaled_mm_by_blocks(K):
    """torch has no such product on the CPU: the rewritten graph is compared with the formula."""
    found = Rewritten()

    def rewritten(gm, example_inputs):
        rewrite(gm, "sm_90", found)
        return gm.forward

    torch.manual_seed(0)
    x, w, padded = torch.randn(16, K).to(FN), torch.randn(256, K).to(FN), -(-K // 512) * 4
    sa, sb = torch.rand(K // 128, 16).t(), torch.rand(2, padded).t()
    torch._dynamo.reset()
    out = torch.compile(by_blocks, backend=rewritten)(x, w, sa, sb)
    assert found.count() == {"gemm_fp8_blockscale": 1}
    assert found.inserted == 1
    rows = x.double() * sa.double().repeat_interleave(128, 1)
    spread = sb[: K // 128].t().double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    torch.testing.assert_close(out.double(), rows @ (w.double() * spread).T, rtol=1e-2, atol=1e-2)
