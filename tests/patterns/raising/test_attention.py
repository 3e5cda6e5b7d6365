"""Attention in its spellings: what is recognised, with which arguments, and what is not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor.core.plan import raise_matches
from aiter_inductor.patterns import RAISING
from tests.patterns.rewrite_check import check_rewrite

B, H, KVH, S, D = 2, 4, 2, 6, 16
SITE = {"attention": 1}


def heads(T=S, Dv=D, KV=KVH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, S, D), (B, KV, T, D), (B, KV, T, Dv)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)


def repeat_kv(x, n):
    b, kvh, t, d = x.shape
    return x[:, :, None, :, :].expand(b, kvh, n, t, d).reshape(b, kvh * n, t, d)


def arguments(result):
    (decision,) = result.decisions
    return decision.match.op.bind(*decision.match.args, **decision.match.kwargs)


def eager(q, k, v, mask=None, *, softcap=None, p=0.0, softmax_dtype=torch.float32):
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    if softcap is not None:
        weights = weights / softcap
        weights = torch.tanh(weights)
        weights = weights * softcap
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=softmax_dtype).to(q.dtype)
    weights = F.dropout(weights, p=p, training=p > 0)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def with_sinks(q, k, v, sinks, *, subtract=True):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    spread = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([weights, spread], dim=-1)
    if subtract:
        logits = logits - logits.max(dim=-1, keepdim=True).values
    probabilities = F.softmax(logits, dim=-1, dtype=logits.dtype)
    return torch.matmul(probabilities[..., :-1], v)


SDPA = {
    "plain": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), {}),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        {"causal": "top_left"},
    ),
    "scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True),
        {"scale": 0.5},
    ),
    "repeat_kv": (
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2)),
        {},
    ),
    "repeat_interleave": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)
        ),
        {},
    ),
}


@pytest.mark.parametrize("spelling", SDPA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa(spelling, dtype):
    run, wanted = SDPA[spelling]
    result = check_rewrite(run, *heads(dtype=dtype), expect=SITE)
    found = arguments(result)
    assert found["k"].op == found["v"].op == "placeholder", "heads are read before their repetition"
    expected = {"scale": 1 / math.sqrt(D), "causal": "none", "window": None, **wanted}
    assert {name: found[name] for name in expected} == expected


def test_heads_that_are_tiled_are_not_a_group():
    def tiled(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    found = arguments(check_rewrite(tiled, *heads(), expect=SITE))
    assert found["k"].op == "call_method"


def test_a_mask_that_is_an_input_is_passed_on():
    mask = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[0, 0, 2] = False

    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    for given in (mask, mask[0, 0], torch.randn(S, S)):
        found = arguments(check_rewrite(run, *heads(), given, expect=SITE))
        assert found["mask"] is not None
        assert found["causal"] == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"softcap": 5.0}, {"softmax_dtype": None}], ids=str)
def test_eager(how, dtype):
    def run(q, k, v):
        seen = torch.ones(S, S, dtype=torch.bool).tril()
        lowest = torch.finfo(q.dtype).min
        mask = torch.where(seen, torch.zeros((), dtype=q.dtype), lowest)[None, None]
        return eager(q, k, v, mask, **how)

    found = arguments(check_rewrite(run, *heads(dtype=dtype), expect=SITE))
    assert found["mask"] is None
    assert (found["causal"], found["softcap"]) == ("top_left", how.get("softcap"))
    assert found["k"].op == "placeholder"


BY_TOKEN = {  # what becomes of the result, and the order in which the op then stores it
    "copied": (lambda out: out.transpose(1, 2).contiguous(), "bshd"),
    "copied, counted from the end": (lambda out: out.transpose(-2, -3).contiguous(), "bshd"),
    "not copied": (lambda out: out.transpose(1, 2), "bhsd"),
    "other axes": (lambda out: out.transpose(2, 3).contiguous(), "bhsd"),
    "channels last": (
        lambda out: out.transpose(1, 2).contiguous(memory_format=torch.channels_last),
        "bhsd",
    ),
    "read before": (lambda out: (out.transpose(1, 2).contiguous(), out + 1), "bhsd"),
}


@pytest.mark.parametrize("case", BY_TOKEN)
def test_a_copy_by_token_is_what_the_op_stores(case):
    use, layout = BY_TOKEN[case]

    def run(q, k, v):
        return use(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)

    assert arguments(check_rewrite(run, *heads(KV=H), expect=SITE))["layout"] == layout


@pytest.mark.parametrize("subtract", [True, False])
def test_sinks(subtract):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    found = arguments(
        check_rewrite(lambda *a: with_sinks(*a, subtract=subtract), *heads(), sinks, expect=SITE)
    )
    assert found["sinks"].op == "placeholder"


def widened(q, k, v):
    """GPT-J in half precision: scores in float32, probabilities in v's dtype."""
    weights = q.float() @ k.float().transpose(-1, -2) / 4.0
    return torch.softmax(weights, dim=-1).to(v.dtype) @ v


