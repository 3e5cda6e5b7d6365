"""What is prepared once per facts: a call never runs with what other facts led to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_inductor.kernels import prepared
from aiter_inductor.kernels.cuda import attention as flash
from aiter_inductor.kernels.cuda import gemm, mla, mla_few, mla_paged
from aiter_inductor.kernels.cuda.mla_plan import FewPlan, MlaPlan
from aiter_inductor.kernels.hip import attention as decoding
from aiter_inductor.kernels.hip import decode_launch, paged_attention
from aiter_inductor.kernels.hip.loading import simulating
from aiter_inductor.kernels.prepared import Plans, facts_of, same_memory

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Case = Callable[[], Any]


def shifted(x: Tensor, by: int) -> Tensor:
    """The same values at an address that lies `by` elements behind an aligned one."""
    room = torch.zeros(x.numel() + by, dtype=x.dtype)
    return room[by:].view(x.shape).copy_(x)


def heads(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def turned(*shape: int) -> Tensor:
    """Heads and tokens in the other order in memory."""
    batch, num_heads, tokens, width = shape
    return heads(batch, tokens, num_heads, width).transpose(1, 2)


def decode_cases() -> Iterator[Case]:
    run = partial(decoding.attention, scale=0.5)
    q, k = heads(2, 8, 1, 64), heads(2, 2, 96, 64)
    yield partial(run, q, k, k)
    yield partial(run, q, k, k, window=16)
    yield partial(run, q, k, k, softcap=3.0)
    yield partial(run, q, k, k, None, heads(8))
    yield partial(run, q, k, k, None, heads(8, dtype=torch.float32))
    yield partial(run, q, shifted(k, 1), k)
    yield partial(run, shifted(q, 1), k, k)
    yield partial(run, q, turned(2, 2, 96, 64), k)
    yield partial(run, q, k[:, :, :64], k[:, :, :64])
    yield partial(run, q[:1], k[:1], k[:1])
    yield partial(run, q[:0], k[:0], k[:0])
    for mask in (heads(2, 1, 1, 96), heads(1, 1, 1, 96), heads(2, 1, 1, 96, dtype=torch.bool)):
        yield partial(run, q, k, k, mask)


def paged_cases() -> Iterator[Case]:
    run = partial(paged_attention.paged_attention, scale=0.5)
    q, pages = heads(3, 8, 64), heads(8, 16, 2, 64)
    tables, lengths = torch.zeros(3, 4, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    yield partial(run, q, pages, pages, tables, lengths)
    yield partial(run, q, pages, pages, tables[:, :2], lengths)
    yield partial(run, q, pages, pages, tables[:, ::2], lengths)
    yield partial(run, q, pages, pages, tables, lengths, torch.ones(()), torch.ones(()))
    of_tokens = heads(16, 8, 2, 64).transpose(0, 1)
    yield partial(run, q, pages, of_tokens, tables, lengths)
    yield partial(run, q[:2], pages, pages, tables[:2], lengths[:2])


def product_cases() -> Iterator[Case]:
    x, weight = heads(32, 256, dtype=FP8), heads(128, 256, dtype=FP8)
    of_x, of_weight = torch.ones(32, 2), torch.ones(1, 2)
    blocks = gemm.gemm_fp8_blockscale
    yield partial(blocks, x, weight, of_x, of_weight)
    yield partial(blocks, x, weight, of_x, of_weight, out_dtype=torch.float32)
    yield partial(blocks, x, weight, of_x, of_weight, heads(128))
    yield partial(blocks, x.view(4, 8, 256), weight, of_x.view(4, 8, 2), of_weight)
    yield partial(blocks, shifted(x, 1), weight, of_x, of_weight)
    yield partial(blocks, x, weight, of_x.t().contiguous().t(), of_weight)
    yield partial(blocks, x, weight.t().contiguous().t(), of_x, of_weight)
    yield partial(blocks, x.repeat(20, 1), weight, of_x.repeat(20, 1), of_weight)
    yield partial(blocks, x[:0], weight, of_x[:0], of_weight)
    yield partial(gemm.gemm_fp8_rowwise, x, weight, of_x[:, :1], torch.ones(128))
    yield partial(gemm.gemm_fp8_rowwise, x, weight, torch.ones(32, 1), torch.ones(128))
    yield partial(gemm.gemm_fp8_per_tensor, x, weight, torch.ones(()), torch.ones(1))


def flash_cases() -> Iterator[Case]:
    run = partial(flash.attention, scale=0.5)
    q, k = heads(1, 4, 48, 64), heads(1, 2, 80, 64)
    yield partial(run, q, k, k)
    yield partial(run, q, k, k, causal="top_left")
    yield partial(run, q, k, k, causal="bottom_right", window=8)
    yield partial(run, q, k, k, causal="bottom_right", window=9)
    yield partial(run, q, k, k, layout="bshd")
    yield partial(run, q, shifted(k, 1), k)
    yield partial(run, turned(1, 4, 48, 64), k, k, None, heads(4))
    yield partial(run, q, k, k, None, None, torch.zeros(1, 48, dtype=torch.int32))
    yield partial(flash.attention_with_lse, q, k, k, scale=0.5, causal="bottom_right")
    starts = torch.tensor([0, 20, 48], dtype=torch.int32)
    packed = q[0].transpose(0, 1), q[0].transpose(0, 1), q[0].transpose(0, 1), starts, starts
    yield partial(flash.attention_varlen, *packed, max_seqlen_q=28, scale=0.5)
    parts = q, q, k, k[:, :1], k
    yield partial(flash.mla_prefill, *parts, scale=0.5)


def latent_cases() -> Iterator[Case]:
    q, k = (heads(2, 16, 1, 512), heads(2, 16, 1, 64)), (heads(2, 200, 512), heads(2, 200, 64))
    run = partial(mla.attend, scale=0.5)
    yield partial(run, *q, *k)
    yield partial(run, *q, *k, plan=MlaPlan(1, 3))
    yield partial(run, *q, *k, plan=FewPlan(1, 4, groups=1, clusters=1))
    yield partial(run, *q, shifted(k[0], 1), k[1])
    yield partial(run, *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in q), *k)
    yield partial(run, *q, *(x[:, :100] for x in k))
    yield partial(run, *q, *(x.to(FP8) for x in k), kv_scale=torch.ones(()))
    yield partial(run, *(x[:1] for x in q), *(x[:1] for x in k))


def latent_paged_cases() -> Iterator[Case]:
    q, cache = heads(3, 16, 576), heads(8, 16, 576)
    tables, lengths = torch.zeros(3, 4, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    run = partial(mla_paged.mla_paged_decode, scale=0.5)
    yield partial(run, q, cache, tables, lengths)
    yield partial(run, q, cache, tables[:, ::2], lengths)
    yield partial(run, shifted(q, 1), cache, tables, lengths)
    yield partial(run, q, heads(8, 32, 576), tables, lengths)
    yield partial(run, q, heads(8, 16, 640)[..., :576], tables, lengths)
    yield partial(run, q[:2], cache, tables[:2], lengths[:2])
    yield partial(run, q[:, :8], cache.to(FP8), tables, lengths, torch.ones(()))


class Recorded:
    """Kernels that note what they are launched with instead."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def load(self, variant: Any, arch: str, device_type: str) -> Any:
        recorded = self.launches

        class Kernel:
            def launch(self, *arguments: Any) -> None:
                recorded.append((variant, arch, *map(described, arguments)))

        return Kernel()

    def of(self, case: Case) -> Any:
        """What a call launches, and what it returns."""
        self.launches.clear()
        found = case()
        outs = found if isinstance(found, tuple) else (found,)
        return [*self.launches], [described(out) for out in outs]


