"""Gated activations in every spelling, and what is near one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aiter_inductor.patterns.raising.act_and_mul_gelu import exact
from tests.patterns.rewrite_check import check_rewrite

ROWS, N = 5, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("static", "mark_dynamic", "dynamic")


def silu_by_sigmoid(x):
    return x * torch.sigmoid(x)


def silu_by_method(x):
    return x.sigmoid() * x


def silu_in_fp32(x):
    return F.silu(x.float()).to(x.dtype)


def sigmoid_in_fp32(x):
    f = x.float()
    return (f * torch.sigmoid(f)).type_as(x)


def gelu_in_fp32(x):
    return F.gelu(x.float()).type_as(x)


def gelu_by_erf(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_by_cdf(x):
    return x * (0.5 * (torch.erf(x * 0.7071067811865476) + 1))


def gelu_by_tanh(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def gelu_by_powers(x):
    return 0.5 * (x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))))


ACTIVATIONS = {
    "silu": (F.silu, "silu"),
    "silu_module": (nn.SiLU(), "silu"),
    "silu_by_sigmoid": (silu_by_sigmoid, "silu"),
    "silu_by_method": (silu_by_method, "silu"),
    "silu_in_fp32": (silu_in_fp32, "silu"),
    "sigmoid_in_fp32": (sigmoid_in_fp32, "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_module": (nn.GELU(), "gelu"),
    "gelu_in_fp32": (gelu_in_fp32, "gelu"),
    "gelu_by_erf": (gelu_by_erf, "gelu"),
    "gelu_by_cdf": (gelu_by_cdf, "gelu"),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "gelu_tanh_module": (nn.GELU("tanh"), "gelu_tanh"),
    "gelu_by_tanh": (gelu_by_tanh, "gelu_tanh"),
    "gelu_by_powers": (gelu_by_powers, "gelu_tanh"),
}


def two_projections(hidden, weight):
    return hidden @ weight[:, :N], hidden @ weight[:, N:]


def chunks(hidden, weight):
    return (hidden @ weight).chunk(2, dim=-1)


def splits(hidden, weight):
    return torch.split(hidden @ weight, N, dim=-1)


def slices(hidden, weight):
    both = hidden @ weight
    return both[..., :N], both[..., N:]


def interleaved(hidden, weight):
    both = hidden @ weight
    return both[..., ::2], both[..., 1::2]


SOURCES = (two_projections, chunks, splits, slices, interleaved)

CASES = [
    (name, SOURCES[(i + j) % 5], DTYPES[(i + j) % 3], MODES[(i + 2 * j) % 3], (i + j) % 2 == 0)
    for i, name in enumerate(ACTIVATIONS)
    for j in range(5)
]


class Projected(nn.Module):
    """Gate and up out of one weight: their width is static, as in models."""

    def __init__(self, program, dtype):
        super().__init__()
        self.program = program
        weight = torch.randn(8, 2 * N, generator=torch.Generator().manual_seed(1)) / 3
        self.weight = nn.Parameter(weight.to(dtype))

    def forward(self, hidden):
        return self.program(hidden, self.weight)


def hidden_states(dtype):
    return torch.randn(2, ROWS, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("name", "halves", "dtype", "mode", "gate_first"), CASES)
def test_spelling_is_computed_by_the_op(name, halves, dtype, mode, gate_first):
    activate, activation = ACTIVATIONS[name]

    def program(hidden, weight):
        gate, up = halves(hidden, weight)
        return activate(gate) * up if gate_first else up * activate(gate)

    hidden = hidden_states(dtype)
    if mode == "mark_dynamic":
        torch._dynamo.mark_dynamic(hidden, 1)
    result = check_rewrite(
        Projected(program, dtype),
        hidden,
        expect={f"{activation}_and_mul": 1},
        dynamic=True if mode == "dynamic" else None,
    )
    (decision,) = result.decisions
    assert decision.match.kwargs == {"activation": activation}
    shapes = [node.meta["example_value"].shape[-1] for node in decision.match.args]
    assert shapes == [N, N]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_flow_through_the_op(name):
    activate, activation = ACTIVATIONS[name]

    def program(hidden, weight):
        gate, up = chunks(hidden, weight)
        return activate(gate) * up

    model = Projected(program, torch.float32)
    hidden = hidden_states(torch.float32).requires_grad_()
    check_rewrite(model, hidden, expect={f"{activation}_and_mul": 1}, backward=True)


class ClampedSwiglu(nn.Module):
    """GPT-OSS's experts: limit and alpha are attributes, symbolic with `dynamic=True`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.alpha, self.limit = 1.702, 1.5
        self.form = form

    def forward(self, hidden, weight):
        both = hidden @ weight
        gate, up = both[..., ::2], both[..., 1::2]
        if self.form == "gpt_oss":
            gate, up = gate.clamp(min=None, max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        if self.form == "minimum":
            gate = torch.clamp_max(gate, self.limit)
            up = torch.clamp(up, min=-self.limit, max=self.limit)
            return gate * torch.sigmoid(self.alpha * gate) * (1 + up)
        gate = torch.clamp(gate, max=self.limit)
        up = torch.clip(up, max=self.limit, min=-self.limit)
        return torch.mul(torch.mul(torch.sigmoid(torch.mul(gate, self.alpha)), gate), up.add(1))


@pytest.mark.parametrize("form", ["gpt_oss", "minimum", "functions"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_clamped_swiglu(form, dtype, mode):
    hidden = 3 * hidden_states(dtype)
    if mode == "mark_dynamic":
        torch._dynamo.mark_dynamic(hidden, 1)
    result = check_rewrite(
        Projected(ClampedSwiglu(form), dtype),
        hidden,
        expect={"swiglu_and_mul": 1},
        dynamic=True if mode == "dynamic" else None,
    )
    kwargs = result.decisions[0].match.kwargs
    assert kwargs == {"activation": "swiglu", "alpha": 1.702, "limit": 1.5}


def test_gradients_flow_through_clamped_swiglu():
    model = Projected(ClampedSwiglu("gpt_oss"), torch.float32)
    hidden = (3 * hidden_states(torch.float32)).requires_grad_()
    check_rewrite(model, hidden, expect={"swiglu_and_mul": 1}, backward=True)


def test_open_widths_that_may_differ():
    """Even and odd columns of a tensor of open width: one may be longer."""

    def program(both):
        return F.silu(both[..., ::2]) * both[..., 1::2]

    result = check_rewrite(program, torch.randn(ROWS, 2 * N), expect={}, inserted=0, dynamic=True)
    assert result.reasons()[0].startswith("up is [s")


def clamped(gate, up, *, low=None, high=7.0, up_low=-7.0, up_high=7.0, one=1, alpha=1.702):
    gate, up = gate.clamp(low, high), up.clamp(up_low, up_high)
    glu = gate * torch.sigmoid(gate * alpha)
    return glu * (up + one)


def up_not_clamped(gate, up):
    gate = gate.clamp(max=7.0)
    return gate * torch.sigmoid(gate * 1.702) * (up + 1)


def square_of_silu(gate, up):
    active = F.silu(gate)
    return active * active


NEAR = {
    "up is one column": (
        lambda g, u: F.silu(g) * u[..., :1],
        "silu_and_mul",
        "up is [2, 5, 1] but gate is [2, 5, 16]",
    ),
    "up is wider": (
        lambda g, u: F.silu(g[:1]) * u,
        "silu_and_mul",
        "up is [2, 5, 16] but gate is [1, 5, 16]",
    ),
    "gates itself": (
        lambda g, u: F.silu(g) * g,
        "silu_and_mul",
        "gate and up are both l_g_",
    ),
    "gates its own activation": (
        square_of_silu,
        "silu_and_mul",
        "active is multiplied by active, which is made of it",
    ),
    "quick gelu": (
        lambda g, u: g * torch.sigmoid(1.702 * g) * u,
        "swiglu_and_mul",
        "l_g_·sigmoid(1.702·l_g_) is quick GELU, which no kernel has",
    ),
    "tanh constant": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(0.8 * (g + 0.05 * g**3))) * u,
        "gelu_tanh_and_mul",
        "where gelu_tanh is",
    ),
    "erf scale": (
        lambda g, u: 0.5 * g * (1 + torch.erf(g / 2)) * u,
        "gelu_and_mul",
        "where gelu is",
    ),
    "gate clamped below": (
        lambda g, u: clamped(g, u, low=-7.0),
        "swiglu_and_mul",
        "gate is clamped to [-7.0, 7.0] and up to [-7.0, 7.0], not gate to [None, limit]",
    ),
    "limits differ": (
        lambda g, u: clamped(g, u, up_high=9.0),
        "swiglu_and_mul",
        "gate is clamped to [None, 7.0] and up to [-7.0, 9.0]",
    ),
    "plus two": (
        lambda g, u: clamped(g, u, one=2),
        "swiglu_and_mul",
        "glu is multiplied by add, not up + 1",
    ),
    "up not clamped": (
        up_not_clamped,
        "swiglu_and_mul",
        "l_up_ is not clamped",
    ),
}


def gate_and_up():
    return torch.randn(2, 2, ROWS, N, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("case", NEAR)
def test_near_miss_says_why(case):
    program, pattern, reason = NEAR[case]
    result = check_rewrite(program, *gate_and_up(), expect={}, inserted=0)
    found = [miss.reason for miss in result.misses if miss.pattern == pattern]
    assert any(reason in sentence for sentence in found), result.reasons()


@pytest.mark.parametrize(
    "program",
    [
        lambda g, u: F.silu(g),
        lambda g, u: F.silu(g) * 2,
        lambda g, u: F.silu(g) + u,
        lambda g, u: torch.sigmoid(g) * u,
        lambda g, u: g * torch.sigmoid(u),
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: F.relu(g) * u,
        lambda g, u: F.silu(g) / u,
        lambda g, u: torch.erf(g) * g * u,
        lambda g, u: F.silu(g).cumsum(-1) * u,
    ],
)
def test_no_false_positive(program):
    result = check_rewrite(program, *gate_and_up(), expect={}, inserted=0)
    assert result.inserted == 0


def test_activation_that_is_used_twice():
    def program(gate, up):
        active = F.silu(gate)
        return active * up, active + 1

    result = check_rewrite(program, *gate_and_up(), expect={"silu_and_mul": 1}, inserted=0)
    assert result.reasons() == ["intermediate active has 2 users, 1 of them outside (add)"]


def test_first_product_that_fits_is_taken():
    def program(gate, up):
        active = F.silu(gate)
        return active * up * up[..., :1]

    result = check_rewrite(program, *gate_and_up(), expect={"silu_and_mul": 1})
    assert result.decisions[0].match.outputs[0].node.name == "mul"


def test_gate_written_to_in_between():
    def program(gate, up):
        gate = gate * 1.5
        active = F.silu(gate)
        gate.mul_(2)
        return active * up + gate

    result = check_rewrite(program, *gate_and_up(), expect={"silu_and_mul": 1}, inserted=0)
    assert "mul_ writes to what it reads" in result.reasons()[0]


def test_up_of_a_wider_dtype():
    gate, up = gate_and_up()

    def program(gate, up):
        return F.silu(gate) * up

    result = check_rewrite(program, gate.bfloat16(), up, expect={"silu_and_mul": 1})
    assert result.decisions[0].match.outputs[0].node.meta["example_value"].dtype == torch.float32


def test_activation_widened_before_the_product():
    def program(gate, up):
        return F.silu(gate).float() * up

    gate, up = gate_and_up()
    result = check_rewrite(program, gate.bfloat16(), up, expect={"silu_and_mul": 1})
    assert result.decisions[0].match.args[0].name == "l_gate_"


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_the_gelu_that_spellings_are_compared_with(activation, approximate):
    points = torch.linspace(-6, 6, 49, dtype=torch.float64)
    ours = torch.tensor([exact(x, activation) for x in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, F.gelu(points, approximate=approximate))
