"""Copies in front of a pattern: what may be looked through, and what may not."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.patterns.rewrite_check import check_rewrite


def rms(y: Tensor, weight: Tensor) -> Tensor:
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 64, requires_grad=True), torch.randn(64, requires_grad=True)


def test_detach_still_stops_the_gradient() -> None:
    def program(x: Tensor, weight: Tensor) -> Tensor:
        return rms(x.detach(), weight) + x

    check_rewrite(program, *inputs(), expect={"rms_norm": 1}, backward=True)


def test_a_clone_keeps_what_its_source_held() -> None:
    def program(x: Tensor, weight: Tensor) -> Tensor:
        source = x * 1
        kept = source.clone()
        source.add_(1)
        return rms(kept, weight) + source

    done = check_rewrite(program, *inputs(), expect={"rms_norm": 1}, backward=True, inserted=0)
    assert done.reasons() == ["add_ writes to what it reads or switches a mode in between"]
