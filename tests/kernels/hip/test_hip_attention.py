"""decode_attention.hip against the reference of `attention`, for one query: simulated, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.jit import NoCompilerError, default_settings, find_compiler
from aiter_inductor.kernels.hip.attention import attention as run
from aiter_inductor.kernels.hip.loading import simulating
from aiter_inductor.lowerings.attention import attention
from aiter_inductor.lowerings.attention_problem import AttentionProblem
from tests.lowerings.checks import assert_close, assert_same_layout, oracle

BF16, FP16 = torch.bfloat16, torch.float16
ON_GPU = torch.cuda.is_available() and not torch.version.hip
DEVICE = "cuda" if ON_GPU else "cpu"
PROBLEM = AttentionProblem(
    batch=3,
    num_heads=8,
    num_kv_heads=2,
    num_queries=1,
    num_keys=150,
    qk_dim=64,
    v_dim=64,
    dtype=BF16,
    causal="none",
    window=None,
    softcap=None,
    scale=0.125,
    mask="none",
    mask_shape=(),
    sinks=False,
    layout="bhsd",
)


@pytest.fixture(autouse=True, params=["sm_90"] if ON_GPU else ["gfx942", "gfx950"])
def arch(request) -> Iterator[str]:
    try:
        find_compiler(request.param, default_settings())
    except NoCompilerError as error:
        pytest.skip(str(error))
    with nullcontext() if ON_GPU else simulating(request.param):
        yield request.param


def check(args, kwargs):
    found = run(*args, **kwargs)
    assert_close(found, oracle(attention, args, kwargs).to(found.dtype))
    assert_same_layout(found, attention.reference(*args, **kwargs))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {"layout": "bshd", "sinks": True, "softcap": 5.0},
        {"causal": "bottom_right", "window": 33, "num_heads": 20, "num_kv_heads": 1},
        {"mask": "bool", "dtype": FP16},
        {"mask": "bool", "mask_shape": (1, 1, 1, 150), "sinks": True},
        {"mask": "bfloat16", "qk_dim": 24, "v_dim": 40},
        {"mask": "float32", "mask_shape": (3, 1, 1, 1)},
        {"num_keys": 1, "qk_dim": 192, "v_dim": 128},
        {"batch": 0},
    ],
    ids=str,
)
def test_one_query(changed):
    check(*replace(PROBLEM, **changed).sample(seed=0, device=DEVICE))


def test_rows_that_are_not_filled_are_not_read():
    (q, k, v, *_), kwargs = PROBLEM.sample(seed=0, device=DEVICE)
    filled = torch.tensor([0, 77, 150], device=DEVICE)
    mask = torch.arange(150, device=DEVICE) < filled[:, None]
    exact = oracle(attention, (q, k, v, mask[:, None, None], None), kwargs)
    for cache in (k, v):
        cache[1, :, 128:] = torch.nan
        cache[0] = torch.nan
    found = run(q, k, v, mask[:, None, None], None, **kwargs)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert_close(found[1:], exact[1:].to(found.dtype))


def test_caches_of_any_strides():
    (q, k, v, *_), kwargs = PROBLEM.sample(seed=0, device=DEVICE)
    token_major = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    longer = torch.cat((k, v, v), 2)[:, :, :150]
    odd = torch.cat((v, v[..., :1]), 3)[..., 1:]
    keys, values = token_major
    for cached in ((keys, values), (longer, v), (k, odd)):
        check((q, *cached, None, None), kwargs)
