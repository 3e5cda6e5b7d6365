"""Which attention the wgmma kernels take, and the sentences with which they refuse the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_hopper import (
    others_attend_faster,
    sdpa_trains_faster,
    wgmma_unsupported,
)
from aiter_inductor.lowerings.attention_problem import AttentionProblem

HOPPER = Use(arch_named("sm_90"))
LLAMA = AttentionProblem(
    batch=2,
    num_heads=32,
    num_kv_heads=8,
    num_queries=4096,
    num_keys=4096,
    qk_dim=128,
    v_dim=128,
    dtype=torch.bfloat16,
    causal="top_left",
    window=None,
    softcap=None,
    scale=0.088,
    mask="none",
    mask_shape=(),
    sinks=False,
    layout="bhsd",
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"causal": "bottom_right", "window": 128, "sinks": True},
        {"qk_dim": 192, "num_kv_heads": 32},
        {"qk_dim": 64, "v_dim": 64, "dtype": torch.float16, "layout": "bshd"},
        {"qk_dim": 256, "v_dim": 256, "softcap": 50.0},
    ],
    ids=str,
)
def test_taken(change):
    assert wgmma_unsupported(replace(LLAMA, **change), HOPPER) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "q, k and v are float32; wgmma multiplies bf16 and fp16 here"),
        ({"mask": "bool", "mask_shape": (1, 1, 9, 9)}, "reads no mask, and there is a bool one"),
        ({"v_dim": 100}, "v_dim=100 is not a multiple of 8 up to 256: 16-byte rows"),
        ({"qk_dim": 320}, "qk_dim=320 is not a number from 1 to 256"),
        ({"mismatch": "q, k and v are not of one dtype"}, "q, k and v are not of one dtype"),
    ],
)
def test_refused(change, reason):
    assert reason in str(wgmma_unsupported(replace(LLAMA, **change), HOPPER))


def test_others_are_left_what_they_do_faster():
    one = replace(LLAMA, num_queries=1, causal="none")
    assert "S=1 queries: one of 4096 keys" in str(others_attend_faster(one, HOPPER))
    short = replace(LLAMA, num_queries=1024, num_keys=1024)
    assert "of all keys" in str(others_attend_faster(replace(short, causal="none"), HOPPER))
    assert "queries of 64" in str(others_attend_faster(replace(short, qk_dim=64), HOPPER))
    wide = replace(LLAMA, qk_dim=256, v_dim=256)
    assert "2x4096 queries of 256 take 464 us" in str(others_attend_faster(wide, HOPPER))
    for problem in (LLAMA, short, replace(one, window=128), replace(wide, softcap=50.0)):
        assert others_attend_faster(problem, HOPPER) is None


def test_short_windows_of_narrow_heads_are_left_to_triton():
    narrow = replace(LLAMA, qk_dim=64, v_dim=64, window=128, sinks=True)
    reason = others_attend_faster(narrow, HOPPER)
    assert reason == "window=128 of 64: 128 take 82 us on sm_90 and with Triton 74"
    assert attention.select(narrow, HOPPER).provider.name == "triton"
    assert others_attend_faster(replace(narrow, window=512), HOPPER) is None


def test_torch_trains_what_it_does_faster():
    for change in (
        {},
        {"num_queries": 16384},
        {"qk_dim": 64, "v_dim": 64},
        {"qk_dim": 192},
        {"qk_dim": 256, "v_dim": 256},
        {"causal": "none"},
        {"causal": "none", "num_queries": 9, "window": 9},
        {"num_queries": 9, "softcap": 30.0},
    ):
        assert sdpa_trains_faster(replace(LLAMA, **change), HOPPER) is None
    fewer = replace(LLAMA, num_queries=2048, causal="none")
    assert "S=2048 queries of all keys: 4x2048" in str(sdpa_trains_faster(fewer, HOPPER))
    few = replace(LLAMA, num_queries=512, num_keys=512)
    assert "S=512 queries: 1x512 take 183 us" in str(sdpa_trains_faster(few, HOPPER))
    masked = sdpa_trains_faster(replace(LLAMA, causal="none", mask="bool"), HOPPER)
    assert "reads no mask, and there is a bool one; others take 2953 us" in str(masked)
