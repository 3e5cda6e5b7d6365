"""Routing and sorting by expert: models' own routers, definitions by loops, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Use
from aiter_inductor.lowerings.moe import moe_route, moe_sort
from aiter_inductor.lowerings.moe_problem import RouteProblem, SortProblem, sorted_capacity
from tests.lowerings.checks import opcheck

BF16, FP32 = torch.bfloat16, torch.float32
DEEPSEEK = RouteProblem(
    9, 64, 6, 8, 3, FP32, FP32, FP32, "sigmoid", renormalize=True, eps=1e-20, scale=2.5
)
SORT = SortProblem(21, 3, 10, 8)
GFX942 = Use(arch_named("gfx942"))


def router(family: str, **sizes: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    """A transformers router with random parameters, and hidden states [11, 32] in bf16."""
    import importlib

    prefix = {"deepseek_v3": "DeepseekV3", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe",
              "gpt_oss": "GptOss"}[family]  # fmt: skip
    package = f"transformers.models.{family}"
    config = getattr(
        importlib.import_module(f"{package}.configuration_{family}"), prefix + "Config"
    )
    model = importlib.import_module(f"{package}.modeling_{family}")
    name = next(n for n in (f"{prefix}TopkRouter", f"{prefix}TopKRouter") if hasattr(model, n))
    made = getattr(model, name)(config(hidden_size=32, **sizes))
    generator = torch.Generator().manual_seed(0)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return made.bfloat16(), torch.randn(11, 32, generator=generator).bfloat16()


@pytest.mark.parametrize(
    ("family", "sizes", "style"),
    [
        (
            "mixtral",
            {"num_local_experts": 8, "num_experts_per_tok": 2},
            {"scoring": "softmax", "topk": 2, "renormalize": True},
        ),
        (
            "qwen3_moe",
            {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
            {"scoring": "softmax", "topk": 8, "renormalize": True, "out_dtype": BF16},
        ),
        (
            "gpt_oss",
            {"num_local_experts": 32, "num_experts_per_tok": 4},
            {"scoring": "softmax_of_chosen", "topk": 4, "out_dtype": BF16},
        ),
    ],
    ids=["mixtral", "qwen3_moe", "gpt_oss"],
)
def test_routers_of_models(family, sizes, style):
    model, x = router(family, **sizes)
    logits, weights, experts = model(x)
    ours, chosen = moe_route(logits, None, **style)
    # torch breaks ties among bf16 logits as it likes: the weights tell more than the numbers.
    torch.testing.assert_close(ours, weights.to(ours.dtype), rtol=2**-7, atol=0)
    assert (chosen == experts).float().mean() > 0.9


def test_router_of_deepseek_v3():
    model, x = router("deepseek_v3", n_routed_experts=64, num_experts_per_tok=6, n_group=8,
                      topk_group=3, routed_scaling_factor=2.5)  # fmt: skip
    logits, weights, experts = model(x)
    bias = model.e_score_correction_bias
    _, kwargs = DEEPSEEK.sample(seed=0, device="cpu")
    ours, chosen = moe_route(logits, bias, **kwargs)
    assert torch.equal(chosen.sort(-1).values, experts.sort(-1).values)
    order, theirs = chosen.argsort(-1), experts.argsort(-1)
    torch.testing.assert_close(ours.gather(-1, order), weights.float().gather(-1, theirs))


def test_ties_go_to_the_lowest_numbers_and_nan_is_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, torch.nan, 3.0]])
    _, experts = moe_route(logits, None, topk=4, scoring="softmax_of_chosen")
    assert experts.tolist() == [[4, 1, 2, 5]]


def test_a_group_is_judged_by_its_two_best_or_by_its_best():
    logits = torch.tensor([[9.0, -9.0, 5.0, 5.0]])
    style = {"topk": 2, "scoring": "softmax_of_chosen", "num_groups": 2, "topk_groups": 1}
    assert moe_route(logits, None, **style)[1].tolist() == [[2, 3]]
    assert moe_route(logits, None, **style, group_score="max")[1].tolist() == [[0, 1]]


def test_unknown_styles_are_named():
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="scoring 'relu' is not one of softmax, sigmoid"):
        moe_route(logits, None, topk=1, scoring="relu")
    with pytest.raises(ValueError, match="group_score 'mean' is not one of top2, max"):
        moe_route(logits, None, topk=1, scoring="softmax", group_score="mean")


def sorted_by_loops(experts: torch.Tensor, weights: torch.Tensor, num_experts: int, block_m: int):
    """The definition: expert after expert, each in blocks that are filled up."""
    entries, places, values, owners, counts = experts.numel(), [], [], [], []
    for expert in range(num_experts):
        mine = [i for i, e in enumerate(experts.flatten().tolist()) if e == expert]
        padding = -len(mine) % block_m
        places += mine + padding * [entries]
        values += [weights.flatten()[i].item() for i in mine] + padding * [0.0]
        owners += (len(mine) + padding) // block_m * [expert]
        counts.append(len(mine))
    used, capacity = len(places), sorted_capacity(entries, num_experts, block_m)
    places += (capacity - used) * [entries]
    values += (capacity - used) * [0.0]
    owners += (capacity // block_m - len(owners)) * [-1]
    return places, values, owners, counts, [used]


@pytest.mark.parametrize("changed", [{}, {"num_tokens": 1}, {"num_experts": 3, "block_m": 1}],
                         ids=str)  # fmt: skip
def test_entries_of_an_expert_stand_together(changed):
    problem = replace(SORT, **changed)
    (experts, weights), kwargs = problem.sample(seed=0, device="cpu")
    if problem.num_experts > problem.topk:
        experts[0, :2] = torch.tensor([-1, problem.num_experts])  # elsewhere: left out
    found = moe_sort(experts, weights, **kwargs)
    expected = sorted_by_loops(experts, weights, **kwargs)
    assert [x.tolist() for x in found] == list(expected)


def test_capacity_holds_the_worst_distribution():
    for entries, num_experts, block_m in ((63, 10, 8), (3, 10, 8), (8, 8, 8), (1, 1, 1)):
        spread = [entries // num_experts + (e < entries % num_experts) for e in range(num_experts)]
        ones = [1] * min(entries - 1, num_experts - 1)
        for counts in (spread, [entries], [*ones, entries - len(ones)]):
            used = sum(-(-count // block_m) * block_m for count in counts)
            assert used <= sorted_capacity(entries, num_experts, block_m)


@pytest.mark.parametrize("num_tokens", [9, 0])
def test_torch_checks_the_schemas(num_tokens):
    for op, problem in (("moe_route", DEEPSEEK), ("moe_sort", SORT)):
        args, kwargs = replace(problem, num_tokens=num_tokens).sample(seed=0, device="cpu")
        opcheck(OPS[op], args, kwargs)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"dtype": torch.float64}, "logits: float64; kernels take bfloat16, float16, float32"),
        ({"num_experts": 1032}, "num_experts=1032 is outside 1 to 1024"),
        ({"topk": 33}, "topk=33 is outside 1 to 32"),
        ({"num_groups": 7, "topk_groups": 1}, "num_experts=64 is no multiple of num_groups=7"),
        ({"topk_groups": 9}, "topk_groups=9 is outside 1 to 8"),
        ({"topk": 9, "topk_groups": 1}, "topk=9 exceeds the 8 experts of topk_groups=1 groups"),
        ({"num_experts": 8, "topk": 2}, "a group of one expert has no two best"),
        ({"obstacle": "logits are bent"}, "logits are bent"),
    ],
)
def test_routing_refuses_with_a_sentence(changed, sentence):
    refuse = moe_route.providers["hip"].refuse
    assert refuse(DEEPSEEK, GFX942) is None
    assert refuse(replace(DEEPSEEK, **changed), GFX942) == sentence


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"dtype": torch.int16}, "experts are int16; kernels take int32 and int64"),
        (
            {"weight_dtype": torch.float64},
            "weights are float64; kernels take bfloat16, float16, float32",
        ),
        ({"num_experts": 1025}, "num_experts=1025 is outside 1 to 1024"),
        ({"block_m": 24}, "block_m=24 is no power of two"),
    ],
)
def test_sorting_refuses_with_a_sentence(changed, sentence):
    refuse = moe_sort.providers["hip"].refuse
    assert refuse(SORT, GFX942) is None
    assert refuse(replace(SORT, **changed), GFX942) == sentence


def test_tensors_that_do_not_fit_are_named():
    logits = torch.zeros(3, 8)
    style = {"topk": 2, "scoring": "softmax"}
    assert "with contiguous rows" in str(RouteProblem.of(logits.mT, None, **style).obstacle)
    bias = RouteProblem.of(logits, torch.zeros(7), **style).obstacle
    assert bias == "bias is [7] for 8 experts"
    experts = torch.zeros(3, 2, dtype=torch.int64)
    sizes = {"num_experts": 8, "block_m": 16}
    assert SortProblem.of(experts, logits, **sizes).obstacle == (
        "experts [3, 2] and weights [3, 8] differ"
    )
    apart = SortProblem.of(experts, torch.zeros(2, 3).mT, **sizes).obstacle
    assert apart == "experts or weights are not contiguous"
