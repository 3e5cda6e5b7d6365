"""Latent attention's split-KV kernel against the reference, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton.mla import MAX_SPLITS, OPEN_SPLITS, MlaConfig
from aiter_inductor.lowerings.mla import mla_decode
from aiter_inductor.lowerings.mla_problem import MlaProblem
from tests.lowerings.checks import assert_close, assert_same_layout, oracle

SMALL = MlaProblem(2, 5, 1, 75, 64, 32, 16, 24, torch.float32)
CONFIGS = {
    "default": None,
    "one split": MlaConfig(16, 16, 1, num_warps=1),
    "empty splits": MlaConfig(16, 32, 7, num_warps=1),
}


def check(args, kwargs, config=None):
    """Run on memory filled with NaN and compare with the reference in float64."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    extra = {} if config is None else {"config": config}
    try:
        found = mla_decode.providers["triton"].run(*args, **kwargs, **extra)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, oracle(mla_decode, args, kwargs), loosen=3)
    assert_same_layout(found, mla_decode.reference(*args, **kwargs))
    return found


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_mla_decode(mask, dtype, config):
    check(*replace(SMALL, mask=mask, dtype=dtype).sample(seed=0, device="cpu"), config)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_heads": 33, "kv_len": 1},
        {"q_len": 3, "causal": True},
        {"q_len": 3, "mask": "bool", "kv_len": 16},
        {"kv_lora_rank": 48, "qk_rope_head_dim": 8, "kv_len": 130},
        {"batch_size": 0},
        {"dtype": torch.bfloat16, "cache_dtype": torch.float8_e4m3fn, "mask": "bool"},
    ],
)
def test_shapes(changed):
    check(*replace(SMALL, **changed).sample(seed=1, device="cpu"))


def test_deepseeks_dimensions():
    problem = MlaProblem(1, 16, 1, 70, 512, 128, 64, 128, torch.bfloat16)
    check(*problem.sample(seed=2, device="cpu"), MlaConfig(16, 32, 2))


def test_rows_that_see_nothing_are_zero_and_nan_stays_in_its_sequence():
    args, kwargs = replace(SMALL, mask="bool").sample(seed=3, device="cpu")
    hidden = args[5].clone()
    hidden[0] = False
    found = check((*args[:5], hidden), kwargs, CONFIGS["empty splits"])
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    args[2][0, -1] = torch.nan
    assert not check(args, kwargs)[1].isnan().any()


def test_latent_rows_cut_out_of_a_wider_cache():
    args, kwargs = SMALL.sample(seed=4, device="cpu")
    cache = torch.full((2, 100, 96), torch.nan)
    cache[:, :75, :80] = torch.cat((args[2], args[3]), -1)
    check((*args[:2], cache[:, :75, :64], cache[:, :75, 64:80], *args[4:]), kwargs)


def test_splits_fill_the_chip():
    assert MlaConfig.default(1, 128, 4096, 2).splits == MAX_SPLITS
    assert MlaConfig.default(128, 128, 4096, 2).splits == 1
    assert MlaConfig.default(1, 16, 64, 2).splits == 1
    assert MlaConfig.default(1, 16, object(), 2).splits == OPEN_SPLITS
