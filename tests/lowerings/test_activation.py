"""Gated activations: the references against models' own code, gradients, tracing and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.lowerings.activation import (
    ACTIVATIONS,
    act_and_mul,
    act_and_mul_backward,
    act_and_mul_quant,
    act_and_mul_quant_static,
)
from aiter_inductor.lowerings.activation_problem import hip_activation_unsupported
from aiter_inductor.lowerings.quant import quant_per_group
from tests.lowerings.checks import assert_same_layout, gradcheck, opcheck

FP8 = torch.float8_e4m3fn


def gpt_oss(gate, up):
    gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FORMULAS = {
    "silu": lambda g, u: F.silu(g) * u,
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "swiglu": gpt_oss,
}


def views(dtype=torch.bfloat16):
    both = 4 * torch.randn(3, 5, 64)
    both = both.to(dtype)
    yield both.chunk(2, -1)
    yield both[..., ::2], both[..., 1::2]
    yield both[..., :32].transpose(0, 1), both[..., 32:].contiguous().transpose(0, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_models_formula_bit_for_bit(activation):
    for gate, up in views():
        actual = act_and_mul.reference(gate, up, activation=activation)
        expected = FORMULAS[activation](gate, up)
        assert torch.equal(actual, expected)
        assert_same_layout(actual, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_is_eagers(activation, dtype):
    gate, up = (t.detach().clone().requires_grad_() for t in next(views(dtype)))
    grad = torch.randn(gate.shape).to(dtype)
    FORMULAS[activation](gate, up).backward(grad)
    found = act_and_mul_backward.reference(grad, gate.detach(), up.detach(), activation=activation)
    rounds_elsewhere = activation == "swiglu" and dtype == torch.bfloat16
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if rounds_elsewhere else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, (gate.grad, up.grad), **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up = (2 * t for t in torch.randn(2, 3, 8).unbind())
    gradcheck(act_and_mul, (gate, up), {"activation": activation, "limit": 1.5})


def test_quantised_is_the_composition():
    gate, up = next(views())
    q, scale = act_and_mul_quant.reference(
        gate, up, activation="silu", dtype=FP8, group_size=16, amax_min=1e-4
    )
    y = F.silu(gate) * up
    expected = quant_per_group.reference(y, group_size=16, dtype=FP8, amax_min=1e-4)
    assert torch.equal(q.float(), expected[0].float())
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    style = {"activation": activation}
    for gate, up in views(torch.float32):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        opcheck(act_and_mul, (gate, up), style)
        gate, up = gate.detach(), up.detach()
        opcheck(act_and_mul_backward, (gate, gate, up), style)
        opcheck(act_and_mul_quant, (gate, up), style | {"dtype": torch.int8, "group_size": 8})
        scale = torch.tensor(0.1)
        opcheck(act_and_mul_quant_static, (gate, up, scale), style | {"dtype": torch.int8})
    empty = torch.randn(0, 16)
    opcheck(act_and_mul_quant, (empty, empty.clone()), style | {"dtype": torch.int8})


def test_provider_traces_with_symbolic_rows():
    both = torch.randn(3, 5, 512).to(torch.bfloat16)

    def quantised(x):
        gate, up = x[..., :256], x[..., 256:512]
        return act_and_mul_quant.providers["triton"].run(
            gate, up, activation="silu", dtype=FP8, group_size=128
        )

    traced = make_fx(quantised, tracing_mode="symbolic")(both)
    kernels = [n for n in traced.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(kernels) == 1
    (x,) = (n.meta["val"] for n in traced.graph.nodes if n.op == "placeholder")
    rows = {str(size.node.expr) for size in x.shape[:2]}
    solved = [g.expr for g in traced.shape_env.guards if g.expr.is_Relational]
    assert not any({str(s) for s in e.free_symbols} <= rows and e.free_symbols for e in solved)


def reason(op, *args, arch="gfx942", **kwargs):
    selection = op.select(op.problem(*args, **kwargs), Use(arch_named(arch)))
    assert selection.provider is None
    return selection.reason


def test_refusals():
    gate, up = torch.randn(2, 4, 256).to(torch.bfloat16).unbind()
    silu = {"activation": "silu"}
    found = reason(act_and_mul_quant, gate, up, **silu, dtype=torch.float8_e4m3fnuz, arch="gfx950")
    assert "gfx950 converts to float8_e4m3fn, not to float8_e4m3fnuz" in found
    assert "gate is bfloat16 but up is float32" in reason(act_and_mul, gate, up.float(), **silu)
    assert "do not broadcast" in reason(act_and_mul, gate, up[:1], **silu)
    uneven = {"dtype": torch.int8, "group_size": 96}
    assert "do not divide into groups of 96" in reason(
        act_and_mul_quant, gate, up, **silu, **uneven
    )
    two = torch.ones(2), {"dtype": torch.int8}
    found = reason(act_and_mul_quant_static, gate, up, two[0], **silu, **two[1])
    assert "scale has 2 elements, not one" in found
    wide = torch.empty(1, 40000, dtype=torch.bfloat16)
    found = reason(act_and_mul_quant, wide, wide, **silu, dtype=torch.int8)
    assert "N=40000 is above 32768" in found
    thirds = act_and_mul.problem(wide[:, :30000:3], wide[:, 1:30000:3], **silu)
    sentence = "gate and up have last strides 3 and 3; the kernel reads 1, or 2 in turns"
    assert hip_activation_unsupported(thirds, Use(arch_named("gfx950"))) == sentence
    far = torch.empty(2**31, dtype=torch.bfloat16, device="meta").view(1, 65536, -1)[..., 0]
    found = reason(act_and_mul, far, far, **silu)
    assert "a row reaches over 2147483648 elements; kernels count up to 2147483647" in found
    assert act_and_mul.select(
        act_and_mul.problem(wide[:, ::2], wide[:, 1::2], **silu), Use(arch_named("gfx950"))
    ).provider


def test_unknown_activation_is_an_error():
    gate, up = torch.randn(2, 3, 8).unbind()
    with pytest.raises(ValueError, match="activation 'relu' is not one of silu, gelu"):
        act_and_mul.reference(gate, up, activation="relu")


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"dtype": FP8, "group_size": 128}, {"dtype": FP8, "group_size": None}],
    ids=["none", "group", "token"],
)
def test_problem_samples_itself(kwargs):
    op = act_and_mul_quant if kwargs else act_and_mul
    gate, up = torch.randn(2, 6, 256).to(torch.bfloat16).unbind()
    problem = op.problem(gate, up, activation="gelu", **kwargs)
    args, sampled = problem.sample(seed=0, device="cpu")
    assert op.problem(*args, **sampled) == problem
    scales = {"none": 0, "group": 8, "token": 4}
    written = 1 if kwargs else 2
    name = "none" if not kwargs else "group" if kwargs["group_size"] else "token"
    assert problem.bytes_moved() == 6 * (256 * (4 + written) + scales[name])
    interleaved = replace(problem, last_strides=(2, 2))
    assert interleaved.sample(seed=0, device="cpu")[0][0].stride(-1) == 2
