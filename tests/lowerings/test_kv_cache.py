"""Writing keys and values into a cache: where each row lands, in both layouts; refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import OPS, Use
from aiter_inductor.lowerings.kv_cache import kv_cache_write
from aiter_inductor.lowerings.kv_cache_problem import KvCacheProblem
from tests.lowerings.checks import opcheck

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
PROBLEM = KvCacheProblem(9, 2, 32, 16, 3, 16, BF16, BF16)
STYLES = {
    "paged": PROBLEM,
    "packed": replace(PROBLEM, layout="packed"),
    "transposed": replace(PROBLEM, layout="transposed"),
    "paged fp8": replace(PROBLEM, cache_dtype=FP8, scaled=True),
    "packed fp8": replace(PROBLEM, cache_dtype=FP8, scaled=True, layout="packed"),
    "int32 slots": replace(PROBLEM, slot_dtype=torch.int32),
}
GFX942 = Use(arch_named("gfx942"))


def written_by_loops(problem: KvCacheProblem, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Both caches after a loop over tokens, heads and elements, by the layouts' definition."""
    key, value, *caches, slots, key_scale, value_scale = args
    caches = [cache.clone() for cache in caches]
    pack = 16 // problem.cache_dtype.itemsize
    for token, slot in enumerate(slots.tolist()):
        if not 0 <= slot < problem.num_pages * problem.page_size:
            continue
        page, at = divmod(slot, problem.page_size)
        for x, scale, cache in zip((key, value), (key_scale, value_scale), caches, strict=True):
            row = x[token].float() if scale is None else x[token].float() / scale
            row = row.to(problem.cache_dtype)
            for head, d in ((h, d) for h in range(x.shape[1]) for d in range(x.shape[2])):
                if problem.layout == "paged":
                    cache[page, at, head, d] = row[head, d]
                elif x is key:
                    cache[page, head, d // pack, at, d % pack] = row[head, d]
                elif problem.layout == "transposed":
                    cache[page, head, d, at] = row[head, d]
                else:
                    cache[page, head, at // pack, d, at % pack] = row[head, d]
    return caches


@pytest.mark.parametrize("problem", STYLES.values(), ids=STYLES)
def test_each_row_lands_at_its_slot(problem):
    args, kwargs = problem.sample(seed=0, device="cpu")
    args[4][2], args[4][6] = -1, 48  # outside the cache
    written = kv_cache_write.outcome(kv_cache_write, args, kwargs)
    for ours, theirs in zip(written, written_by_loops(problem, args), strict=True):
        assert torch.equal(ours.float(), theirs.float())


def test_sample_stores_what_the_cache_has_room_for():
    args, _ = replace(PROBLEM, num_tokens=50).sample(seed=0, device="cpu")
    assert args[4].unique().numel() == 50
    assert (args[4] < 48).sum() == 48


@pytest.mark.parametrize("slots", [[-1, -1], [48, -7], [2**40, -(2**40)]], ids=str)
def test_slots_outside_the_cache_are_not_stored(slots):
    args, kwargs = replace(PROBLEM, num_tokens=2).sample(seed=0, device="cpu")
    args = (*args[:4], torch.tensor(slots), None, None)
    for after, before in zip(kv_cache_write.outcome(kv_cache_write, args, kwargs), args[2:4],
                             strict=True):  # fmt: skip
        assert torch.equal(after, before)


def test_no_tokens_write_nothing():
    args, kwargs = replace(PROBLEM, num_tokens=0).sample(seed=0, device="cpu")
    after = kv_cache_write.outcome(kv_cache_write, args, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(after, args[2:4], strict=True))


@pytest.mark.parametrize("problem", [STYLES["paged"], STYLES["packed"]], ids=["paged", "packed"])
def test_torch_checks_the_schema(problem):
    opcheck(kv_cache_write, *problem.sample(seed=0, device="cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_writes_the_cache_it_was_given(dynamic):
    def step(key, value, cache, slots):
        kv_cache_write(2 * key, value, cache[:, 0], cache[:, 1], slots)
        return cache.sum()

    cache = torch.zeros(3, 2, 16, 2, 32, dtype=BF16)
    ours = cache.clone()
    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True, backend="aiter")
    for num_tokens in (9, 5):
        problem = replace(PROBLEM, v_head_dim=32, num_tokens=num_tokens)
        (key, value, _, _, slots, *_), _ = problem.sample(seed=num_tokens, device="cpu")
        step(key, value, cache, slots)
        compiled(key, value, ours, slots)
        assert torch.equal(ours, cache)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"dtype": torch.float64}, "keys are float64; kernels take bfloat16, float16, float32"),
        ({"cache_dtype": torch.int8}, "the cache is int8, neither float nor fp8"),
        ({"scaled": True}, "scales are given for a cache of bfloat16"),
        ({"cache_dtype": FP8}, "scales are missing for a cache of float8_e4m3fn"),
        ({"slot_dtype": torch.int16}, "slots are int16; kernels take int32 and int64"),
        ({"head_dim": 1025}, "head_dim=1025 is outside 1 to 1024"),
        ({"obstacle": "the cache is bent"}, "the cache is bent"),
    ],
)
def test_kernels_refuse_with_a_sentence(changed, sentence):
    assert kv_cache_write.providers["hip"].refuse(PROBLEM, GFX942) is None
    assert kv_cache_write.providers["hip"].refuse(replace(PROBLEM, **changed), GFX942) == sentence


def obstacle(layout: str = "paged", **changed: torch.Tensor) -> str | None:
    problem = replace(PROBLEM, layout=layout)
    args, kwargs = problem.sample(seed=0, device="cpu")
    inputs = OPS["kv_cache_write"].bind(*args, **kwargs) | changed
    return KvCacheProblem.of(**inputs).obstacle


def test_tensors_that_do_not_fit_are_named():
    rows, cache = torch.zeros(9, 2, 32, dtype=BF16), torch.zeros(3, 16, 2, 32, dtype=BF16)
    assert obstacle() is None
    assert obstacle("packed") is None
    assert obstacle(key=rows.float()) == (
        "key is float32 but its value is bfloat16; one launch writes one dtype"
    )
    assert obstacle(key_scale=torch.ones(1)) == (
        "one of keys and values has a scale and the other none"
    )
    scales = {"key_scale": torch.ones(2), "value_scale": torch.ones(1)}
    assert obstacle(**scales) == "key_scale is float32[2], not one float32"
    assert "is not [num_tokens, num_kv_heads, head_dim]" in str(obstacle(key=rows.mT))
    assert obstacle(key_cache=cache[..., 0, :]) == (
        "key_cache has 3 dimensions; the paged layout has 4"
    )
    assert obstacle(key_cache=cache[..., :24]) == (
        "key_cache holds heads (2, 24) but key has (2, 32)"
    )
    assert obstacle(key_cache=cache.mT.contiguous().mT) == (
        "key_cache has last stride 2; kernels write with stride 1"
    )
    packed = torch.zeros(3, 2, 4, 17, 8, dtype=BF16)[:, :, :, :16]
    assert "is not contiguous within a head" in str(obstacle("packed", key_cache=packed))
    wide = torch.zeros(3, 2, 2, 16, 16, dtype=BF16)
    assert obstacle("packed", key_cache=wide) == "key_cache packs 16 elements, not 16 bytes"
