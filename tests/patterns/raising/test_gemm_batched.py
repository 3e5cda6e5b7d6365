"""Batches of products on dequantised fp8: spellings that are recognised, and near misses."""

from __future__ import annotations

import pytest
import torch

from tests.patterns.rewrite_check import check_rewrite

BF16, FN = torch.bfloat16, torch.float8_e4m3fn
B, M, N, K = 3, 5, 200, 256


def operands():
    torch.manual_seed(0)
    return torch.randn(B, M, K).to(FN), torch.randn(B, N, K).to(FN)


def by_tensor(x, w, s, t):
    return torch.bmm((x.float() * s).to(BF16), (w.float() * t).to(BF16).transpose(1, 2))


def by_matrix(x, w, s, t):
    return (x.to(BF16) * s.to(BF16)) @ (w.to(BF16) * t[:, None, None].to(BF16)).mT


def by_row(x, w, s, t):
    return torch.bmm(x.float() * s, (w.float() / t).mT).to(BF16)


def by_block(x, w, s, t):
    rows = (x.float().unflatten(-1, (-1, 128)) * s[..., None]).flatten(-2)
    spread = t.repeat_interleave(128, 1)[:, :N].repeat_interleave(128, 2)
    return torch.bmm(rows, (w.float() * spread).permute(0, 2, 1))


def scale(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) / 50 + 0.01


SPELLINGS = {
    "tensor": (by_tensor, scale(), scale()),
    "matrix": (by_matrix, scale(1), scale(B)),
    "row": (by_row, scale(B, M, 1), scale(B, N, 1)),
    "block": (by_block, scale(B, M, 2), scale(B, 2, 2)),
}


@pytest.mark.parametrize("program, s, t", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_is_recognised(program, s, t, dynamic):
    x, w = operands()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
        for size in range(1, s.dim()):
            if s.shape[size] == M:
                torch._dynamo.mark_dynamic(s, size)
    check_rewrite(program, x, w, s, t, expect={"bmm_fp8": 1})


def test_two_scales_are_a_near_miss():
    def program(x, w, s, t):
        return torch.bmm(x.float() * s * t, (w.float() * t).mT)

    found = check_rewrite(program, *operands(), scale(), scale(1), expect={}, inserted=0)
    assert found.reasons() == ["l_x_ has 2 scales, l_s_ and l_t_"]


def test_a_scale_of_some_rows_is_a_near_miss():
    def program(x, w, s, t):
        return torch.bmm(x.float() * s.repeat_interleave(2, 1), (w.float() * t).mT)

    x, w = operands()
    x = torch.cat((x, x[:, :1]), 1)
    found = check_rewrite(program, x, w, scale(B, 3, 1), scale(), expect={}, inserted=0)
    assert found.reasons() == ["l_s_ is shared by 2 rows; kernels scale each"]


def by_block_turned(x, w, s, t):
    rows = (x.float().unflatten(-1, (-1, 128)) * s[..., None]).flatten(-2)
    spread = t.repeat_interleave(128, 1).repeat_interleave(128, 2)[..., :N]
    return torch.bmm(rows, w.float() * spread)


TURNED = {
    "tensor": (lambda x, w, s, t: torch.bmm(x.float() * s, w.float() * t), scale(), scale()),
    "column": (lambda x, w, s, t: (x.float() * s) @ (w.float() * t), scale(), scale(B, 1, N)),
    "block": (by_block_turned, scale(B, M, 2), scale(B, 2, 2)),
}


@pytest.mark.parametrize("program, s, t", TURNED.values(), ids=TURNED)
def test_a_weight_that_is_stored_along_n(program, s, t):
    x, w = operands()
    found = check_rewrite(program, x, w.mT.contiguous(), s, t, expect={"bmm_fp8": 1})
    assert "contiguous" not in found.graphs[0]


def test_a_weight_in_another_order_is_a_near_miss():
    def program(x, w, s, t):
        return torch.bmm(x.float() * s, (w.float() * t).permute(1, 2, 0))

    x, w = operands()
    stored = w.permute(1, 0, 2).contiguous()
    found = check_rewrite(program, x, stored, scale(), scale(), expect={}, inserted=0)
    assert found.reasons() == ["l_w_ is no batch of matrices as it is stored"]


def test_no_scales_and_no_fp8_are_none():
    def plain(x, w):
        return torch.bmm(x.float(), w.float().mT)

    assert not check_rewrite(plain, *operands(), expect={}, inserted=0).reasons()
    wide = torch.randn(B, M, K), torch.randn(B, N, K)
    assert not check_rewrite(plain, *wide, expect={}, inserted=0).reasons()
