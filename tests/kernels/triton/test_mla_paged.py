"""Latent attention over pages: the split-KV kernel against the reference, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton.mla import MlaConfig
from aiter_inductor.lowerings.mla_paged import mla_paged_decode
from aiter_inductor.lowerings.mla_paged_problem import MlaPagedProblem
from tests.lowerings.checks import assert_close, assert_same_layout, oracle

FP32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
SMALL = MlaPagedProblem(5, 6, 48, 16, 16, 6, FP32, FP32)
THREE = MlaConfig(16, 16, 3, num_warps=1)


def check(args, kwargs, config=None):
    """Run on memory filled with NaN and compare with the reference in float64."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    extra = {} if config is None else {"config": config}
    try:
        found = mla_paged_decode.providers["triton"].run(*args, **kwargs, **extra)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, oracle(mla_paged_decode, args, kwargs).to(found.dtype))
    assert_same_layout(found, mla_paged_decode.reference(*args, **kwargs))
    return found


@pytest.mark.parametrize("config", [None, THREE], ids=["default", "three splits"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"page_size": 1, "max_pages": 70, "num_seqs": 3},
        {"page_size": 256, "max_pages": 2, "num_seqs": 2},
        {"page_size": 12, "rank": 40, "rope": 24, "num_heads": 20},
        {"dtype": torch.float16, "cache_dtype": torch.float16},
        {"dtype": BF16, "cache_dtype": FP8, "scaled": True},
        {"scaled": True},
        {"num_seqs": 0},
    ],
    ids=str,
)
def test_shapes_dtypes_and_splits(changed, config):
    check(*replace(SMALL, **changed).sample(seed=0, device="cpu"), config)


def test_lengths_from_none_to_full():
    args, kwargs = replace(SMALL, max_pages=2).sample(seed=1, device="cpu")
    lengths = torch.tensor([0, 1, 16, 17, 32], dtype=torch.int32)
    tables = torch.arange(10, dtype=torch.int32).view(5, 2)
    found = check((*args[:2], tables, lengths, None), kwargs, THREE)
    assert torch.equal(found[0], torch.zeros_like(found[0]))


def test_what_lies_beyond_a_sequence_is_not_read():
    args, kwargs = SMALL.sample(seed=2, device="cpu")
    before = check(args, kwargs)
    length = int(args[3][1])
    assert length % 16, "the sequence must end within a page"
    args[1][args[2][1, (length - 1) // 16], length % 16 :] = torch.nan
    args[1][[page for page in range(30) if page not in args[2]]] = torch.nan
    assert torch.equal(check(args, kwargs), before)


def test_strided_queries_tables_lengths_and_caches():
    args, kwargs = SMALL.sample(seed=3, device="cpu")
    q = torch.empty(6, 5, 80).transpose(0, 1)[..., :64].copy_(args[0])
    cache = torch.empty(30, 20, 72)[:, :16, :64].copy_(args[1])
    tables = torch.empty(6, 5, dtype=torch.int32).T.copy_(args[2])
    lengths = torch.empty(5, 2, dtype=torch.int32)[:, 0].copy_(args[3])
    check((q, cache, tables, lengths, *args[4:]), kwargs)
