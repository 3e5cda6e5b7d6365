"""RoPE of q and k with k and v stored in a static cache: the formula, its parts, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.rope_cache import rope_cache_write
from aiter_inductor.lowerings.rope_cache_problem import RopeCacheProblem
from tests.lowerings.checks import opcheck

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PROBLEM = RopeCacheProblem(
    *(2, 5, 4, 2, 32, 32, 1, 32, BF16, BF16, BF16, BF16), num_slots=11, v_head_dim=24
)
GFX942 = Use(arch_named("gfx942"))


@pytest.mark.parametrize("normed", [False, True])
def test_rotated_keys_and_values_lie_at_their_slots(normed):
    kinds = dict.fromkeys(("dtype", "kv_dtype", "table_dtype", "out_dtype", "cache_dtype"), FP64)
    problem = replace(PROBLEM, **kinds, weight_dtype=FP64 if normed else None, table_width=16)
    args, kwargs = problem.sample(seed=0, device="cpu")
    q, k, v, cos, sin, key_cache, value_cache, slots, *weights = args
    q_out, keys, values = rope_cache_write.outcome(rope_cache_write, args, kwargs)
    if normed:
        heads = zip((q, k), weights, strict=True)
        q, k = (x * (x.square().mean(-1, True) + 1e-6).rsqrt() * w for x, w in heads)
    turned = [torch.complex(x[..., :16], x[..., 16:]) * torch.complex(cos, sin) for x in (q, k)]
    q_exact, k_exact = (torch.cat((z.real, z.imag), -1) for z in turned)
    torch.testing.assert_close(q_out, q_exact)
    for found, before, exact in ((keys, key_cache, k_exact), (values, value_cache, v)):
        torch.testing.assert_close(found[:, :, slots], exact)
        others = [slot for slot in range(11) if slot not in slots.tolist()]
        assert torch.equal(found[:, :, others], before[:, :, others])


@pytest.mark.parametrize("weight_dtype", [None, BF16])
def test_torch_checks_the_schema(weight_dtype):
    problem = replace(PROBLEM, weight_dtype=weight_dtype)
    opcheck(rope_cache_write, *problem.sample(seed=0, device="cpu"))


def test_compiled_graph_writes_the_caches_it_was_given():
    def step(q, *rest):
        out = rope_cache_write(q + 1, *rest)
        return out, rest[4].sum(-1)

    args, _ = PROBLEM.sample(seed=0, device="cpu")
    ours = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    expected = step(*args)
    found = torch.compile(step, fullgraph=True, backend="aiter")(*ours)
    for a, b in zip((*found, *ours[5:7]), (*expected, *args[5:7]), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"v_head_dim": 2000}, "v_head_dim=2000 is not a number from 1 to 1024"),
        ({"cache_dtype": FP32}, "keys leave the rotation as bfloat16 and the cache holds float32"),
        ({"kv_dtype": FP32}, "q is bfloat16 but k is float32; one launch rotates one dtype"),
        ({"unfit": "v is bent"}, "v is bent"),
    ],
)
def test_kernels_refuse_with_a_sentence(changed, sentence):
    refuse = rope_cache_write.providers["triton"].refuse
    assert refuse(PROBLEM, GFX942) is None
    assert refuse(replace(PROBLEM, **changed), GFX942) == sentence


def test_few_tokens_are_left_to_inductor_where_launches_cost_the_host():
    decline = rope_cache_write.providers["triton"].decline
    hopper = Use(arch_named("sm_90"))
    assert "10 tokens without CUDA graphs" in str(decline(PROBLEM, hopper))
    assert decline(replace(PROBLEM, num_tokens=65), hopper) is None
    assert decline(replace(PROBLEM, weight_dtype=BF16), hopper) is None
    assert decline(PROBLEM, replace(hopper, replayed=True)) is None
    assert decline(PROBLEM, GFX942) is None


def test_tensors_that_do_not_fit_are_named():
    args, kwargs = PROBLEM.sample(seed=0, device="cpu")
    given = rope_cache_write.bind(*args, **kwargs)

    def unfit(**changed):
        return RopeCacheProblem.of(**given | changed).unfit

    k, v, keys, values = (given[name] for name in ("k", "v", "key_cache", "value_cache"))
    assert unfit() is None
    assert unfit(v=v.float()) == "v is float32 but k is bfloat16"
    assert unfit(v=v[:, :1]) == "v is [2, 1, 5, 24] but k is [2, 2, 5, 32]"
    assert "the last stride of v is 2" in unfit(v=v.repeat_interleave(2, -1)[..., ::2])
    assert unfit(key_cache=keys[:, :1]) == (
        "key_cache is [2, 1, 11, 32] but the heads are [2, 2, 5, 32]"
    )
    assert unfit(key_cache=keys[:, :, :9]) == "key_cache holds 9 tokens, value_cache 11"
    assert unfit(value_cache=values.float()) == "key_cache is bfloat16 but value_cache is float32"
    turned = keys.mT.contiguous().mT
    assert unfit(key_cache=turned) == "key_cache has last stride 11; kernels write with stride 1"
    assert unfit(slots=given["slots"][:3]) == "slots are [3] for 5 tokens"
    assert unfit(slots=given["slots"].short()) == "slots are int16, not int64"
    weight = torch.ones(32, dtype=BF16)
    assert unfit(q_weight=weight) == "one of q and k is normalised and the other is not"
    assert unfit(k=k[0]) == "k has 3 dimensions, not [batch, heads, tokens, head_dim]"
