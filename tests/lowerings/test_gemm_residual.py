"""Linear layers with a residual: the product plus the residual, rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_fp8_rowwise
from aiter_inductor.lowerings.gemm_residual import (
    ResidualGemmProblem,
    gemm_fp8_blockscale_add,
    gemm_fp8_rowwise_add,
)

FN, BF16 = torch.float8_e4m3fn, torch.bfloat16
WIDE = {"M": 6, "N": 200, "K": 320, "dtype": FN, "weight_dtype": FN, "bias_dtype": BF16}
BLOCKS = {"scaling": "block", "group_size": 128, "block_n": 128, "block_k": 128}
OPS = [
    (gemm_fp8_blockscale_add, gemm_fp8_blockscale, BLOCKS),
    (gemm_fp8_rowwise_add, gemm_fp8_rowwise, {"scaling": "row"}),
]
every_op = pytest.mark.parametrize(("op", "plain", "fields"), OPS, ids=["block", "row"])


@every_op
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_is_the_sum_rounded_once(op, plain, fields, out_dtype):
    problem = ResidualGemmProblem(**WIDE, **fields, out_dtype=out_dtype)
    args, kwargs = problem.sample(seed=1, device="cpu")
    assert op.problem(*args, **kwargs) == problem
    *operands, residual, bias = args
    exact = plain(*operands, bias, **{**kwargs, "out_dtype": torch.float32}) + residual.float()
    assert torch.equal(op(*args, **kwargs), exact.to(out_dtype))
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)


@every_op
def test_is_for_chips_where_triton_multiplies(op, plain, fields):
    problem = ResidualGemmProblem(**WIDE, **fields, out_dtype=BF16)
    assert op.select(problem, Use(arch_named("gfx942"))).provider is op.providers["triton"]
    found = op.select(problem, Use(arch_named("sm_90")))
    assert found.reason == f"no {op.name} kernel for sm_90: Inductor compiles it"
    assert not found.declined, "then the product alone is offered"


def test_refusals_are_sentences():
    op, _, fields = OPS[0]
    problem = ResidualGemmProblem(**WIDE, **fields, out_dtype=BF16)
    args, kwargs = problem.sample(seed=1, device="cpu")
    use = Use(arch_named("gfx950"))
    wrong = op.problem(*args[:4], args[4][:5], *args[5:], **kwargs)
    sentence = "triton: residual is [5, 200], the result [6, 200]"
    assert op.select(wrong, use).reason == sentence
    double = replace(problem, residual_dtype=torch.float64)
    assert op.select(double, use).reason == "triton: residual is float64, which no kernel adds"
    assert problem.bytes_moved() - super(type(problem), problem).bytes_moved() == 2 * 6 * 200
