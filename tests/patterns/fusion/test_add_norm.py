"""x + residual → rms_norm becomes one op with two results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aiter_inductor.lowerings.norm import add_rms_norm
from tests.patterns.rewrite_check import check_rewrite


def norm(x: Tensor, weight: Tensor) -> Tensor:
    f = x.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rows(dtype: torch.dtype = torch.bfloat16, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, 64)), dtype=torch.float32).to(dtype)


def add_then_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, weight), total * 2


def norm_then_residual_branch(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = torch.add(residual, x)
    return norm(total, weight) + total


@pytest.mark.parametrize("program", [add_then_norm, norm_then_residual_branch])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backward", [False, True])
def test_hit(program, dtype: torch.dtype, dynamic: bool | None, backward: bool) -> None:
    args = [rows(dtype), rows(dtype), 1 + 0.1 * rows(dtype, 64)]
    for arg in args:
        arg.requires_grad_(backward)
    done = check_rewrite(
        program, *args, expect={"rms_norm": 1}, dynamic=dynamic, backward=backward, inserted=1
    )
    assert done.decisions[0].match.op is add_rms_norm
    assert "torch.add" not in done.graphs[0]


@pytest.mark.parametrize(
    ("x", "residual", "sentence"),
    [
        (rows(), rows(torch.bfloat16, 64), "broadcasts one of its terms"),
        (rows(), rows(torch.float32), "adds bfloat16 and float32"),
    ],
)
def test_near_miss_keeps_the_norm(x: Tensor, residual: Tensor, sentence: str) -> None:
    weight = rows(torch.bfloat16, 64)
    done = check_rewrite(add_then_norm, x, residual, weight, expect={"rms_norm": 1})
    assert done.decisions[0].match.op is not add_rms_norm
    assert any(sentence in note for note in done.notes), done.notes


def test_an_addition_in_place_is_not_moved() -> None:
    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x * 1
        total += residual
        return norm(total, weight), total

    done = check_rewrite(program, rows(), rows(), rows(torch.bfloat16, 64), expect={"rms_norm": 1})
    assert done.decisions[0].match.op is not add_rms_norm


def test_a_write_between_the_addition_and_the_norm_refuses_the_fusion() -> None:
    def program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        early, weight = total.sum(), weight * 1
        weight.mul_(2)
        return norm(total, weight), early

    done = check_rewrite(program, rows(), rows(), rows(torch.bfloat16, 64), expect={"rms_norm": 1})
    assert done.decisions[0].match.op is not add_rms_norm
