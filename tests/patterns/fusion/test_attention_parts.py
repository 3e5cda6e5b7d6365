"""Queries and keys read in their parts: DeepSeek's prefill, and what keeps them together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import aiter_inductor
from tests.models import zoo
from tests.patterns.rewrite_check import check_rewrite

B, HEADS, S, NOPE, ROPE, V = 2, 4, 40, 16, 8, 16
PARTS = {"attention": 1}


def parts():
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, NOPE), (HEADS, ROPE), (HEADS, NOPE), (1, ROPE), (HEADS, V)
    return tuple(torch.randn(B, heads, S, width, generator=generator) for heads, width in sizes)


def by_cat(first, second):
    return torch.cat((first, second), -1)


def by_copies(first, second):
    whole = first.new_empty(*first.shape[:-1], first.shape[-1] + second.shape[-1])
    whole[..., : first.shape[-1]].copy_(first)
    whole[..., first.shape[-1] :].copy_(second)
    return whole


def attend(q_nope, q_rope, k_nope, k_rope, v, join=by_cat, **how):
    k = join(k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1))
    how = how or {"is_causal": True}
    return F.scaled_dot_product_attention(join(q_nope, q_rope), k, v, **how)


def taken(run, *args, **how):
    """The one op that the program became."""
    (decision,) = check_rewrite(run, *args, expect=PARTS, **how).decisions
    return decision.match.op.name


@pytest.mark.parametrize("join", [by_cat, by_copies])
@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_are_read_where_they_lie(join, dynamic):
    def run(*args):
        return attend(*args, join=join, is_causal=True, scale=0.2)

    given = parts()
    for x in given if dynamic else ():
        torch._dynamo.mark_dynamic(x, 2)
    assert taken(run, *given) == "mla_prefill"


STAYS = {
    "a head of its own": lambda a, b, c, d, v: attend(a, b, c, d.repeat(1, HEADS, 1, 1), v),
    "a mask": lambda a, b, c, d, v: attend(a, b, c, d, v, attn_mask=torch.sin(v[:, :1, :, :1]) > 0),
    "other widths": lambda a, b, c, d, v: attend(
        torch.cat((a, b[..., :4]), -1), b[..., 4:], c, d, v
    ),
    "queries whole": lambda a, b, c, d, v: F.scaled_dot_product_attention(
        by_cat(a, b).exp(), by_cat(c, d.expand(-1, HEADS, -1, -1)), v, is_causal=True
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_near_misses_are_put_together(case):
    assert taken(STAYS[case], *parts()) == "attention"


def test_keys_that_somebody_else_reads_are_put_together():
    def run(a, b, c, d, v):
        k = by_cat(c, d.expand(-1, HEADS, -1, -1))
        return F.scaled_dot_product_attention(by_cat(a, b), k, v, is_causal=True), k.sum()

    assert taken(run, *parts()) == "attention"


def test_gradients_flow_through_whole_heads():
    given = tuple(x.requires_grad_() for x in parts())
    assert taken(attend, *given, backward=True) == "attention_with_lse"


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@torch.no_grad()
def test_deepseek_on_hopper(name):
    sizes = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 16, "v_head_dim": 32}
    model = zoo.build(name, layers=1, kv_lora_rank=128, **sizes)
    ids = zoo.token_ids(1, 64)
    report = aiter_inductor.explain(model, ids, target="sm_90", use_cache=False)
    (site,) = (site for site in report.sites if site.pattern == "attention")
    assert (site.status, site.fused_into, site.provider) == ("fused", "mla_prefill", "cuda"), site
