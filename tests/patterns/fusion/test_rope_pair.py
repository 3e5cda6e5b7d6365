"""q and k rotated by the same tables become one op; norms of their heads join it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.patterns.rewrite_check import Rewritten, check_rewrite

B, S, H, KVH, D = 2, 5, 4, 2, 64


def turn(x: Tensor) -> Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + turn(x) * sin


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    f = x.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def heads(dtype: torch.dtype = torch.bfloat16, marked: bool = False) -> tuple[Tensor, ...]:
    q, k = torch.randn(B, S, H * D).to(dtype), torch.randn(B, S, KVH * D).to(dtype)
    angles = torch.randn(1, 1, S, D // 2).repeat(1, 1, 1, 2)
    found = q, k, angles.cos().to(dtype), angles.sin().to(dtype)
    if marked:
        for x, dim in zip(found, (1, 1, 2, 2), strict=True):
            torch._dynamo.mark_dynamic(x, dim)
    return found


def split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], -1, D)


def op_names(done: Rewritten) -> list[str]:
    return [decision.match.op.name for decision in done.decisions]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_pair(dtype: torch.dtype, marked: bool, backward: bool) -> None:
    def program(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = split(q).transpose(1, 2), split(k).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    q, k, cos, sin = heads(dtype, marked)
    done = check_rewrite(
        program, q.requires_grad_(backward), k.requires_grad_(backward), cos, sin,
        expect={"rope": 2}, backward=backward,
    )  # fmt: skip
    assert op_names(done) == ["rope_qk"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("before", [True, False])
def test_norms_join(dtype: torch.dtype, marked: bool, before: bool) -> None:
    def program(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        if before:
            q, k = rms(split(q), w).transpose(1, 2), rms(split(k), v).transpose(1, 2)
        else:
            q, k = rms(split(q).transpose(1, 2), w), rms(split(k).transpose(1, 2), v)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    weights = [1 + 0.1 * torch.randn(D).to(dtype) for _ in range(2)]
    done = check_rewrite(
        program, *heads(dtype, marked), *weights, expect={"rms_norm": 2, "rope": 2}
    )
    assert op_names(done) == ["qk_norm_rope"]


def test_two_views_of_one_norm_do_not_take_it_in() -> None:
    def program(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        normed = rms(split(q), w)
        return tuple(rotate(x.transpose(1, 2), cos, sin) for x in (normed, normed))

    done = check_rewrite(
        program, *heads(), torch.ones(D).bfloat16(), expect={"rms_norm": 1, "rope": 2}
    )
    assert op_names(done) == ["rms_norm", "rope_qk"]


def test_other_tables_keep_the_rotations_apart() -> None:
    def program(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = split(q).transpose(1, 2), split(k).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos * 2, sin)

    assert op_names(check_rewrite(program, *heads(), expect={"rope": 2})) == ["rope", "rope"]


def test_another_eps_keeps_the_norms_apart() -> None:
    def program(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, k = rms(split(q), w).transpose(1, 2), rms(split(k), w, 1e-5).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    done = check_rewrite(
        program, *heads(), torch.ones(D).bfloat16(), expect={"rms_norm": 2, "rope": 2}
    )
    assert sorted(op_names(done)) == ["rms_norm", "rms_norm", "rope_qk"]
    assert done.notes == [
        "qk_norm_into_rope at root: q is normalised with eps=1e-06 but k with 1e-05"
    ]


def test_a_second_reader_of_the_normalised_heads_keeps_them_apart() -> None:
    def program(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, k = rms(split(q), w).transpose(1, 2), rms(split(k), w).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), q.sum()

    done = check_rewrite(
        program, *heads(), torch.ones(D).bfloat16(), expect={"rms_norm": 2, "rope": 2}
    )
    assert sorted(op_names(done)) == ["rms_norm", "rms_norm", "rope_qk"]
    assert any("is read by" in note for note in done.notes)