def without_its_maximum(q, k, v):
    weights = q @ k.transpose(-1, -2)
    weights = weights - weights.max(dim=-1, keepdim=True).values
    return torch.softmax(weights, dim=-1) @ v


@pytest.mark.parametrize("run", [widened, without_its_maximum])
def test_what_changes_no_result_is_left_out(run):
    found = arguments(check_rewrite(run, *heads(KV=H, dtype=torch.bfloat16), expect=SITE))
    assert {found[name].op for name in "qkv"} == {"placeholder"}


def flat(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


NEAR_MISSES = {
    flat: "its scores have 3 dimensions, not 4",
    lambda q, k, v: torch.softmax((q @ k.mT).exp(), -1) @ v: (
        "behind scale and mask its scores are exp, no q @ k^T"
    ),
    lambda q, k, v: torch.softmax(q @ k, -1) @ v: "its scores are matmul, whose right side is no",
    lambda q, k, v: torch.softmax(q @ k.mT - k.amax(-1, keepdim=True), -1) @ v: (
        "behind scale and mask its scores are sub, no q @ k^T"
    ),
    lambda q, k, v: torch.softmax(q @ k.mT, -1)[..., :-1] @ v[:, :, 1:]: (
        "the last key's probabilities are dropped, and are no sinks"
    ),
    lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1).double() @ v.double(): (
        "q, k, v and the result are"
    ),
}


@pytest.mark.parametrize("run", NEAR_MISSES)
def test_near_misses_say_why(run):
    square = tuple(torch.randn(B, H, D, D) for _ in range(3))
    assert any(NEAR_MISSES[run] in reason for reason in _reasons(run, *square))


def test_a_result_that_is_written_to_keeps_its_gradient():
    """Nystromformer adds its convolution in place; attention saves its result."""

    def run(q, k, v):
        out = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        out += q
        return out

    check_rewrite(run, *heads(KV=H), expect=SITE)
    given = tuple(t.requires_grad_() for t in heads(KV=H))
    result = check_rewrite(run, *given, expect=SITE, inserted=0, backward=True)
    assert any("which its gradients are made from" in reason for reason in result.reasons())


def test_dropout_is_left_alone():
    q, k, v = heads()

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)

    for run in (sdpa, lambda q, k, v: eager(q, k, v, p=0.5)):
        assert "it drops probabilities with p=0.5" in _reasons(run, q, k, v)


def test_returned_weights_keep_the_site():
    def run(q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1)
        return weights @ v, weights

    result = check_rewrite(run, *heads(KV=H), expect=SITE, inserted=0)
    assert "1 of them outside" in " ".join(result.reasons())


NOT_ATTENTION = {
    "over queries": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), dim=-2) @ v,
    "sigmoid": lambda q, k, v: torch.sigmoid(q @ k.transpose(-1, -2)) @ v,
    "a key is dropped": lambda q, k, v: (
        torch.softmax(q @ k.transpose(-1, -2), dim=-1)[..., :-1] @ v[:, :, 1:]
    ),
    "k not transposed": lambda q, k, v: torch.softmax(q @ k, dim=-1) @ v,
}


@pytest.mark.parametrize("spelling", NOT_ATTENTION)
def test_not_attention(spelling):
    square = tuple(torch.randn(B, H, D, D) for _ in range(3))
    check_rewrite(NOT_ATTENTION[spelling], *square, expect={})


@pytest.mark.parametrize("how", [{}, {"softcap": 5.0}], ids=str)
def test_training_keeps_the_log_sum_exp(how):
    given = tuple(t.requires_grad_() for t in heads())

    def run(q, k, v):
        mask = torch.ones(S, S, dtype=torch.bool).triu(1)
        mask = torch.zeros(S, S).masked_fill(mask, -torch.inf)
        return eager(q, k, v, mask[None, None], **how)

    result = check_rewrite(run, *given, expect=SITE, backward=True)
    (decision,) = result.decisions
    assert decision.match.op.name == "attention_with_lse"
    assert arguments(result)["causal"] == "top_left"


def test_a_mask_that_is_learned_gets_its_gradient():
    given = tuple(t.requires_grad_() for t in heads())
    bias = torch.randn(1, H, S, S, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_rewrite(eager, *given, bias, expect=SITE, backward=True)


def test_dynamic_lengths():
    q, k, v = heads()
    for tensor in (q, k, v):
        torch._dynamo.mark_dynamic(tensor, 2)

    def run(q, k, v):
        positions = torch.arange(q.shape[2])
        seen = positions[None, :] <= positions[:, None]
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=seen)

    found = arguments(check_rewrite(run, q, k, v, expect=SITE))
    assert found["mask"] is None


def test_heads_of_unknown_width_have_no_scale():
    result = check_rewrite(SDPA["causal"][0], *heads(), expect={}, dynamic=True)
    assert "scale is None, not known when compiling" in result.reasons()


def _reasons(run, *args):
    reasons = []

    def capture(gm, example_inputs):
        reasons.extend(miss.reason for miss in raise_matches(gm.graph, RAISING).misses)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=capture)(*args)
    return reasons
