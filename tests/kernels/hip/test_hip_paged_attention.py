"""decode_attention.hip against the reference of `paged_attention`: simulated, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.jit import NoCompilerError, default_settings, find_compiler
from aiter_inductor.kernels.hip.decode_attention import AttendVariant, DecodeConfig, DecodeStyle
from aiter_inductor.kernels.hip.loading import simulating
from aiter_inductor.kernels.hip.paged_attention import paged_attention as run
from aiter_inductor.lowerings.paged_attention import paged_attention
from aiter_inductor.lowerings.paged_attention_problem import PagedAttentionProblem
from tests.lowerings.checks import assert_close, assert_same_layout, oracle

BF16, FP16 = torch.bfloat16, torch.float16
FP8 = {
    "gfx942": torch.float8_e4m3fnuz,
    "gfx950": torch.float8_e4m3fn,
    "sm_90": torch.float8_e4m3fn,
}
PROBLEM = PagedAttentionProblem(5, 6, 2, 64, 64, 16, 9, BF16, BF16)
ON_GPU = torch.cuda.is_available() and not torch.version.hip


@pytest.fixture(params=["sm_90"] if ON_GPU else ["gfx942", "gfx950"])
def arch(request) -> Iterator[str]:
    try:
        find_compiler(request.param, default_settings())
    except NoCompilerError as error:
        pytest.skip(str(error))
    with nullcontext() if ON_GPU else simulating(request.param):
        yield request.param


def sample(arch, **changed):
    """Inputs of a problem; `fp8` stands for the chip's own."""
    if changed.get("cache_dtype") == "fp8":
        changed["cache_dtype"] = FP8[arch]
    device = "cuda" if ON_GPU else "cpu"
    return replace(PROBLEM, **changed).sample(seed=0, device=device)


def check(args, kwargs, config=None):
    found = run(*args, **kwargs, config=config)
    exact = oracle(paged_attention, args, kwargs)
    assert_close(found, exact.to(found.dtype))
    assert_same_layout(found, paged_attention.reference(*args, **kwargs))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {"page_size": 1, "max_pages": 70},
        {"page_size": 256, "max_pages": 1, "cache_dtype": "fp8"},
        {"page_size": 12, "head_dim": 24, "v_head_dim": 40, "window": 1},
        {"layout": "packed", "window": 37, "sinks": True},
        {"layout": "packed", "cache_dtype": "fp8", "v_head_dim": 96, "window": 21},
        {"layout": "packed", "page_size": 48, "head_dim": 96, "v_head_dim": 40, "max_pages": 3},
        {"layout": "packed", "page_size": 128, "cache_dtype": "fp8", "max_pages": 2},
        {"layout": "packed", "page_size": 8, "sinks": True, "max_pages": 17},
        {"layout": "transposed", "cache_dtype": "fp8", "v_head_dim": 80},
        {"layout": "transposed", "page_size": 8, "v_head_dim": 72},
        {"num_heads": 40, "num_kv_heads": 2, "softcap": 3.0},
        {"dtype": FP16, "cache_dtype": FP16, "head_dim": 256, "v_head_dim": 8},
        {"num_seqs": 0},
    ],
    ids=str,
)
def test_shapes_and_dtypes(arch, changed):
    check(*sample(arch, **changed))


@pytest.mark.skipif(ON_GPU, reason="on NVIDIA values are copied as packs")
def test_transposed_values_of_pages_longer_than_a_pack(arch):
    check(*sample(arch, layout="transposed", page_size=32, max_pages=4, window=77))


def test_lengths_from_none_to_full(arch):
    args, kwargs = sample(arch, max_pages=2)
    device = args[0].device
    lengths = torch.tensor([0, 1, 16, 17, 32], dtype=torch.int32, device=device)
    tables = torch.arange(10, dtype=torch.int32, device=device).view(5, 2)
    found = check((*args[:3], tables, lengths, *args[5:]), kwargs)
    assert torch.equal(found[0], torch.zeros_like(found[0]))


def test_what_lies_beyond_a_sequence_is_not_read(arch):
    for layout in ("paged", "packed"):
        args, kwargs = sample(arch, layout=layout)
        before = check(args, kwargs)
        length = int(args[4][1])
        last_page, places = int(args[3][1, (length - 1) // 16]), length % 16
        assert places, "the sequence must end within a page"
        for cache in args[1:3]:
            unused = [page for page in range(len(cache)) if page not in args[3]]
            assert unused
            cache[unused] = torch.nan
        if layout == "paged":
            for cache in args[1:3]:
                cache[last_page, places:] = torch.nan
        else:
            args[1][last_page, :, :, places:] = torch.nan
            for place in range(places, 16):
                args[2][last_page, :, place // 8, :, place % 8] = torch.nan
        assert torch.equal(check(args, kwargs), before)


def test_nan_stays_with_its_head_and_sequence(arch):
    args, kwargs = sample(arch)
    clean = check(args, kwargs)
    args[0][0, 1, 5] = torch.nan
    args[2][int(args[3][2, 0]), 3, 1, 7] = torch.nan
    found = run(*args, **kwargs)
    expected = torch.zeros_like(found, dtype=torch.bool)
    expected[0, 1], expected[2, 3:, 7] = True, True
    assert torch.equal(found.isnan(), expected)
    assert torch.equal(found[~expected], clean[~expected])


def test_queries_beyond_the_range_of_fp16(arch):
    args, kwargs = sample(arch, cache_dtype="fp8")
    args[0][0] *= 1e30
    args[0][1] *= 1e-30
    check(args, {**kwargs, "scale": 1e-6})


def test_strided_queries_tables_and_caches(arch):
    args, kwargs = sample(arch)
    q = args[0].new_empty(6, 5, 65).transpose(0, 1)[..., :64].copy_(args[0])
    both = torch.stack(args[1:3], 1)
    tables = args[3].new_empty(9, 5).T.copy_(args[3])
    check((q, both[:, 0], both[:, 1], tables, *args[4:]), kwargs)
    heads_first = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in args[1:3])
    check((args[0], *heads_first, *args[3:]), kwargs)


@pytest.mark.parametrize("waves", [1, 3])
def test_sequences_divided_among_any_number_of_waves(arch, waves):
    style = DecodeStyle(BF16, BF16, 64, 64, 3, 16, False, False)
    default = DecodeConfig.default(arch, style)
    args, kwargs = sample(arch)
    check(args, kwargs, replace(default, tile=32, waves=waves, least_tiles=1))


@pytest.mark.parametrize("head_dim", [8, 80, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn])
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_fit_into_shared_memory(head_dim, dtype, packed):
    if head_dim % (16 // dtype.itemsize):
        head_dim = 16
    style = DecodeStyle(BF16, dtype, head_dim, head_dim, 8, 16, packed, False)
    config = DecodeConfig.default("sm_90", style)
    assert config.stages >= 2
    assert AttendVariant(style, config, 32).shared_bytes <= arch_named("sm_90").lds_bytes
