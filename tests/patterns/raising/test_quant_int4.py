"""Packed int4: spellings of the packing, with eager's bytes, and what is not the kernel's."""

from __future__ import annotations

import pytest
import torch

from tests.patterns.raising.quant_spellings import G, N, rows
from tests.patterns.rewrite_check import check_rewrite


def quantised(x, limit=7.0, least=None):
    groups = x.float().unflatten(-1, (-1, G))
    amax = groups.abs().amax(-1, keepdim=True)
    scale = (amax if least is None else amax.clamp(min=least)) / limit
    return torch.round(groups / scale).clamp(-8, 7), scale.squeeze(-1)


def strided(x):
    q, scale = quantised(x)
    q = q.to(torch.int8).flatten(-2)
    return ((q[..., ::2] & 0xF) | (q[..., 1::2] << 4)).to(torch.uint8), scale


def in_bytes(x):
    q, scale = quantised(x, least=1e-5)
    q = q.to(torch.int8).flatten(-2).to(torch.uint8)
    return (q[..., 1::2] << 4) | (q[..., 0::2] & 15), scale


def in_pairs(x):
    q, scale = quantised(x)
    pairs = q.to(torch.int32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2) & 0xF
    return (pairs[..., 0] | pairs[..., 1] * 16).to(torch.uint8), scale


def masked_above(x):
    q, scale = quantised(x)
    codes = q.int()
    low, high = codes[..., ::2], codes[..., 1::2]
    packed = torch.bitwise_or(low & 15, torch.bitwise_left_shift(high, 4) & 0xF0)
    return packed.to(torch.uint8).flatten(-2), scale


def one_scale_a_row(x):
    f = x.float()
    scale = f.abs().amax(-1, keepdim=True) / 7.0
    q = torch.clamp(torch.round(f / scale), -7, 7).to(torch.int8)
    return ((q[..., ::2] & 15) | (q[..., 1::2] << 4)).to(torch.uint8), scale


@pytest.mark.parametrize("mode", ["static", "mark_dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "program",
    [strided, in_bytes, in_pairs, masked_above, one_scale_a_row],
    ids=lambda f: f.__name__,
)
def test_every_spelling_is_recognised(program, dtype, mode):
    torch.manual_seed(0)
    found = check_rewrite(program, rows(dtype, mode), expect={"quant_int4_per_group": 1})
    match = found.decisions[0].match
    assert match.argument("group_size") == (N if program is one_scale_a_row else G)
    assert match.argument("amax_min") == (pytest.approx(1e-5) if program is in_bytes else 0.0)


def high_nibble_first(x):
    q, _ = quantised(x)
    q = q.to(torch.uint8).flatten(-2)
    return (q[..., ::2] << 4) | (q[..., 1::2] & 15)


def unmasked(x):
    q, _ = quantised(x)
    q = q.to(torch.int8).flatten(-2)
    return (q[..., ::2] | (q[..., 1::2] << 4)).to(torch.uint8)


def over_eight(x):
    q, _ = quantised(x, limit=8.0)
    q = q.to(torch.int8).flatten(-2)
    return ((q[..., ::2] & 15) | (q[..., 1::2] << 4)).to(torch.uint8)


def offset_by_eight(x):
    groups = x.float().unflatten(-1, (-1, G))
    q = torch.round(groups / (groups.abs().amax(-1, keepdim=True) / 7.0)) + 8
    q = q.clamp(0, 15).to(torch.uint8).flatten(-2)
    return (q[..., ::2] & 15) | (q[..., 1::2] << 4)


def one_scale(x):
    q = torch.round(x.float() / (x.float().abs().amax() / 7.0)).clamp(-8, 7).to(torch.int8)
    return ((q[..., ::2] & 15) | (q[..., 1::2] << 4)).to(torch.uint8)


MISSES = {
    high_nibble_first: "even elements are in the high nibble, kernels put them into the low one",
    unmasked: "the low nibble keeps its sign, which then covers the high one",
    over_eight: "the scale is amax / 8, kernels for int4 take amax / 7",
    offset_by_eight: "asymmetric: the zero point 8 is added, kernels have none",
    one_scale: "one scale is for the whole tensor, kernels take one a group",
}


@pytest.mark.parametrize("program", MISSES, ids=lambda f: f.__name__)
def test_near_misses_say_why(program):
    found = check_rewrite(program, rows(torch.bfloat16), expect={})
    assert MISSES[program] in found.reasons()


def test_other_bits_are_no_quantisation():
    def program(a, b):
        return (a[..., ::2] & 15) | (b[..., 1::2] << 4), (a & 15) | (a << 4)

    codes = torch.randint(0, 255, (4, 8), dtype=torch.uint8)
    assert check_rewrite(program, codes, codes + 1, expect={}).reasons() == []
