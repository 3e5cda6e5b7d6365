"""Attention over pages: the split-KV kernel against the reference, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.triton.paged_attention import MAX_SPLITS, OPEN_SPLITS, PagedConfig
from aiter_inductor.lowerings.paged_attention import paged_attention
from aiter_inductor.lowerings.paged_attention_problem import PagedAttentionProblem
from tests.lowerings.checks import assert_close, assert_same_layout, oracle

FP32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
SMALL = PagedAttentionProblem(5, 6, 2, 32, 32, 16, 6, FP32, FP32)
CONFIGS = {
    "default": None,
    "one split": PagedConfig(16, 16, 16, 1, num_warps=1),
    "longer parts": PagedConfig(16, 16, 16, 3, num_warps=1),
    "empty parts": PagedConfig(16, 32, 64, 9, num_warps=1),
}


def check(args, kwargs, config=None):
    """Run on memory filled with NaN and compare with the reference in float64."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    extra = {} if config is None else {"config": config}
    try:
        found = paged_attention.providers["triton"].run(*args, **kwargs, **extra)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, oracle(paged_attention, args, kwargs).to(found.dtype))
    assert_same_layout(found, paged_attention.reference(*args, **kwargs))
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "changed", [{}, {"window": 20, "sinks": True, "softcap": 3.0}, {"layout": "packed"}]
)
def test_splits(config, changed):
    check(*replace(SMALL, **changed).sample(seed=0, device="cpu"), config)


@pytest.mark.parametrize(
    "changed",
    [
        {"page_size": 1, "max_pages": 70},
        {"page_size": 256, "max_pages": 2, "num_seqs": 3},
        {"page_size": 12, "head_dim": 24, "v_head_dim": 40},
        {"num_kv_heads": 1, "num_heads": 20, "window": 1},
        {"num_heads": 2, "dtype": torch.float16, "cache_dtype": torch.float16},
        {"dtype": BF16, "cache_dtype": FP8},
        {"dtype": BF16, "cache_dtype": FP8, "layout": "packed"},
        {"layout": "transposed", "v_head_dim": 40},
        {"layout": "transposed", "dtype": BF16, "cache_dtype": FP8, "page_size": 48},
        {"per_token": True, "softcap": 3.0, "window": 20},
        {"per_token": True, "dtype": BF16, "cache_dtype": FP8, "layout": "packed"},
        {"dtype": BF16, "cache_dtype": torch.int8, "per_token": True, "layout": "transposed"},
        {"dtype": BF16, "cache_dtype": torch.int8},
        {"num_seqs": 1, "head_dim": 96, "v_head_dim": 96},
        {"num_seqs": 0},
    ],
    ids=str,
)
def test_shapes_and_dtypes(changed):
    check(*replace(SMALL, **changed).sample(seed=1, device="cpu"))


def test_lengths_from_none_to_full():
    args, kwargs = replace(SMALL, max_pages=2).sample(seed=2, device="cpu")
    lengths = torch.tensor([0, 1, 16, 17, 32], dtype=torch.int32)
    tables = torch.arange(10, dtype=torch.int32).view(5, 2)
    found = check((*args[:3], tables, lengths, *args[5:]), kwargs, CONFIGS["longer parts"])
    assert torch.equal(found[0], torch.zeros_like(found[0]))


def test_what_lies_beyond_a_sequence_is_not_read():
    args, kwargs = SMALL.sample(seed=3, device="cpu")
    before = check(args, kwargs)
    length = int(args[4][1])
    last_page, places = args[3][1, (length - 1) // 16], length % 16
    assert places, "the sequence must end within a page"
    unused = [page for page in range(30) if page not in args[3]]
    assert unused
    for cache in args[1:3]:
        cache[last_page, places:] = torch.nan
        cache[unused] = torch.nan
    assert torch.equal(check(args, kwargs), before)


def test_strided_queries_tables_lengths_and_caches():
    args, kwargs = SMALL.sample(seed=4, device="cpu")
    q = torch.empty(6, 5, 40).transpose(0, 1)[..., :32].copy_(args[0])
    both = torch.stack(args[1:3], 1)
    tables = torch.empty(6, 5, dtype=torch.int32).T.copy_(args[3])
    lengths = torch.empty(5, 2, dtype=torch.int32)[:, 0].copy_(args[4])
    check((q, both[:, 0], both[:, 1], tables, lengths, *args[5:]), kwargs)


def test_parts_fill_the_chip():
    assert PagedConfig.default(8, 4, 256, 16384).splits == MAX_SPLITS
    assert PagedConfig.default(512, 4, 256, 8192).part == 512
    assert PagedConfig.default(object(), 4, 256, 8192).splits == OPEN_SPLITS
    assert PagedConfig.default(1, 4, 256, 1).splits == 1
