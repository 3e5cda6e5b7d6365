"""Flash attention's kernels against the reference in float64, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton.attention import AttentionConfig, tiles
from aiter_inductor.kernels.triton.attention_backward import AttentionBackwardConfig
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_backward import attention_backward, attention_with_lse
from aiter_inductor.lowerings.attention_problem import AttentionProblem
from aiter_inductor.lowerings.attention_varlen import attention_varlen
from aiter_inductor.lowerings.attention_varlen_backward import (
    attention_varlen_backward,
    attention_varlen_with_lse,
)
from tests.lowerings.checks import assert_close, assert_same_layout, in_float64

FP32 = torch.float32
SMALL = AttentionProblem(
    batch=2,
    num_heads=4,
    num_kv_heads=2,
    num_queries=37,
    num_keys=37,
    qk_dim=32,
    v_dim=16,
    dtype=FP32,
    causal="none",
    window=None,
    softcap=None,
    scale=0.25,
    mask="none",
    mask_shape=(),
    sinks=False,
    layout="bhsd",
)
CONFIG = AttentionConfig(32, 16, num_warps=1, num_stages=1, heads_together=3)
BACKWARD = AttentionBackwardConfig(32, 16, 16, 32, num_warps=1, num_stages=1)

LENGTHS = [(37, 37), (20, 61), (61, 20), (1, 33), (40, 1)]
HIDING = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right"},
    {"causal": "top_left", "window": 9},
    {"causal": "bottom_right", "window": 20},
    {"window": 5},
    {"causal": "top_left", "first_keys": True},
    {"causal": "bottom_right", "window": 20, "first_keys": True},
    {"first_keys": True},
]
OF_SEQUENCES = [how for how in HIDING if "first_keys" not in how]
OTHERS = {
    "bf16": {"dtype": torch.bfloat16},
    "fp16 tokens first": {"dtype": torch.float16, "layout": "bshd", "causal": "top_left"},
    "softcap": {"softcap": 2.0, "causal": "top_left"},
    "sinks": {"sinks": True, "window": 9, "causal": "top_left"},
    "two tiles": {"qk_dim": 48, "v_dim": 24},
    "narrow": {"qk_dim": 5, "v_dim": 3},
    "bool mask": {"mask": "bool"},
    "padding": {"mask": "bool", "mask_shape": (2, 1, 1, 37), "causal": "top_left"},
    "alibi": {"mask": "float32", "mask_shape": (1, 4, 1, 37), "causal": "top_left"},
    "biased and capped": {"mask": "bfloat16", "softcap": 3.0, "sinks": True},
    "no batch": {"batch": 0},
    "no keys": {"num_keys": 0},
}


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(op, args, kwargs, config):
    found = op.providers["triton"].run(*args, **kwargs, config=config)
    expected = op.reference(*map(in_float64, args), **kwargs)
    assert_close(found, expected, loosen=3)
    assert_same_layout(found, op.reference(*args, **kwargs))
    return found


def check_all(problem):
    args, kwargs = problem.sample(seed=0, device="cpu")
    check(attention, args, kwargs, CONFIG)
    check(attention_with_lse, args, kwargs, CONFIG)
    args, kwargs = replace(problem, asked="gradients").sample(seed=0, device="cpu")
    check(attention_backward, args, kwargs, BACKWARD)


@pytest.mark.parametrize("how", HIDING, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_is_hidden(lengths, how):
    S, T = lengths
    check_all(replace(SMALL, num_queries=S, num_keys=T, **how))


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_others(changed):
    check_all(replace(SMALL, **changed))


def test_rows_that_see_nothing_are_zero():
    (q, k, v, mask, *_), kwargs = replace(SMALL, mask="bool").sample(seed=1, device="cpu")
    mask[0, :, 3:9] = False
    out, lse = check(attention_with_lse, (q, k, v, mask), kwargs, CONFIG)
    assert (out[0, :, 3:9] == 0).all()
    assert (lse[0, :, 3:9] == -torch.inf).all()


def test_a_lowest_mask_is_a_mean_and_an_infinite_one_hides():
    (q, k, v, mask, *_), kwargs = replace(SMALL, mask="float32").sample(seed=1, device="cpu")
    mask[:, :, 4] = torch.finfo(FP32).min
    mask[:, :, 5] = -torch.inf
    out = check(attention, (q, k, v, mask), kwargs, CONFIG)
    mean = v.mean(2).repeat_interleave(2, 1)
    assert_close(out[:, :, 4], mean, loosen=3)
    assert (out[:, :, 5] == 0).all()


def test_nan_stays_in_its_row():
    (q, k, v, *_), kwargs = replace(SMALL, causal="top_left").sample(seed=1, device="cpu")
    q[0, 1, 4], k[1, 0, 30] = torch.nan, torch.nan
    out = check(attention, (q, k, v), kwargs, CONFIG)
    hit = out.isnan().any(-1)
    assert hit[0, 1, 4]
    assert hit.sum() == 1 + 2 * 7


def test_heads_are_read_where_they_lie():
    (q, k, v, *_), kwargs = SMALL.sample(seed=2, device="cpu")
    packed = torch.full((2, 37, 4 + 2 + 2, 40), torch.nan)
    packed[:, :, :4, :32] = q.transpose(1, 2)
    packed[:, :, 4:6, :32] = k.transpose(1, 2)
    packed[:, :, 6:, 8:24] = v.transpose(1, 2)
    cut = packed.transpose(1, 2)
    args = (cut[:, :4, :, :32], cut[:, 4:6, :, :32], cut[:, 6:, :, 8:24])
    check(attention, args, kwargs, CONFIG)


@pytest.mark.parametrize(
    "width, parts", [(1, (16, 0)), (16, (16, 0)), (80, (64, 16)), (96, (64, 32)), (192, (128, 64))]
)
def test_heads_are_cut_in_powers_of_two(width, parts):
    assert tiles(width) == parts


@pytest.mark.parametrize("how", OF_SEQUENCES, ids=str)
def test_packed_sequences(how):
    lengths = torch.tensor([(0, 0), (20, 20), (0, 7), (33, 50), (40, 9), (5, 0)])
    starts, key_starts = lengths.cumsum(0).int().unbind(1)
    generator = torch.Generator().manual_seed(0)
    shapes = (98, 4, 48), (86, 2, 48), (86, 2, 16)
    heads = [torch.randn(s, generator=generator) for s in shapes]
    args = (*heads, starts.contiguous(), key_starts.contiguous())
    how = {"max_seqlen_q": 40, "scale": 0.25, **how}
    check(attention_varlen, args, how, CONFIG)
    check(attention_varlen_with_lse, args, how, CONFIG)
    out, lse = attention_varlen_with_lse.reference(*args, **how)
    grad = torch.randn(out.shape, generator=generator)
    check(attention_varlen_backward, (grad, *args[:3], out, lse, *args[3:]), how, BACKWARD)
