"""Gated activation kernels against their references, under the interpreter."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.kernels.triton.activation import ActivationConfig
from aiter_inductor.lowerings.activation import (
    ACTIVATIONS,
    act_and_mul,
    act_and_mul_backward,
    act_and_mul_quant,
    act_and_mul_quant_static,
)
from tests.lowerings.checks import assert_close, assert_same_layout, layouts

FP8, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONFIGS = {
    "default": None,
    "one piece": ActivationConfig(span=128, spans=1, num_warps=1),
    "many pieces": ActivationConfig(span=64, spans=16, num_warps=1),
    "wider than rows": ActivationConfig(span=1024, spans=2, num_warps=4),
}


def pair(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = 4 * torch.randn(2, *shape, generator=generator)
    return both.to(dtype).unbind()


def check(op, *args, config=None, **kwargs):
    """Run the host function on memory filled with NaN and compare it with the reference."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    extra = {} if config is None else {"config": config}
    try:
        actual = op.providers["triton"].run(*args, **kwargs, **extra)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = op.reference(*args, **kwargs)
    assert_close(actual, expected, what=op.name)
    assert_same_layout(actual, expected)
    return actual, expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_act_and_mul(activation, dtype, config):
    check(act_and_mul, *pair(5, 320, dtype=dtype), activation=activation, config=config)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu"])
def test_bf16_steps_round_as_eager_rounds(activation):
    actual, expected = check(act_and_mul, *pair(16, 512), activation=activation)
    assert (actual != expected).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 7), (1, 100), (2, 1000), (1, 18432), (64,)])
def test_shapes(shape):
    check(act_and_mul, *pair(*shape), activation="silu")
    check(act_and_mul_quant, *pair(*shape), activation="silu", dtype=FP8)


def test_halves_and_interleaved_views():
    both, _ = pair(6, 2, 512)
    for gate, up in (
        both.chunk(2, -1),
        (both[..., ::2], both[..., 1::2]),
        (both[..., 1::2], both[..., 256:]),
    ):
        check(act_and_mul, gate, up, activation="swiglu")
        check(act_and_mul_quant, gate, up, activation="silu", dtype=FP8, group_size=64)
        check(act_and_mul_backward, *pair(6, 2, 256)[:1], gate, up, activation="silu")


def test_layouts():
    gate, up = pair(3, 4, 192)
    for (_, g), (_, u) in zip(layouts(gate), layouts(up), strict=True):
        check(act_and_mul, g, u, activation="gelu")


@pytest.mark.parametrize("dtype", [FP8, FNUZ, torch.int8])
@pytest.mark.parametrize("group_size", [None, 64, 128])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quant(dtype, group_size, activation):
    kwargs = {"activation": activation, "dtype": dtype, "group_size": group_size}
    check(act_and_mul_quant, *pair(5, 384), **kwargs)
    check(act_and_mul_quant, *pair(3, 128, dtype=torch.float16), **kwargs, amax_min=1e-4)


@pytest.mark.parametrize("dtype", [FP8, FNUZ, torch.int8])
@pytest.mark.parametrize("scale", [torch.tensor(0.02), torch.tensor([0.02])], ids=["0-d", "1-d"])
def test_quant_static_saturates(dtype, scale):
    args = (*pair(5, 384), scale)
    q, _ = check(act_and_mul_quant_static, *args, activation="gelu_tanh", dtype=dtype)
    largest = q.float().abs().max()
    assert largest == (127 if dtype == torch.int8 else torch.finfo(dtype).max)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 128])
def test_what_shares_a_scale_lies_in_chunks(dtype, group_size):
    config = ActivationConfig(span=64, spans=2, num_warps=1)
    gate, up = pair(5, 384, dtype=dtype)
    gate[2, 300] = 60  # the largest of its row, in the fifth chunk of six
    kwargs = {"activation": "silu", "dtype": FP8, "group_size": group_size}
    check(act_and_mul_quant, gate, up, **kwargs, config=config)
    check(act_and_mul_quant, *pair(3, 100), activation="gelu", dtype=torch.int8, config=config)


def test_half_integers_round_to_even():
    up = torch.arange(-8, 8, dtype=torch.float32).view(1, 16) + 0.5
    gate = torch.full((1, 16), 40.0)  # silu(40) is 40
    q, _ = check(
        act_and_mul_quant_static,
        gate,
        up,
        torch.tensor(40.0),
        activation="silu",
        dtype=torch.int8,
    )
    assert q[0].tolist() == [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("amax_min", [0.0, 1e-4])
def test_nan_infinity_and_zero(activation, group_size, amax_min):
    gate, up = (t.clone() for t in pair(6, 256))
    gate[0, 3], gate[1, 7], up[2, 9], up[3, 100] = torch.nan, torch.inf, torch.nan, -torch.inf
    gate[4], up[4] = 0, -1
    gate[5, 1] = -torch.inf
    if activation == "gelu":  # PyTorch's vectorised erf on CPU makes the infinity NaN
        gate[1, 7] = 100
    check(act_and_mul, gate, up, activation=activation)
    kwargs = {"activation": activation, "dtype": FP8, "group_size": group_size}
    check(act_and_mul_quant, gate, up, **kwargs, amax_min=amax_min)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(activation, dtype):
    grad, _ = pair(5, 320, dtype=dtype, seed=1)
    gate, up = pair(5, 320, dtype=dtype)
    check(act_and_mul_backward, grad, gate, up, activation=activation)
    check(
        act_and_mul_backward, grad.new_zeros(5, 1).expand(5, 320), gate, up, activation=activation
    )
