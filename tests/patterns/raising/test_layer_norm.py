"""LayerNorm: every spelling is recognised, near misses say why, and other graphs are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.rewrite_check import check_rewrite

N, EPS = 64, 1e-5
SETTINGS = [
    (torch.bfloat16, "static"),
    (torch.bfloat16, "dynamic"),
    (torch.bfloat16, "mark_dynamic"),
    (torch.float16, "mark_dynamic"),
    (torch.float32, "dynamic"),
]


def functional(x, w, b):
    return F.layer_norm(x, (N,), w, b, EPS)


def functional_without_bias(x, w, b):
    return torch.layer_norm(x, [N], weight=w, eps=EPS)


def functional_bare(x, w, b):
    return F.layer_norm(x, x.shape[-1:])


def module(x, w, b):
    return torch.nn.LayerNorm(N, dtype=x.dtype)(x) * w


def variance_method(x, w, b):
    h = x.float()
    y = (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + EPS)
    return (y * w.float() + b.float()).to(x.dtype)


def variance_with_correction(x, w, b):
    h = x.float()
    centred = h - torch.mean(h, dim=-1, keepdim=True)
    y = centred / torch.sqrt(torch.var(h, dim=-1, correction=0, keepdim=True) + EPS)
    return (b + w * y).type_as(x)


def variance_and_mean(x, w, b):
    variance, mean = torch.var_mean(x.float(), dim=-1, keepdim=True, unbiased=False)
    return ((x - mean) * (variance + EPS).rsqrt() * w + b).to(x.dtype)


def cohere(x, w, b):
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + EPS)
    return (w.to(torch.float32) * h).to(x.dtype)


def centred_once(x, w, b):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    y = h * (h * h).mean(-1, keepdim=True).add(EPS).pow(-0.5)
    return (y * w + b).to(x.dtype)


def times_one_over_root(x, w, b):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return (h * (1 / (h.square().sum(-1, keepdim=True) / N + EPS).sqrt()) * w + b).to(x.dtype)


def dimension_put_back(x, w, b):
    h = x.float()
    centred = h - h.mean(-1).unsqueeze(-1)
    return (centred * torch.rsqrt(h.var(-1, unbiased=False) + EPS)[..., None] * w + b).to(x.dtype)


def no_upcast(x, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + EPS) * w + b


def bias_only(x, w, b):
    h = x.float()
    y = (h - h.mean(-1, True)) * torch.rsqrt(h.var(-1, False, True) + EPS)
    return (y + b).to(x.dtype)


def weight_plus_one(x, w, b):
    return F.layer_norm(x, (N,), w + 1, b, EPS)


SPELLINGS = {
    f.__name__: f
    for f in (
        functional, functional_without_bias, functional_bare, variance_method,
        variance_with_correction, variance_and_mean, cohere, centred_once, times_one_over_root,
        dimension_put_back, no_upcast, bias_only, weight_plus_one,
    )
}  # fmt: skip


class Norm(torch.nn.Module):
    def __init__(self, spelling, dtype):
        super().__init__()
        self.spelling = spelling
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(N).to(dtype))
        self.bias = torch.nn.Parameter(0.1 * torch.randn(N).to(dtype))

    def forward(self, x):
        return self.spelling(x, self.weight, self.bias)


def rows(dtype, mode="static", *, lead=(2, 5), grad=False):
    x = (1 + torch.randn(*lead, N)).to(dtype).requires_grad_(grad)
    if mode == "mark_dynamic":
        torch._dynamo.mark_dynamic(x, 1)
    return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "mode"), SETTINGS, ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_recognised(name, dtype, mode):
    dynamic = True if mode == "dynamic" else None
    model = Norm(SPELLINGS[name], dtype)
    check_rewrite(model, rows(dtype, mode), expect={"layer_norm": 1}, dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_recognised_in_training(name, dtype):
    model = Norm(SPELLINGS[name], dtype)
    check_rewrite(model, rows(dtype, grad=True), expect={"layer_norm": 1}, backward=True)


def test_the_module_is_recognised():
    check_rewrite(torch.nn.LayerNorm(N), rows(torch.float32), expect={"layer_norm": 1})


def test_a_float_result_of_half_rows():
    def program(x, w, b):
        return F.layer_norm(x.float(), (N,), w.float(), b.float(), EPS), variance_method(x, w, b)

    check_rewrite(Norm(program, torch.bfloat16), rows(torch.bfloat16), expect={"layer_norm": 2})


def test_under_autocast():
    def program(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return functional(x, w, b), variance_method(x, w, b)

    check_rewrite(Norm(program, torch.bfloat16), rows(torch.bfloat16), expect={"layer_norm": 2})


def bessel(x, w, b):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS)


def over_the_first_dimension(x, w, b):
    return (x - x.mean(0, keepdim=True)) / (x.var(0, keepdim=True, correction=0) + EPS).sqrt()


def eps_outside_the_root(x, w, b):
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + b


def difference_of_squares(x, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) * torch.rsqrt(variance + EPS)


def not_centred(x, w, b):
    return x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


def eps_in_a_tensor(x, w, b):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        x.var(-1, keepdim=True, unbiased=False) + w[:1]
    )


def over_two_dimensions(x, w, b):
    return F.layer_norm(x, (5, N))


MISSES = {
    bessel: "the variance divides by N - 1 with N=64, LayerNorm by N",
    over_the_first_dimension: "the variance is over dimensions 0, not the last",
    eps_outside_the_root: "x is divided by its standard deviation, with no eps under the root",
    difference_of_squares: (
        "the variance is mean(x²) - mean(x)², which cancels where the kernel does not"
    ),
    not_centred: "l_x_ minus its mean, whose variance this is, is scaled by no user of it",
    eps_in_a_tensor: "eps is getitem, not known when compiling",
    over_two_dimensions: "normalises over 2 dimensions (5, 64), not 1",
}


@pytest.mark.parametrize("program", MISSES, ids=lambda f: f.__name__)
def test_near_misses_say_why(program):
    found = check_rewrite(Norm(program, torch.float32), rows(torch.float32), expect={})
    assert [m.reason for m in found.misses if m.pattern == "layer_norm"][:1] == [MISSES[program]]


def batch_norm(x, w, b):
    return F.batch_norm(x.transpose(1, 2), None, None, training=True)


def centred_by_another(x, w, b):
    return (x - x.exp().mean(-1, keepdim=True)) * torch.rsqrt(
        x.var(-1, keepdim=True, unbiased=False) + EPS
    )


def added_mean(x, w, b):
    return (x + x.mean(-1, keepdim=True)) * torch.rsqrt(
        x.var(-1, keepdim=True, unbiased=False) + EPS
    )


def reversed_difference(x, w, b):
    return (x.mean(-1, keepdim=True) - x) * torch.rsqrt(
        x.var(-1, keepdim=True, unbiased=False) + EPS
    )


def mean_of_other_rows(x, w, b):
    """An index of the mean's shape: what it takes out has that shape as well."""
    other = torch.arange(x.shape[0]).flip(0)
    return (x - x.mean(-1, keepdim=True)[other]) * torch.rsqrt(
        x.var(-1, keepdim=True, unbiased=False) + EPS
    )


