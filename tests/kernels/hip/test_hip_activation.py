"""activation.hip, built for the host, against the ops' references."""

from __future__ import annotations

import math

import pytest
import torch

from aiter_inductor.kernels.hip import activation
from aiter_inductor.lowerings import activation as ops
from tests.kernels.hip.comparing import assert_close_to_float64, assert_quantised_alike

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8


def gate_and_up(*shape: int, dtype: torch.dtype, how: str = "halves") -> list[torch.Tensor]:
    """Halves of one tensor, as a fused projection gives them, or its even and odd elements."""
    N = shape[-1]
    both = 3 * torch.randn(*shape[:-1], 2 * N, generator=torch.Generator().manual_seed(0))
    both = both.to(dtype)
    if how == "halves":
        return [both[..., :N], both[..., N:]]
    even, odd = both[..., ::2], both[..., 1::2]
    return [even, odd] if how == "gate first" else [odd, even]


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_act_and_mul_in_fp32(name):
    gate, up = gate_and_up(3, 1160, dtype=FP32)
    exact = ops.act_and_mul.reference(gate.double(), up.double(), activation=name)
    out = activation.act_and_mul(gate, up, activation=name)
    assert_close_to_float64(out, exact, roundings=4)


@pytest.mark.parametrize("how", ["halves", "gate first", "up first"])
@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_act_and_mul_rounds_where_eager_does(name, how):
    gate, up = gate_and_up(2, 3, 264, dtype=BF16, how=how)
    expected = ops.act_and_mul.reference(gate, up, activation=name)
    out = activation.act_and_mul(gate, up, activation=name)
    assert out.stride() == torch.empty_like(gate).stride()
    assert (out != expected).float().mean() <= 0.002
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-30)


def test_strided_rows_that_do_not_alternate_in_one_tensor():
    (gate, _), (_, up) = (gate_and_up(3, 40, dtype=FP32, how="gate first") for _ in range(2))
    for given in ((gate, up.clone()), (gate.clone(), up), (gate, gate)):
        exact = ops.act_and_mul.reference(*(x.double() for x in given), activation="silu")
        out = activation.act_and_mul(*given, activation="silu")
        assert_close_to_float64(out, exact, roundings=4)


@pytest.mark.parametrize("shape", [(5, 1), (2, 77), (2, 4098)], ids=str)
def test_ragged_rows(shape):
    gate, up = gate_and_up(*shape, dtype=FP16)
    exact = ops.act_and_mul.reference(gate.double(), up.double(), activation="silu")
    assert_close_to_float64(activation.act_and_mul(gate, up, activation="silu"), exact, roundings=2)


def test_gelu_over_all_of_its_range():
    gate = torch.linspace(-12, 12, 4096).view(1, -1)
    out = activation.act_and_mul(gate, torch.ones_like(gate), activation="gelu")
    erf = torch.tensor([math.erf(x / math.sqrt(2)) for x in gate.double().flatten().tolist()])
    exact = 0.5 * gate.double() * (1 + erf.double())
    assert (out.double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_special_values_pass_through(name):
    gate = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 200.0, -200.0, 1]])
    up = torch.tensor([[1.0, 1, 1, float("nan"), float("inf"), -200, 200, 1]])
    # In fp64: torch's vectorised fp32 gelu on the CPU turns an infinity into NaN.
    expected = ops.act_and_mul.reference(gate.double(), up.double(), activation=name).float()
    out = activation.act_and_mul(gate, up, activation=name)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("group_size", [None, 32, 128], ids=str)
@pytest.mark.parametrize("how", ["halves", "gate first"])
def test_act_and_mul_quant(group_size, how):
    gate, up = gate_and_up(3, 1152, dtype=BF16, how=how)
    args = {"activation": "silu", "dtype": FNUZ, "group_size": group_size}
    out = activation.act_and_mul_quant(gate, up, **args)
    assert_quantised_alike(*out, *ops.act_and_mul_quant.reference(gate, up, **args))


def test_act_and_mul_quant_static():
    gate, up = gate_and_up(3, 200, dtype=BF16)
    scale = torch.tensor(0.05)
    args = {"activation": "gelu_tanh", "dtype": FN}
    out = activation.act_and_mul_quant_static(gate, up, scale, **args)
    expected = ops.act_and_mul_quant_static.reference(gate, up, scale, **args)
    assert_quantised_alike(out, scale.view(1), expected, scale.view(1))


def test_refusals_are_sentences():
    gate, up = gate_and_up(2, 64, dtype=BF16)
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu, gelu_tanh, swiglu"):
        activation.act_and_mul(gate, up, activation="relu")
    with pytest.raises(ValueError, match="up is torch.float32; the kernel takes torch.bfloat16"):
        activation.act_and_mul(gate, up.float(), activation="silu")
    with pytest.raises(ValueError, match=r"gate is \(2, 64\) but up is \(1, 64\)"):
        activation.act_and_mul(gate, up[:1], activation="silu")