def described(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(described, argument))
    if isinstance(argument, Tensor):
        return argument.dtype, argument.numel(), argument.data_ptr() % 16
    return argument


def as_text(x: Tensor, box: tuple[int, ...], *, swizzle: int = 128) -> bytes:
    return repr((x.dtype, x.shape, x.stride(), box, swizzle)).encode()


FAMILIES = {
    "decode": (decode_cases, decode_launch, "gfx942"),
    "paged": (paged_cases, decode_launch, "gfx942"),
    "product": (product_cases, gemm, "sm_90"),
    "flash": (flash_cases, flash, "sm_90"),
    "latent": (latent_cases, mla, "sm_90"),
    "latent, paged": (latent_paged_cases, mla_paged, "sm_90"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_launch_is_the_one_that_its_own_facts_lead_to(family, monkeypatch):
    cases, module, arch = FAMILIES[family]
    recorded, plans = Recorded(), Plans[Any]()
    monkeypatch.setattr(module, "_PLANS", plans)
    for name, stand_in in (
        ("load_kernel", recorded.load), ("tensor_map", as_text), ("processors", lambda _: 132),
    ):  # fmt: skip
        for each in {module, mla, mla_few}:
            if hasattr(each, name):
                monkeypatch.setattr(each, name, stand_in)
    calls = list(cases())
    with simulating(arch):
        cold = []
        for call in calls:
            plans.clear()
            cold.append(recorded.of(call))
        plans.clear()
        for _ in range(2):
            assert [recorded.of(call) for call in calls] == cold
    assert len(plans) == len(calls)
    # Some cases differ in what has to be copied only.
    assert len({repr(each) for each in cold}) > len(cold) / 2


def test_another_address_needs_no_other_plan_and_another_chip_does(monkeypatch):
    recorded, plans = Recorded(), Plans[Any]()
    monkeypatch.setattr(decode_launch, "load_kernel", recorded.load)
    monkeypatch.setattr(decode_launch, "_PLANS", plans)
    for arch, count in (("gfx942", 1), ("gfx950", 2)):
        with simulating(arch):
            for _ in range(3):
                q, k = heads(2, 8, 1, 64), heads(2, 2, 96, 64)
                recorded.of(partial(decoding.attention, q, k, k, scale=0.5))
                assert {launch[1] for launch in recorded.launches} == {arch}
            assert len(plans) == count


def test_facts_tell_apart_what_a_launch_follows_from():
    x = heads(4, 64)
    others = [
        heads(4, 64, dtype=torch.float16), heads(64, 4).t(), heads(4, 72)[:, :64], heads(5, 64),
        shifted(x, 1), shifted(x, 4),
    ]  # fmt: skip
    facts = [facts_of(x, None), *(facts_of(other, None) for other in others), facts_of(x, x)]
    assert len(set(facts)) == len(facts)
    assert facts_of(shifted(x, 8), None) == facts[0]
    with simulating("gfx942"):
        assert facts_of(x, None) != facts[0]


def test_the_oldest_plan_makes_room(monkeypatch):
    monkeypatch.setattr(prepared, "MOST_PLANS", 3)
    plans = Plans[str]()
    for name in "abcde":
        assert plans.keep(name, name.upper()) == name.upper()
    assert list(plans) == ["c", "d", "e"]


def test_copies_are_no_longer_the_same_memory():
    x = heads(4, 64)
    assert same_memory((x, None, x), (x, None, x.view(2, 128)))
    assert not same_memory((x,), (x.clone(),))
    assert not same_memory((x,), (None,))
    assert not same_memory((x,), (x.view(torch.float16),))
