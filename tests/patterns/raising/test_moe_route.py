"""Routers of models are recognised and rewritten; near misses say why; other choices are left."""

from __future__ import annotations

import pytest
import torch

import aiter_inductor
from tests.lowerings.test_moe import router
from tests.models import zoo
from tests.patterns.rewrite_check import check_rewrite

MODELS = {
    "deepseek_v3": {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 8,
                    "topk_group": 3, "routed_scaling_factor": 2.5},
    "mixtral": {},
    "qwen3_moe": {"num_experts": 128, "norm_topk_prob": True},
    "gpt_oss": {},
}  # fmt: skip
E, G, K = 16, 4, 3


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(9, E, generator=torch.Generator().manual_seed(0)).to(dtype)


def bias() -> torch.Tensor:
    return torch.linspace(-0.1, 0.1, E)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_routers_of_models(family, dynamic):
    model, x = router(family, **MODELS[family])
    model, x = model.float(), x.float()  # bf16 logits tie, and torch breaks ties as it likes

    def run(x):
        _, weights, experts = model(x)
        order = experts.argsort(-1)  # DeepSeek's are in no order
        return weights.gather(-1, order), experts.gather(-1, order)

    check_rewrite(run, x, expect={"moe_route": 1}, dynamic=dynamic)


def deepseek_v2(x):
    """Softmax, groups by their best expert, left out with 0."""
    scores = x.softmax(dim=-1, dtype=torch.float32)
    groups = scores.view(-1, G, E // G).max(dim=-1).values
    index = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups).scatter(1, index, 1)
    mask = mask.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E)
    weights, experts = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=K, dim=-1)
    return weights * 16.0, experts


def minimax(x):
    """Sigmoid and bias without groups, renormalised without eps."""
    scores = torch.sigmoid(x.float())
    _, experts = torch.topk(bias() + scores, K, dim=-1)
    weights = scores.gather(1, experts)
    return (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16), experts


def plain_softmax(x):
    values, experts = x.softmax(-1).topk(K, dim=1)
    return 2.5 * values, experts


def ernie(x):
    """Arguments by name; the quotient stays with Inductor, as its divisor is clamped."""
    scores = torch.softmax(input=x, dim=1, dtype=torch.float)
    _, experts = torch.topk(input=scores + bias(), k=K, dim=-1)
    weights = torch.gather(input=scores, dim=-1, index=experts)
    return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12), experts


def groups_by_name(x):
    """DeepSeek-V2's groups, every argument by its name."""
    scores = torch.softmax(x, dim=-1)
    best = scores.view(-1, G, E // G).max(dim=-1).values
    index = torch.topk(best, k=2, dim=-1)[1]
    mask = torch.scatter(input=torch.zeros_like(best), dim=1, index=index, value=1)
    mask = mask.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E)
    left_out = torch.logical_not(input=mask.bool())
    return torch.masked_fill(input=scores, mask=left_out, value=0.0).topk(k=K, dim=-1)


@pytest.mark.parametrize("program", [deepseek_v2, minimax, plain_softmax, ernie, groups_by_name])
def test_other_spellings(program):
    check_rewrite(program, logits(), expect={"moe_route": 1})


def rounded_scores(x):
    values, experts = x.softmax(-1).topk(K, dim=-1)
    return values, experts


def mask_of_other_origin(x):
    scores = x.sigmoid()
    allowed = torch.arange(E) % 2 == 0
    _, experts = scores.masked_fill(~allowed, -torch.inf).topk(K, dim=-1)
    return scores.gather(1, experts), experts


def filled_with_what_may_win(x):
    scores = x.sigmoid()
    choice = scores + bias()
    best = choice.view(-1, G, E // G).topk(2, dim=-1)[0].sum(dim=-1)
    index = torch.topk(best, k=2, dim=-1)[1]
    mask = torch.zeros_like(best)
    mask.scatter_(1, index, 1)
    mask = mask.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E)
    _, experts = torch.topk(choice.masked_fill(~mask.bool(), 0.0), k=K, dim=-1)
    return scores.gather(1, experts), experts


@pytest.mark.parametrize(
    ("program", "dtype", "sentence"),
    [
        (rounded_scores, torch.bfloat16, "rounded to torch.bfloat16; the kernel chooses by fp32"),
        (mask_of_other_origin, torch.float32, "by something else than their groups' best scores"),
        (filled_with_what_may_win, torch.float32, "filled with 0, which may be chosen"),
    ],
    ids=["bf16 scores", "other mask", "filled with 0"],
)
def test_near_misses(program, dtype, sentence):
    result = check_rewrite(program, logits(dtype), expect={})
    assert any(sentence in reason for reason in result.reasons()), result.reasons()


def scores_read_elsewhere(x):
    """A load-balancing loss keeps the scores, which the kernel does not write."""
    scores = x.softmax(-1)
    values, experts = scores.topk(K, dim=-1)
    return values, experts, scores.mean(0)


def test_scores_that_something_else_reads_stay():
    result = check_rewrite(scores_read_elsewhere, logits(), expect={"moe_route": 1}, inserted=0)
    assert any("users" in reason for reason in result.reasons())


def best_groups(x):
    groups = x.view(-1, G, E // G).max(dim=-1).values
    mask = torch.zeros_like(groups).scatter(1, groups.topk(2, dim=-1)[1], 1)
    return mask.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E).bool()


def without_the_best_groups(x):
    """The groups that score best are those left out."""
    scores = x.softmax(-1)
    return scores.masked_fill(best_groups(scores), 0.0).topk(K, dim=-1)


def logits_filled_with_zero(x):
    """Zero beats the logits of the groups that are kept."""
    values, experts = x.masked_fill(~best_groups(x), 0.0).topk(K, dim=-1)
    return values.softmax(-1), experts


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (without_the_best_groups, "by something else than their groups' best scores"),
        (logits_filled_with_zero, "filled with 0, which may be chosen"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_groups_filled_otherwise(program, sentence):
    result = check_rewrite(program, logits() - 3.0, expect={})
    assert any(sentence in reason for reason in result.reasons()), result.reasons()


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x.topk(K, dim=-1),
        lambda x: x.softmax(-1).topk(K, dim=0),
        lambda x: x.softmax(0).topk(K, dim=-1),
        lambda x: x.softmax(-1).topk(K, dim=-1, largest=False),
        lambda x: x.softmax(-1).topk(K, dim=-1)[0],
    ],
    ids=["no scores", "over tokens", "softmax over tokens", "smallest", "no indices"],
)
def test_other_choices_are_left(program):
    check_rewrite(program, logits(), expect={})


def test_training_is_left_with_a_sentence():
    x = logits().requires_grad_()
    result = check_rewrite(plain_softmax, x, expect={"moe_route": 1}, inserted=0, backward=True)
    assert any("moe_route has no backward" in reason for reason in result.reasons())


@pytest.mark.parametrize(
    ("family", "number"),
    {"deepseek_v2": 1, "glm4_moe": 1, "minimax_m2": 2, "llama4": 0, "phimoe": 0}.items(),
)
def test_whole_models(family, number):
    """Llama 4 scatters its logits before a sigmoid, Phi-MoE masks by a threshold: both are left."""
    model, ids = zoo.build(family), torch.arange(8)[None]
    with torch.no_grad():
        report = aiter_inductor.explain(model, input_ids=ids, use_cache=False, target="gfx942")
    assert report.count("moe_route") == number
