"""Linears on int4 weights, two elements to a byte, however programs unpack them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.rewrite_check import check_rewrite

N, K, GROUP = 48, 256, 64


def by_cases(packed: Tensor) -> Tensor:
    low, high = (packed & 15).to(torch.int8), (packed >> 4).to(torch.int8)
    codes = torch.stack((low, high), -1).flatten(-2)
    return torch.where(codes < 8, codes, codes - 16)


def by_flipping(packed: Tensor) -> Tensor:
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(packed.shape[0], -1)
    return (codes.to(torch.int32) ^ 8) - 8


def by_shifting(packed: Tensor) -> Tensor:
    pairs = packed.view(torch.int8)
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), -1).flatten(-2)


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return torch.randn(2, 3, K).bfloat16(), packed, torch.rand(N, K // GROUP) / 64


def dequantised(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(dtype).unflatten(-1, (-1, GROUP)) * scale[..., None].to(dtype)).flatten(-2)


SPELLINGS = [by_cases, by_flipping, by_shifting]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("unpack", SPELLINGS)
def test_hit(unpack, bias) -> None:
    bias = torch.randn(N).bfloat16() if bias else None

    def program(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        columns = dequantised(unpack(packed), scale, torch.float32).to(x.dtype)
        return F.linear(x, columns, bias)

    check_rewrite(program, *inputs(), expect={"gemm_w4a16": 1})


def test_scales_spread_and_one_a_row() -> None:
    def spread(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        factor = scale.repeat_interleave(GROUP, 1)
        return x @ (by_cases(packed).float() * factor).to(x.dtype).t()

    def rows(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, (by_cases(packed).float() * scale).to(x.dtype))

    x, packed, scale = inputs()
    check_rewrite(spread, x, packed, scale, expect={"gemm_w4a16": 1})
    check_rewrite(rows, x, packed, scale[:, :1].contiguous(), expect={"gemm_w4a16": 1})


def offset(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8) - 8


def unsigned(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


@pytest.mark.parametrize("unpack", [offset, unsigned])
def test_codes_from_zero_to_fifteen(unpack) -> None:
    def program(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, dequantised(unpack(packed), scale, torch.float32).to(x.dtype))

    check_rewrite(program, *inputs(), expect={"gemm_w4a16": 1})


def before_scaling(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = codes.float().unflatten(-1, (-1, GROUP))
    return ((groups - zero[..., None]) * scale[..., None]).flatten(-2)


def spread_before_scaling(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    points = zero.to(torch.int8).repeat_interleave(GROUP, 1)
    return (codes.to(torch.int8) - points) * scale.repeat_interleave(GROUP, 1)


def after_scaling(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = codes.float().unflatten(-1, (-1, GROUP))
    return ((groups - 8) * scale[..., None] + zero[..., None]).flatten(-2)


SHIFTS = [before_scaling, spread_before_scaling, after_scaling]


class Shifted(nn.Module):
    """A linear layer whose weight has a zero a group."""

    def __init__(self, unpack, shift) -> None:
        super().__init__()
        self.unpack, self.shift = unpack, shift
        _, self.packed, self.scale = map(nn.Buffer, inputs())
        zero = torch.randint(0, 16, self.scale.shape).float()
        self.zero = nn.Buffer(zero / 256 if shift is after_scaling else zero)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.shift(self.unpack(self.packed), self.scale, self.zero)
        return F.linear(x, columns.to(x.dtype))


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("unpack", [unsigned, by_shifting])
@pytest.mark.parametrize("shift", SHIFTS)
def test_zero_points(shift, unpack, dynamic) -> None:
    """Of groups: subtracted from the codes, or added to what was scaled."""
    layer = Shifted(unpack, shift)
    check_rewrite(layer, inputs()[0], expect={"gemm_w4a16": 1}, dynamic=dynamic)


def twice(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = codes.float().unflatten(-1, (-1, GROUP))
    return ((groups - zero[..., None]) * scale[..., None] + zero[..., None]).flatten(-2)


def before(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = codes.float().unflatten(-1, (-1, GROUP))
    return ((groups + zero[..., None]) * scale[..., None]).flatten(-2)


def by_row(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    moved = (codes.float() - zero[:, :1]).unflatten(-1, (-1, GROUP))
    return (moved * scale[..., None]).flatten(-2)


def in_bytes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Wraps around below zero."""
    groups = (codes - 8).float().unflatten(-1, (-1, GROUP))
    return (groups * scale[..., None]).flatten(-2)


@pytest.mark.parametrize(
    ("shift", "reason"),
    [
        (twice, "is shifted in add by a second zero point"),
        (before, "is added to before it is scaled; kernels subtract before and add after"),
        (by_row, "is rearranged while it is spread over blocks"),
        (in_bytes, None),
    ],
)
def test_near_miss(shift, reason) -> None:
    def program(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return F.linear(x, shift(unsigned(packed), scale, zero).to(x.dtype))

    x, packed, scale = inputs()
    zero = torch.randint(0, 16, scale.shape).float()
    found = check_rewrite(program, x, packed, scale, zero, expect={}, inserted=0)
    assert [s for s in found.reasons() if not s.endswith(reason or s)] == []
    assert bool(found.reasons()) == bool(reason)


def test_the_high_half_first_is_another_order() -> None:
    def program(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten(-2).to(torch.int32)
        return F.linear(x, dequantised((codes ^ 8) - 8, scale, torch.float32).to(x.dtype))

    check_rewrite(program, *inputs(), expect={}, inserted=0)
