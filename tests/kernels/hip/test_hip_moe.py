"""moe_route.hip and moe_sort.hip, built for the host, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.hip import moe_route as route_kernels
from aiter_inductor.kernels.hip import moe_sort as sort_kernels
from aiter_inductor.lowerings.moe import moe_route, moe_sort
from aiter_inductor.lowerings.moe_problem import RouteProblem, SortProblem

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROBLEM = RouteProblem(
    19, 256, 8, 8, 4, FP32, FP32, FP32, "sigmoid", renormalize=True, eps=1e-20, scale=2.5
)
PLAIN = {"num_groups": 1, "topk_groups": 1, "bias_dtype": None, "scale": 1.0}
SOFTMAX = {**PLAIN, "scoring": "softmax"}
STYLES = {
    "deepseek-v3": {},
    "deepseek-v2": {"num_experts": 160, "topk": 6, "topk_groups": 3, "scoring": "softmax",
                    "group_score": "max", "bias_dtype": None, "renormalize": False},
    "mixtral": {**SOFTMAX, "num_experts": 8, "topk": 2},
    "qwen3": {**SOFTMAX, "num_experts": 128, "dtype": FP16, "out_dtype": BF16},
    "gpt-oss": {**PLAIN, "scoring": "softmax_of_chosen", "num_experts": 32, "topk": 4},
    "kimi": {"num_experts": 384, "num_groups": 1, "topk_groups": 1},
    "odd groups": {"num_experts": 51, "num_groups": 3, "topk_groups": 2, "topk": 5},
    "all experts": {**SOFTMAX, "num_experts": 7, "topk": 7},
    "one expert": {**SOFTMAX, "num_experts": 1, "topk": 1},
    "most experts": {**SOFTMAX, "num_experts": 1024, "topk": 32},
}  # fmt: skip


def exact(args, kwargs):
    """The reference in float64."""
    return moe_route.reference(
        *(x if x is None else x.to(FP64) for x in args), **{**kwargs, "out_dtype": FP64}
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_routing(device, style):
    args, kwargs = replace(PROBLEM, **style).sample(seed=0, device=device)
    weights, experts = route_kernels.moe_route(*args, **kwargs)
    exact_weights, exact_experts = exact(args, kwargs)
    assert torch.equal(experts, exact_experts)
    tolerance = {FP32: 2e-6, BF16: 2**-8}[weights.dtype]
    torch.testing.assert_close(weights.double(), exact_weights, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_infinities_nan_and_gaps_between_rows(device):
    logits = torch.randn(6, 300, device=device).round()[:, :96]  # many equal numbers
    logits[0], logits[1, 7], logits[2, 3] = 0.0, torch.nan, -torch.inf
    style = {"topk": 5, "scoring": "softmax_of_chosen", "num_groups": 6, "topk_groups": 4}
    for changed in ({}, {"group_score": "max"}, {"num_groups": 1, "topk_groups": 1}):
        kwargs = {**style, **changed}
        weights, experts = route_kernels.moe_route(logits, None, **kwargs)
        expected, chosen = moe_route.reference(logits, None, **kwargs)
        assert torch.equal(experts, chosen)
        torch.testing.assert_close(weights, expected, equal_nan=True, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "problem",
    [
        SortProblem(1, 8, 256, 64),
        SortProblem(128, 8, 256, 64),  # the largest single chunk
        SortProblem(147, 7, 10, 16),  # two entries more than one chunk and a bit
        SortProblem(700, 6, 384, 128, torch.int32, BF16),
        SortProblem(33, 1, 1, 1, weight_dtype=FP16),
        SortProblem(5, 3, 1000, 32),
    ],
    ids=str,
)
def test_sorting(device, problem):
    (experts, weights), kwargs = problem.sample(seed=0, device=device)
    experts[::5, 0] = -1
    experts[3::7, -1] = problem.num_experts
    found = sort_kernels.moe_sort(experts, weights, **kwargs)
    expected = moe_sort.reference(experts, weights, **kwargs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_all_entries_of_one_expert(device):
    experts = torch.full((900, 2), 5, device=device)
    weights = torch.rand(900, 2, device=device)
    found = sort_kernels.moe_sort(experts, weights, num_experts=9, block_m=16)
    expected = moe_sort.reference(experts, weights, num_experts=9, block_m=16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_tokens():
    args, kwargs = replace(PROBLEM, num_tokens=0).sample(seed=0, device="cpu")
    assert [x.shape for x in route_kernels.moe_route(*args, **kwargs)] == [(0, 8), (0, 8)]
    args, kwargs = SortProblem(0, 8, 16, 32).sample(seed=0, device="cpu")
    found = sort_kernels.moe_sort(*args, **kwargs)
    expected = moe_sort.reference(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_refusals_are_sentences():
    logits = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="are not contiguous"):
        route_kernels.moe_route(logits.mT, None, topk=1, scoring="softmax")
    with pytest.raises(ValueError, match="6 experts in 4 groups"):
        route_kernels.moe_route(logits, None, topk=1, scoring="softmax", num_groups=4)
    experts = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="have gaps"):
        sort_kernels.moe_sort(experts.mT, logits[:3, :2], num_experts=4, block_m=16)
