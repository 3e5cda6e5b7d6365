"""RoPE of q and k with k and v written into a cache: the formula, its parts, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.kv_cache import rope_kv_cache_write
from aiter_inductor.lowerings.rope_kv_problem import RopeKvCacheProblem
from tests.lowerings.checks import opcheck

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PROBLEM = RopeKvCacheProblem(
    9, 2, 32, 32, 3, 16, BF16, BF16, num_heads=4, rotary_dim=32, table_width=32
)
GFX942 = Use(arch_named("gfx942"))


def test_pairs_are_turned_by_the_angle_of_their_position():
    problem = replace(
        PROBLEM, dtype=FP64, cache_dtype=FP64, table_dtype=FP64, table_width=16, num_positions=40
    )
    args, kwargs = problem.sample(seed=0, device="cpu")
    q, k, v, cos, sin, positions, _, _, slots, *_ = args
    q_out, keys, values = rope_kv_cache_write.outcome(rope_kv_cache_write, args, kwargs)
    angle = torch.complex(cos, sin)[positions].unsqueeze(1)
    turned = [torch.complex(x[..., :16], x[..., 16:]) * angle for x in (q, k)]
    q_exact, k_exact = (torch.cat((z.real, z.imag), -1) for z in turned)
    torch.testing.assert_close(q_out, q_exact)
    stored = slots >= 0
    torch.testing.assert_close(keys.view(48, 2, 32)[slots[stored]], k_exact[stored])
    assert torch.equal(values.view(48, 2, 32)[slots[stored]], v[stored])


@pytest.mark.parametrize("layout", ["paged", "packed"])
def test_torch_checks_the_schema(layout):
    opcheck(rope_kv_cache_write, *replace(PROBLEM, layout=layout).sample(seed=0, device="cpu"))


def test_compiled_graph_writes_the_cache_it_was_given():
    def step(q, *rest):
        return rope_kv_cache_write(q + 1, *rest)

    args, _ = PROBLEM.sample(seed=0, device="cpu")
    ours = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    expected = step(*args)
    found = torch.compile(step, fullgraph=True, backend="aiter")(*ours)
    for a, b in zip((found, *ours[6:8]), (expected, *args[6:8]), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"v_head_dim": 16}, "keys have 32 elements and values 16"),
        ({"rotary_dim": 7}, "rotary_dim=7 is not an even number up to 32"),
        ({"rotary_dim": 34}, "rotary_dim=34 is not an even number up to 32"),
        ({"table_width": 8}, "cos is 8 wide, neither rotary_dim=32 nor half of it"),
        ({"table_dtype": FP64}, "cos is float64; rotary kernels take bfloat16, float16, float32"),
        ({"slot_dtype": torch.int8}, "slots are int8; kernels take int32 and int64"),
        ({"unfit": "q is bent"}, "q is bent"),
    ],
)
def test_kernels_refuse_with_a_sentence(changed, sentence):
    refuse = rope_kv_cache_write.providers["hip"].refuse
    assert refuse(PROBLEM, GFX942) is None
    assert refuse(replace(PROBLEM, **changed), GFX942) == sentence


def unfit(**changed: torch.Tensor | None) -> str | None:
    args, kwargs = PROBLEM.sample(seed=0, device="cpu")
    return RopeKvCacheProblem.of_rope(**rope_kv_cache_write.bind(*args, **kwargs) | changed).unfit


def test_tensors_that_do_not_fit_are_named():
    q, cos = torch.zeros(9, 4, 32, dtype=BF16), torch.zeros(9, 32, dtype=BF16)
    assert unfit() is None
    assert unfit(q=q.float()) == "q is float32 but k is bfloat16"
    assert unfit(q=q[:8]) == "q is [8, 4, 32] but k is [9, 2, 32]"
    assert "is not [num_tokens, heads, head_dim] with contiguous heads" in str(unfit(q=q[0]))
    assert unfit(cos=cos.float()) == "cos is float32[9, 32] but sin is bfloat16[9, 32]"
    fewer = {"cos": cos[:5], "sin": cos[:5]}
    assert unfit(**fewer) == "cos has 5 rows for 9 tokens and there are no positions"
    positions = torch.zeros(9, dtype=torch.int32)
    assert unfit(**fewer, positions=positions) == "positions are int32, not int64"
    assert unfit(**fewer, positions=positions.long()) is None
    assert "not contiguous rows" in str(unfit(cos=cos.mT.contiguous().mT))
