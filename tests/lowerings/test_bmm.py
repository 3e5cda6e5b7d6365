"""bmm_fp8 against float64, at every granularity of its scales, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.bmm import BmmProblem, bmm_fp8

FN = torch.float8_e4m3fn
PROBLEM = BmmProblem(
    B=3, M=5, N=200, K=320, dtype=FN, weight_dtype=FN, out_dtype=torch.float32,
    x_scales=(3, 5, 3), weight_scales=(3, 2, 3),
)  # fmt: skip
GRANULARITIES = {
    "block": {},
    "row": {"x_scales": (3, 5, 1), "weight_scales": (3, 200, 1), "block_n": 1},
    "matrix": {"x_scales": (3, 1, 1), "weight_scales": (3, 1, 1)},
    "tensor": {"x_scales": (1, 1, 1), "weight_scales": (1, 1, 1)},
    "rows and blocks": {"x_scales": (1, 5, 1), "weight_scales": (1, 2, 3)},
}


def full(scale, shape, blocks):
    """One factor an element, by index arithmetic."""
    at = [
        torch.arange(n) // (n if found == 1 else block)
        for n, found, block in zip(shape, scale.shape, blocks, strict=True)
    ]
    return scale.double()[at[0][:, None, None], at[1][:, None], at[2]]


@pytest.mark.parametrize("fields", GRANULARITIES.values(), ids=GRANULARITIES)
def test_product(fields):
    problem = replace(PROBLEM, **fields)
    args, kwargs = problem.sample(seed=1, device="cpu")
    assert bmm_fp8.problem(*args, **kwargs) == problem
    x, weight, x_scale, weight_scale = args
    rows = x.double() * full(x_scale, x.shape, (1, 1, 128))
    columns = weight.double() * full(weight_scale, weight.shape, (1, problem.block_n, 128))
    out = bmm_fp8(*args, **kwargs)
    torch.testing.assert_close(out.double(), rows @ columns.mT, rtol=1e-5, atol=1e-5)
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(bmm_fp8.overload, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("size", [{"B": 0}, {"M": 0}, {"K": 0}])
def test_empty(size):
    one = (1, 1, 1)
    problem = replace(PROBLEM, x_scales=one, weight_scales=one, **size)
    args, kwargs = problem.sample(seed=1, device="cpu")
    out = bmm_fp8(*args, **kwargs)
    assert out.shape == (problem.B, problem.M, 200)
    assert (out == 0).all()


def test_sizes():
    assert PROBLEM.flops() == 2 * 3 * 5 * 200 * 320
    scales = 4 * (3 * 5 * 3 + 3 * 2 * 3)
    assert PROBLEM.bytes_moved() == 3 * 320 * 205 + scales + 3 * 5 * 200 * 4


REFUSED = {
    "x_scale is [3, 4, 3], neither [3, 5, 3] nor 1 in a place of that": {"x_scales": (3, 4, 3)},
    "scales change every 48 elements of K, not of a tile's 32": {
        "group_size": 48, "x_scales": (3, 5, 7)},
    "no kernel writes float64": {"out_dtype": torch.float64},
    "B=70000 is more than 65535, the grid's third dimension": {
        "B": 70000, "M": 1, "N": 1, "K": 32, "x_scales": (1, 1, 1), "weight_scales": (1, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_refusals_are_sentences(sentence):
    problem = replace(PROBLEM, **REFUSED[sentence])
    args, kwargs = problem.sample(seed=1, device="cpu")
    for chip in ("gfx950", "sm_90"):
        found = bmm_fp8.select(bmm_fp8.problem(*args, **kwargs), Use(arch_named(chip)))
        assert found.reason == f"triton: {sentence}"


def test_the_fp8_of_the_chip():
    use = Use(arch_named("gfx942"))
    assert bmm_fp8.select(PROBLEM, use).provider is bmm_fp8.providers["triton"]
    mixed = replace(PROBLEM, weight_dtype=torch.float8_e4m3fnuz)
    found = bmm_fp8.select(mixed, use)
    assert found.reason == "triton: x is float8_e4m3fn, which gfx942 does not multiply"


def test_hopper_leaves_weights_along_n_to_inductor():
    turned, hopper = replace(PROBLEM, turned=True), Use(arch_named("sm_90"))
    args, kwargs = turned.sample(seed=1, device="cpu")
    assert bmm_fp8.problem(*args, **kwargs) == turned
    found = bmm_fp8.select(turned, hopper)
    sentence = "16 of 512 x 2048 x 2048 stored along N take 1374 us on sm_90, Inductor's code 189"
    assert (found.reason, found.declined) == (f"triton: {sentence}", True)
    for problem, use in ((PROBLEM, hopper), (turned, Use(arch_named("gfx942")))):
        problem = replace(
            problem, dtype=use.arch.fp8_dtypes[0], weight_dtype=use.arch.fp8_dtypes[0]
        )
        assert bmm_fp8.select(problem, use).provider is bmm_fp8.providers["triton"]