def variance_of_other_rows(x, w, b):
    other = torch.arange(x.shape[0]).flip(0)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        x.var(-1, keepdim=True, unbiased=False)[other] + EPS
    )


@pytest.mark.parametrize(
    "program",
    [
        batch_norm,
        centred_by_another,
        added_mean,
        reversed_difference,
        mean_of_other_rows,
        variance_of_other_rows,
    ],
    ids=lambda f: f.__name__,
)
def test_other_graphs_are_left_alone(program):
    check_rewrite(Norm(program, torch.float32), rows(torch.float32), expect={})


def test_rows_rounded_before_the_weight_keep_it_outside():
    def program(x, w, b):
        h = x.float()
        y = (h - h.mean(-1, keepdim=True)) * torch.rsqrt(
            h.var(-1, keepdim=True, correction=0) + EPS
        )
        return y.to(x.dtype) * w + b

    found = check_rewrite(Norm(program, torch.bfloat16), rows(torch.bfloat16),
                          expect={"layer_norm": 1})  # fmt: skip
    assert found.decisions[0].match.argument("weight") is None


def test_a_residual_added_after_is_no_bias():
    def program(x, w, b):
        return functional(x, w, b) + x, variance_method(x, w, b) + x

    found = check_rewrite(Norm(program, torch.float32), rows(torch.float32),
                          expect={"layer_norm": 2})  # fmt: skip
    assert {d.match.argument("bias").name for d in found.decisions} == {"l_self_parameters_bias_"}
