"""RMSNorm: every spelling is recognised, near misses say why, and other graphs are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.rewrite_check import check_rewrite

N, EPS = 64, 1e-6
SETTINGS = [
    (torch.bfloat16, "static"),
    (torch.bfloat16, "dynamic"),
    (torch.bfloat16, "mark_dynamic"),
    (torch.float16, "mark_dynamic"),
    (torch.float32, "dynamic"),
]


def llama(x, w):
    h = x.to(torch.float32)
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def llama4(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * w


def gpt_oss(x, w):
    h = x.to(torch.float32)
    return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def gemma(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())).type_as(x)


def gemma_commuted(x, w):
    h = x.float()
    return ((w.float() + 1) * (torch.rsqrt(EPS + h.pow(2).mean(-1, keepdim=True)) * h)).to(x.dtype)


def t5(x, w):
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def l2_norm(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)


def functional(x, w):
    return F.rms_norm(x, (N,), w, EPS)


def functional_default_eps(x, w):
    return torch.rms_norm(x, [N], w)


def functional_bare(x, w):
    return F.rms_norm(x, (N,), eps=EPS)


def products(x, w):
    h = x.float()
    return w * (torch.rsqrt(EPS + torch.mean(h * h, dim=[-1], keepdim=True)) * h).to(x.dtype)


def squares(x, w):
    h = x.float()
    return (h * h.square().mean((-1,), True).add(EPS).rsqrt()).to(x.dtype).mul(w)


def divided_by_root(x, w):
    h = x.float()
    return w * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def times_reciprocal(x, w):
    h = x.float()
    return w * (h * (1.0 / torch.sqrt(h.pow(2).mean(2, keepdim=True) + EPS))).type_as(x)


def reciprocal_method(x, w):
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt().reciprocal()).to(x.dtype)


def power_of_minus_half(x, w):
    h = x.float()
    return w * (h * torch.pow((h**2).mean(-1, keepdim=True) + EPS, -0.5)).to(x.dtype)


def over_power_of_half(x, w):
    h = x.float()
    return w * (h / (h**2.0).mean(-1, keepdim=True).add(EPS) ** 0.5).to(x.dtype)


def sum_over_size(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / N + EPS)).to(x.dtype)


def sum_times_inverse_size(x, w):
    h = x.float()
    return w * (h * torch.rsqrt((1 / N) * h.pow(2).sum(-1, keepdim=True) + EPS)).to(x.dtype)


def dimension_put_back(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1) + EPS).unsqueeze(-1)).to(x.dtype)


def dimension_indexed_back(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1)[..., None] + EPS)).to(x.dtype)


def no_upcast(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def mean_in_float(x, w):
    return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).to(x.dtype))


def scalar_tensor_eps(x, w):
    h = x.float()
    variance = h.pow(2).mean(-1, keepdim=True) + torch.tensor(EPS)
    return w * (h * torch.rsqrt(variance)).to(x.dtype)


def weight_in_float(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w.float()


def rounded_then_float(x, w):
    h = x.float()
    y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return (y.float() * w.float()).to(x.dtype)


def weight_with_ones(x, w):
    h = x.float()
    return w.view(1, 1, -1) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def weight_plus_one_as_stored(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * (1 + w)


def weight_plus_one_rounded(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (1 + w)).to(x.dtype)


def in_place_of_module_functions(x, w):
    h = torch.Tensor.float(x)
    return torch.mul(w, torch.mul(h, torch.rsqrt(torch.mean(torch.pow(h, 2), -1, True) + EPS)).to(
        dtype=x.dtype
    ))  # fmt: skip


def aten_operators(x, w):
    aten = torch.ops.aten
    h = aten._to_copy(x, dtype=torch.float32)
    y = aten.mul(h, aten.rsqrt.default(aten.add(aten.mean(aten.pow(h, 2), [-1], True), EPS)))
    return aten.mul.Tensor(w, aten._to_copy.default(y, dtype=x.dtype))


SPELLINGS = {
    f.__name__: f
    for f in (
        aten_operators, llama, llama4, gpt_oss, gemma, gemma_commuted, t5, l2_norm, functional,
        functional_default_eps, functional_bare, products, squares, divided_by_root,
        times_reciprocal, reciprocal_method, power_of_minus_half, over_power_of_half,
        sum_over_size, sum_times_inverse_size, dimension_put_back, dimension_indexed_back,
        no_upcast, mean_in_float, scalar_tensor_eps, weight_in_float, rounded_then_float,
        weight_with_ones, weight_plus_one_as_stored, weight_plus_one_rounded,
        in_place_of_module_functions,
    )
}  # fmt: skip


class Norm(torch.nn.Module):
    """A spelling with its own weight and, under `dynamic=True`, its own symbolic eps."""

    def __init__(self, spelling, dtype):
        super().__init__()
        self.spelling = spelling
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(N).to(dtype))

    def forward(self, x):
        return self.spelling(x, self.weight)


def rows(dtype, mode="static", *, lead=(2, 5), grad=False):
    x = torch.randn(*lead, N).to(dtype).requires_grad_(grad)
    if mode == "mark_dynamic":
        torch._dynamo.mark_dynamic(x, 1)
    return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dtype", "mode"), SETTINGS, ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_recognised(name, dtype, mode, backward):
    x = rows(dtype, mode, grad=backward)
    dynamic = True if mode == "dynamic" else None
    check_rewrite(
        Norm(SPELLINGS[name], dtype), x,
        expect={"rms_norm": 1}, dynamic=dynamic, backward=backward,
    )  # fmt: skip


def mean_square(h, **kwargs):
    return h.pow(2).mean(-1, keepdim=True, **kwargs)


def over_the_first_dimension(x, w):
    return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS)


def over_two_dimensions(x, w):
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS)


def of_another_tensor(x, w):
    return (x + 1) * torch.rsqrt(mean_square(x) + EPS)


def sum_over_the_wrong_size(x, w):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 63 + EPS)


def sum_not_divided(x, w):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


def clamped_mean(x, w):
    return x * torch.rsqrt(mean_square(x).clamp(min=EPS) + EPS)


def eps_in_a_tensor(x, w):
    return x * torch.rsqrt(mean_square(x) + w[0])


def unit_length(x, w):
    return F.normalize(x, dim=-1) * N**0.5 * w


def eps_outside_the_root(x, w):
    return x / (x.norm(dim=-1, keepdim=True) * N**-0.5 + EPS)


def functional_over_two_dimensions(x, w):
    return F.rms_norm(x, (5, N), eps=EPS)


MISSES = {
    over_the_first_dimension: "the mean is over dimensions 0, not the last",
    over_two_dimensions: "the mean is over dimensions (-2, -1), not the last",
    of_another_tensor: "l_x_, whose mean square this is, is multiplied by no user of it",
    sum_over_the_wrong_size: "the sum of squares is scaled by 63.0, not divided by N=64",
    sum_not_divided: "the root is over sum, not a mean of squares plus eps",
    clamped_mean: "the root is over clamp, not a mean of squares plus eps",
    eps_in_a_tensor: "eps is getitem, not a number known when compiling",
    unit_length: "F.normalize divides by max(norm, 1e-12), not by sqrt(mean(x²) + eps)",
    eps_outside_the_root: (
        "the root mean square comes from a vector norm, so no eps is added under the root"
    ),
    functional_over_two_dimensions: "normalises over 2 dimensions (5, 64), not 1",
}


@pytest.mark.parametrize("program", MISSES, ids=lambda f: f.__name__)
def test_near_misses_say_why(program):
    found = check_rewrite(Norm(program, torch.float32), rows(torch.float32), expect={})
    assert [m.reason for m in found.misses if m.pattern == "rms_norm"][:1] == [MISSES[program]]


def adam(x, w):
    return x / (x.square().mul(0.9).sqrt() + EPS)


def scaled_by_anothers_root(x, w):
    return x.exp() * torch.rsqrt(mean_square(x) + EPS) + x


def cubed(x, w):
    return x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + EPS)


def broadcast_along_the_wrong_side(x, w):
    square = x[0, 0].outer(x[0, 0])
    return square * torch.rsqrt(square.pow(2).mean(-1) + EPS)


def power_of_a_variable(x, w):
    return x * (mean_square(x) + EPS).pow(x.mean())


def divided_by_the_inverse(x, w):
    return x / torch.rsqrt(mean_square(x) + EPS)


def multiplied_by_the_root(x, w):
    return x * torch.sqrt(mean_square(x) + EPS)


OTHERS = (
    adam, scaled_by_anothers_root, cubed, broadcast_along_the_wrong_side, power_of_a_variable,
    divided_by_the_inverse, multiplied_by_the_root,
)  # fmt: skip


@pytest.mark.parametrize("program", OTHERS, ids=lambda f: f.__name__)
def test_other_graphs_are_left_alone(program):
    check_rewrite(Norm(program, torch.float32), rows(torch.float32), expect={})


def read_between(x, w):
    h = x.float()
    y = h * torch.rsqrt(mean_square(h) + EPS)
    return (y.to(x.dtype) * w), y.sum()


def written_between(x, w):
    h = x + 0.0
    variance = mean_square(h)
    h.add_(1)
    return h * torch.rsqrt(variance + EPS)


def test_a_value_read_before_the_weight_ends_the_norm():
    found = check_rewrite(Norm(read_between, torch.bfloat16), rows(torch.bfloat16),
                          expect={"rms_norm": 1})  # fmt: skip
    (decision,) = found.decisions
    assert decision.match.argument("weight") is None
    assert decision.match.argument("out_dtype") == torch.float32


def test_an_intermediate_that_is_read_elsewhere_stays():
    def program(x, w):
        variance = mean_square(x)
        return x * torch.rsqrt(variance + EPS) * w, variance

    found = check_rewrite(Norm(program, torch.float32), rows(torch.float32),
                          expect={"rms_norm": 1}, inserted=0)  # fmt: skip
    assert found.reasons() == ["intermediate variance has 2 users, 1 of them outside (output)"]


def test_a_write_to_the_input_in_between_is_not_crossed():
    found = check_rewrite(Norm(written_between, torch.float32), rows(torch.float32),
                          expect={"rms_norm": 1}, inserted=0)  # fmt: skip
    assert found.reasons() == ["add_ writes to what it reads or switches a mode in between"]


def test_roots_that_are_gathered_are_those_of_other_rows():
    turned = torch.tensor([[2], [1], [0]])

    def program(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1) + EPS)[turned])

    check_rewrite(Norm(program, torch.float32), torch.randn(3, N), expect={})


def test_a_rounding_that_the_op_does_not_make_keeps_the_weight_outside():
    def program(x, w):
        return (x * torch.rsqrt(mean_square(x) + EPS)).to(torch.bfloat16) * w

    found = check_rewrite(program, rows(torch.float32), torch.randn(N).bfloat16(),
                          expect={"rms_norm": 1})  # fmt: skip
    (decision,) = found.decisions
    assert decision.match.argument("weight") is None
    assert decision.match.argument("out_dtype") == torch.bfloat16


def test_a_cast_of_the_reader_stays_outside():
    found = check_rewrite(lambda x, w: gemma(x, w).float(), rows(torch.bfloat16),
                          torch.randn(N).bfloat16(), expect={"rms_norm": 1})  # fmt: skip
    assert found.decisions[0].match.argument("out_dtype") is None


def test_a_float_weight_gives_a_float_norm():
    found = check_rewrite(llama, rows(torch.bfloat16), torch.randn(N), expect={"rms_norm": 1})
    match = found.decisions[0].match
    assert match.argument("round_before_weight") is True
    assert match.argument("out_dtype") == torch.float32


def test_two_norms_of_one_tensor_are_two():
    def program(x, w):
        return llama(x, w), gemma(x, w), llama(llama(x, w), w)

    check_rewrite(program, rows(torch.bfloat16), torch.randn(N).bfloat16(),
                  expect={"rms_norm": 4})  # fmt: skip


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 5)], ids=str)
def test_any_number_of_dimensions(lead):
    check_rewrite(gemma, rows(torch.bfloat16, lead=lead), torch.randn(N).bfloat16(),
                  expect={"rms_norm": 1})  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    def program(x, w):
        with torch.autocast("cpu", dtype):
            return llama(x, w), gpt_oss(x, w), F.rms_norm(x, (N,), w, EPS)

    check_rewrite(program, rows(dtype), torch.randn(N).to(dtype), expect={"rms_norm": 3})


def test_strided_rows_keep_their_strides():
    def program(x, w):
        return gemma(x.transpose(1, 2), w), gemma(x[..., : N // 2], w[: N // 2])

    check_rewrite(program, torch.randn(2, 3, 5, N).bfloat16(), torch.randn(N).bfloat16(),
                  expect={"rms_norm": 2})  # fmt: skip


def test_nothing_to_normalise():
    check_rewrite(gemma, rows(torch.bfloat16, lead=(0, 5)), torch.randn(N).bfloat16(),
                  expect={"rms_norm": 1})  # fmt: skip


def test_a_weight_read_from_the_bits_of_integers():
    def program(x, bits):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * bits.view(torch.float32)

    bits = torch.randn(1, N).view(torch.int32)
    check_rewrite(program, rows(torch.float32), bits, expect={"rms_norm": 1})
