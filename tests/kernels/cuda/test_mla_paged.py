"""Latent attention over pages on Hopper: who takes what, how it is cut, and that it is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.cuda.mla_paged import paged_plan
from aiter_inductor.kernels.cuda.mla_plan import MlaPlan
from aiter_inductor.lowerings.mla_paged import mla_paged_decode
from aiter_inductor.lowerings.mla_paged_problem import MlaPagedProblem
from tests.lowerings.checks import assert_close, oracle

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DEEPSEEK = MlaPagedProblem(5, 128, 512, 64, 64, 9, BF16, BF16)
SM_90 = Use(arch_named("sm_90"))
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="torch sees no GPU with wgmma")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"dtype": torch.float16, "cache_dtype": torch.float16}, "queries are float16"),
        ({"scaled": True}, "it reads no scale of bfloat16 rows"),
        ({"rank": 256}, "rank=256 is not 512"),
        ({"rope": 32}, "rope=32 is not 64"),
        ({"page_size": 1}, "page_size=1 is not 8, 16, 32 or a multiple of 64"),
        ({"page_size": 96}, "page_size=96 is not 8, 16, 32 or a multiple of 64"),
    ],
)
def test_what_it_refuses_goes_to_triton(changed, sentence):
    problem = replace(DEEPSEEK, **changed)
    assert mla_paged_decode.select(DEEPSEEK, SM_90).provider.name == "cuda"
    assert sentence in mla_paged_decode.providers["cuda"].refusal(problem, SM_90)
    assert mla_paged_decode.select(problem, SM_90).provider.name == "triton"


def test_every_processor_gets_rows_of_its_own():
    assert paged_plan(128, 132) == MlaPlan(2, 64, 2)
    assert paged_plan(16, 132) == MlaPlan(1, 128, 2)
    assert paged_plan(192, 132) == MlaPlan(1, 44, 2)


def check(args, kwargs, plan=None):
    """Run into poisoned memory; compare with float64."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = mla_paged_decode.providers["cuda"].run(
            *args, **kwargs, **({} if plan is None else {"plan": plan})
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, oracle(mla_paged_decode, args, kwargs), loosen=3)
    return found


@needs_hopper
@pytest.mark.parametrize(
    "changed",
    [
        {"page_size": 8, "max_pages": 70},
        {"page_size": 16, "max_pages": 33},
        {"page_size": 32, "num_heads": 33},
        {"page_size": 64, "num_heads": 16},
        {"page_size": 256, "max_pages": 3},
        {"num_heads": 192},
        {"num_seqs": 1, "max_pages": 64},
        {"num_seqs": 200, "max_pages": 2},
        {"num_seqs": 0},
        {"cache_dtype": FP8},
        {"cache_dtype": FP8, "scaled": True, "page_size": 16, "max_pages": 33},
        {"cache_dtype": FP8, "scaled": True, "page_size": 8, "num_heads": 16},
        {"cache_dtype": FP8, "scaled": True, "num_seqs": 200, "max_pages": 2},
    ],
    ids=str,
)
def test_shapes(changed):
    check(*replace(DEEPSEEK, **changed).sample(seed=0, device="cuda"))


@needs_hopper
@pytest.mark.parametrize(
    "plan",
    [MlaPlan(1, 1), MlaPlan(1, 132), MlaPlan(2, 4), MlaPlan(2, 3, 7), MlaPlan(2, 66)],
    ids=str,
)
def test_lengths_from_none_to_full(plan):
    args, kwargs = DEEPSEEK.sample(seed=1, device="cuda")
    lengths = torch.tensor([0, 1, 64, 65, 576], dtype=torch.int32, device="cuda")
    tables = torch.arange(45, dtype=torch.int32, device="cuda").view(5, 9)
    found = check((args[0], args[1], tables, lengths, None), kwargs, plan)
    assert torch.equal(found[0], torch.zeros_like(found[0]))


@needs_hopper
@pytest.mark.parametrize(("page_size", "dtype"), [(16, BF16), (64, BF16), (64, FP8)])
def test_what_lies_beyond_a_sequence_does_not_matter(page_size, dtype):
    problem = replace(DEEPSEEK, page_size=page_size, cache_dtype=dtype)
    args, kwargs = problem.sample(seed=2, device="cuda")
    before = check(args, kwargs)
    length = int(args[3][1])
    assert length % page_size, "the sequence must end within a page"
    stored = args[1].view(torch.uint8)  # bytes of 255 are NaN in either dtype
    stored[args[2][1, (length - 1) // page_size], length % page_size :] = 255
    unused = torch.ones(len(args[1]), dtype=torch.bool, device="cuda")
    unused[args[2][args[2] >= 0].long()] = False
    stored[unused] = 255
    assert torch.equal(check(args, kwargs), before)


@needs_hopper
def test_strided_queries_tables_and_caches():
    args, kwargs = DEEPSEEK.sample(seed=3, device="cuda")
    q = args[0].new_empty(128, 5, 640).transpose(0, 1)[..., :576].copy_(args[0])
    cache = args[1].new_empty(45, 80, 592)[:, :64, :576].copy_(args[1])
    tables = args[2].new_empty(9, 5).T.copy_(args[2])
    check((q, cache, tables, *args[3:]), kwargs)
