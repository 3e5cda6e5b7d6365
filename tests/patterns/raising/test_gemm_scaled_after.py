"""Linear layers that scale their product: hits, near misses, and what is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aiter_inductor import explain
from tests.patterns.rewrite_check import check_rewrite

BF16, FN, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
M, N, K = 20, 96, 64


def x_of(*leading):
    torch.manual_seed(0)
    return torch.randn(*leading, K).to(BF16)


def codes(rows, dtype=INT8):
    made = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
    return (made * (1 if dtype.is_floating_point else 20)).to(dtype)


def scale(*shape, dtype=torch.float32):
    made = torch.rand(shape, generator=torch.Generator().manual_seed(3)) / 50 + 0.01
    return made.to(dtype)


ONLY_WEIGHT = {
    "gpt-fast": lambda x, w, s: F.linear(x, w.to(x.dtype)) * s,
    "matmul": lambda x, w, s: (x @ w.to(x.dtype).t()) * s,
    "einsum": lambda x, w, s: torch.einsum("...k,nk->...n", x, w.to(x.dtype)) * s,
    "divided": lambda x, w, s: F.linear(x, w.to(x.dtype)) / s,
}


@pytest.mark.parametrize("program", ONLY_WEIGHT.values(), ids=ONLY_WEIGHT)
@pytest.mark.parametrize("dtype", [INT8, FN], ids=str)
@pytest.mark.parametrize("leading", [(M,), (2, 5)])
def test_of_the_weight(program, dtype, leading):
    if program is ONLY_WEIGHT["einsum"]:
        letters = "ab"[: len(leading)]
        equation = f"{letters}k,nk->{letters}n"

        def program(x, w, s):
            return torch.einsum(equation, x, w.to(x.dtype)) * s

    args = x_of(*leading), codes(N, dtype), scale(N, dtype=BF16)
    check_rewrite(program, *args, expect={"gemm_w8a16": 1})


def test_of_the_weight_with_a_bias_and_one_scale():
    def program(x, w, s, b):
        return (F.linear(x.float(), w.float()) * s + b).to(BF16)

    args = x_of(M), codes(N), scale(), torch.randn(N)
    check_rewrite(program, *args, expect={"gemm_w8a16": 1})


def int_mm(q, w, s, t):
    return (torch._int_mm(q, w.t()).float() * s * t).to(BF16)


def outer(q, w, s, t):
    return (F.linear(q.float(), w.float()) * (s * t)).to(BF16)


def half(q, w, s, t):
    return F.linear(q.to(BF16), w.to(BF16)) * t.to(BF16) * s.to(BF16)


@pytest.mark.parametrize("program", [int_mm, outer, half])
def test_of_both_in_int8(program):
    args = codes(M), codes(N), scale(M, 1), scale(N)
    check_rewrite(program, *args, expect={"gemm_int8": 1})


SCALES = {
    "gemm_fp8_rowwise": [(scale(M, 1), scale(N)), (scale(M, 1), scale()), (scale(), scale(1, N))],
    "gemm_fp8_per_tensor": [(scale(), scale(1)), (scale(1, 1), scale())],
}


@pytest.mark.parametrize(
    "op, s, t", [(op, *pair) for op, pairs in SCALES.items() for pair in pairs], ids=str
)
def test_of_both_in_fp8(op, s, t):
    check_rewrite(outer, codes(M, FN), codes(N, FN), s, t, expect={op: 1})


def test_a_scale_that_is_a_product_itself_is_one():
    def program(q, w, s, t, u):
        return F.linear(q.float(), w.float()) * s * (t * u)

    args = codes(M), codes(N), scale(M, 1), scale(N), scale()
    check_rewrite(program, *args, expect={"gemm_int8": 1})


def test_any_number_of_tokens():
    args = [codes(M), codes(N), scale(M, 1), scale(N)]
    for tensor in (args[0], args[2]):
        torch._dynamo.mark_dynamic(tensor, 0)
    check_rewrite(outer, *args, expect={"gemm_int8": 1})


NEAR_MISSES = {
    "a bias inside": (
        lambda x, w, s: F.linear(x, w.to(x.dtype), s) * s,
        "l_s_ is added before the product is scaled",
    ),
    "two scales": (
        lambda x, w, s: F.linear(x, w.to(x.dtype)) * s * s,
        "the product has 2 scales, of which one is the weight's",
    ),
    "widened": (
        lambda x, w, s: F.linear(x, w.to(x.dtype)) * s.float(),
        "x is bfloat16 and the result float32; kernels keep x's dtype",
    ),
}


@pytest.mark.parametrize("program, sentence", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(program, sentence):
    args = x_of(M), codes(N), scale(N, dtype=BF16)
    found = check_rewrite(program, *args, expect={}, inserted=0)
    assert sentence in found.reasons()


def test_a_scale_of_one_operand_only_is_a_near_miss():
    def program(q, w, s):
        return F.linear(q.float(), w.float()) * s

    found = check_rewrite(program, codes(M), codes(N), scale(N), expect={}, inserted=0)
    assert found.reasons() == ["the product has 1 scales, not one of x and one of the weight"]


def test_a_plain_linear_that_is_scaled_is_none():
    def program(x, w, s):
        return F.linear(x, w) * s

    args = x_of(M), torch.randn(N, K).to(BF16), scale(N, dtype=BF16)
    assert not check_rewrite(program, *args, expect={}, inserted=0).reasons()


def test_a_linear_on_stored_int8_that_nobody_claims_is_missed():
    def program(x, w, s):
        return F.linear(x, (w.to(x.dtype) - 3) * s)

    def masked(x, w, s):
        return F.linear(x, torch.where(w > 0, w, w * 2).to(x.dtype))

    args = x_of(M), codes(N), scale(N, 1, dtype=BF16)
    reasons = [[(s.status, s.reason) for s in explain(p, *args).sites] for p in (program, masked)]
    assert reasons[1] == [], "where decides: nothing says that it dequantises"
    assert reasons[0] in ([], [("missed", "l_w_ has a zero point; kernels take symmetric scales")])


def test_a_linear_in_an_unread_spelling_is_missed():
    def program(x, w, s):
        return F.linear(x, (w.to(x.dtype) * s * s))

    args = x_of(M), codes(N), scale(N, 1, dtype=BF16)
    (site,) = explain(program, *args, target="gfx942").sites
    assert (site.status, site.reason) == ("missed", "l_w_ has 2 scales, l_s_ and l_s_")
