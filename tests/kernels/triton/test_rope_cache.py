"""The kernel that rotates into a static cache, against the reference in float64, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton.rope import RopeConfig
from aiter_inductor.lowerings.rope_cache import rope_cache_write
from aiter_inductor.lowerings.rope_cache_problem import RopeCacheProblem
from tests.lowerings.checks import assert_close, assert_same_layout, in_float64

FP32 = torch.float32
PROBLEM = RopeCacheProblem(
    *(2, 5, 6, 3, 32, 32, 1, 32, FP32, FP32, FP32, FP32),
    num_slots=11,
    v_head_dim=24,
    cache_dtype=FP32,
)
CONFIG = RopeConfig(block_t=4, block_h=2, num_warps=1)
STYLES = {
    "plain": {},
    "one token": {"num_tokens": 1, "num_slots": 1},
    "many heads": {"num_heads": 7, "num_kv_heads": 1, "batch": 1},
    "tables of each": {"table_batch": 2, "table_width": 16},
    "qwen3": {"weight_dtype": FP32, "round_before_weight": True},
    "gemma": {"weight_dtype": FP32, "weight_offset": 1.0},
    "partial": {"rotary_dim": 16, "table_width": 8},
    "gpt-j": {"interleaved_in": True, "interleaved_out": True},
    "bf16": dict.fromkeys(
        ("dtype", "kv_dtype", "table_dtype", "out_dtype", "cache_dtype"), torch.bfloat16
    ),
}


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def outcome(args, kwargs, config=None):
    run = rope_cache_write.providers["triton"].run
    return rope_cache_write.outcome(lambda **given: run(**given, config=config), args, kwargs)


@pytest.mark.parametrize("config", [None, CONFIG], ids=["default", "small"])
@pytest.mark.parametrize("style", STYLES)
def test_rotated_and_stored(style, config):
    args, kwargs = replace(PROBLEM, **STYLES[style]).sample(seed=0, device="cpu")
    found = outcome(args, kwargs, config)
    exact = {**kwargs, "out_dtype": torch.float64}
    expected = rope_cache_write.outcome(
        rope_cache_write.reference, tuple(map(in_float64, args)), exact
    )
    assert_close(found, expected)
    wanted = rope_cache_write.outcome(rope_cache_write.reference, args, kwargs)
    assert_same_layout(found, wanted)


def test_slots_outside_the_cache_are_not_stored():
    (*given, slots, q_weight, k_weight), kwargs = PROBLEM.sample(seed=0, device="cpu")
    wrong = slots.clone()
    wrong[1], wrong[3] = -1, 11
    found = outcome((*given, wrong, q_weight, k_weight), kwargs)
    stored = [0, 2, 4]
    k_and_rest = [x[:, :, stored] for x in given[:3]]
    tables = [x[:, :, stored] for x in given[3:5]]
    expected = rope_cache_write.outcome(
        rope_cache_write.reference, (*k_and_rest, *tables, *given[5:], wrong[stored]), kwargs
    )
    assert_close(found[1:], expected[1:])


def test_strided_caches_keep_what_lies_between():
    (*rows, _, _, slots, q_weight, k_weight), kwargs = PROBLEM.sample(seed=0, device="cpu")
    wide = torch.randn(2, 3, 11, 80)
    before = wide.clone()
    caches = wide[..., :32], wide[..., 40:64]
    rope_cache_write.providers["triton"].run(*rows, *caches, slots, q_weight, k_weight, **kwargs)
    assert torch.equal(wide[..., 32:40], before[..., 32:40])
    assert torch.equal(wide[..., 64:], before[..., 64:])
    fresh = before[..., :32].clone(), before[..., 40:64].clone()
    rope_cache_write.reference(*rows, *fresh, slots, **kwargs)
    for found, expected in zip(caches, fresh, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_write_nothing():
    args, kwargs = replace(PROBLEM, num_tokens=0).sample(seed=0, device="cpu")
    found = outcome(args, kwargs)
    assert found[0].shape == (2, 6, 0, 32)
    assert torch.equal(found[1], args[5])
