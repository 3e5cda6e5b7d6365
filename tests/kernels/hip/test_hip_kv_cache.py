"""kv_cache.hip, built for the host, and on a GPU where there is one, against `kv_cache_write`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aiter_inductor.kernels.hip import kv_cache
from aiter_inductor.lowerings.kv_cache import kv_cache_write
from aiter_inductor.lowerings.kv_cache_problem import KvCacheProblem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROBLEM = KvCacheProblem(83, 2, 64, 64, 4, 16, BF16, BF16)


def assert_written_alike(args, kwargs) -> None:
    ours = kv_cache_write.outcome(kv_cache.kv_cache_write, args, kwargs)
    theirs = kv_cache_write.outcome(kv_cache_write.reference, args, kwargs)
    for found, expected, before in zip(ours, theirs, args[2:4], strict=True):
        assert torch.equal(found.float(), expected.float())
        assert not torch.equal(found.float(), before.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["paged", "packed", "transposed"])
@pytest.mark.parametrize("cache_dtype", [BF16, FP16, FP32, FN, FNUZ], ids=str)
def test_every_cache(device, layout, cache_dtype):
    scaled = cache_dtype in (FN, FNUZ)
    for changed in ({}, {"num_kv_heads": 3, "v_head_dim": 80}, {"dtype": FP32}):
        problem = replace(PROBLEM, cache_dtype=cache_dtype, scaled=scaled, layout=layout, **changed)
        assert_written_alike(*problem.sample(seed=0, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_caches_cut_out_of_wider_tensors(device):
    (key, value, _, _, slots, *_), kwargs = PROBLEM.sample(seed=0, device=device)
    qkv = torch.cat((torch.zeros_like(key), key, value), -1)
    both = torch.randn(4, 2, 16, 2, 64, device=device).to(BF16)
    heads_first = torch.randn(2, 4, 2, 16, 64, device=device).to(BF16).transpose(2, 3)
    odd = torch.randn(4, 16, 2, 65, device=device).to(BF16)
    for caches in (both.unbind(1), heads_first.unbind(0), (odd[..., 1:], odd[..., :64])):
        assert_written_alike((qkv[..., 64:128], qkv[..., 128:], *caches, slots), kwargs)


@pytest.mark.parametrize("device", DEVICES)
def test_latent_rows_in_one_cache(device):
    cache = torch.randn(4, 16, 1, 576, device=device).to(BF16)
    latent, rope = (torch.randn(5, 1, n, device=device).to(BF16) for n in (512, 64))
    slots = torch.tensor([3, -1, 17, 63, 5], device=device)
    kv_cache.kv_cache_write(latent, rope, cache[..., :512], cache[..., 512:], slots)
    flat = cache.view(64, 576)
    stored = torch.cat((latent, rope), -1).view(5, 576)[slots >= 0]
    assert torch.equal(flat[slots[slots >= 0]], stored)


def test_too_few_contiguous_elements_are_refused():
    args, kwargs = PROBLEM.sample(seed=0, device="cpu")
    with pytest.raises(ValueError, match="heads with last stride 2 are not contiguous"):
        kv_cache.kv_cache_write(args[0].repeat(1, 1, 2)[..., ::2], *args[1:], **kwargs)
    with pytest.raises(ValueError, match="layout 'flat' is none of paged, packed and"):
        kv_cache.kv_cache_write(*args, layout="flat")
