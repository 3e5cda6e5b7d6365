"""Linear layers on a weight in tiles of 16 x 16: the layout, and the same numbers as from rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.gemm import gemm_fp8_blockscale, gemm_fp8_rowwise
from aiter_inductor.lowerings.gemm_preshuffled import (
    gemm_fp8_blockscale_preshuffled,
    gemm_fp8_rowwise_preshuffled,
)
from aiter_inductor.lowerings.gemm_problem import GemmProblem
from aiter_inductor.lowerings.gemm_tiles import in_rows, in_tiles

FN, BF16 = torch.float8_e4m3fn, torch.bfloat16
WIDE = {"M": 6, "N": 208, "K": 352, "dtype": FN, "weight_dtype": FN, "out_dtype": BF16}
BLOCKS = {"block_n": 128, "block_k": 128, "group_size": 128}
PAIRS = [
    (gemm_fp8_blockscale_preshuffled, gemm_fp8_blockscale, {"scaling": "block", **BLOCKS}),
    (gemm_fp8_rowwise_preshuffled, gemm_fp8_rowwise, {"scaling": "row"}),
]


def test_the_layout_is_aiters():
    """`view(N / 16, 16, K / 32, 2, 16).permute(0, 2, 3, 1, 4)` of one-byte elements."""
    weight = torch.randn(48, 96).to(FN)
    theirs = weight.view(3, 16, 3, 2, 16).permute(0, 2, 3, 1, 4).contiguous()
    tiles = in_tiles(weight)
    assert tiles.shape == (3, 16 * 96)
    assert tiles.is_contiguous()
    assert torch.equal(tiles.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))
    assert torch.equal(in_rows(tiles).view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize(("op", "plain", "fields"), PAIRS, ids=str)
def test_is_the_product_of_the_same_weight_in_rows(op, plain, fields):
    problem = GemmProblem(**WIDE, **fields, bias_dtype=BF16, layout="16x16")
    args, kwargs = problem.sample(seed=1, device="cpu")
    # torch multiplies no fp8 on a CPU, as its comparison of two runs would.
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)
    assert op.problem(*args, **kwargs) == problem
    x, tiles, *others = args
    assert tiles.shape == (13, 16 * 352)
    assert torch.equal(op(*args, **kwargs), plain(x, in_rows(tiles), *others, **kwargs))


def test_is_for_cdna_and_whole_tiles():
    op, _, fields = PAIRS[1]
    problem = GemmProblem(**WIDE, **fields, layout="16x16")
    hopper = op.select(problem, Use(arch_named("sm_90")))
    assert hopper.reason == f"no {op.name} kernel for sm_90: Inductor compiles it"
    chosen = op.select(problem, Use(arch_named("gfx950")))
    assert chosen.provider is op.providers["triton"]
    odd = op.select(replace(problem, K=336), Use(arch_named("gfx950")))
    sentence = "triton: K=336 is no multiple of 32, the two tiles that AITER pairs"
    assert odd.reason == sentence
