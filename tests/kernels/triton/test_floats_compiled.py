"""Python floats arrive as float64 from code that Inductor generates; kernels compute in float32."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from aiter_inductor.kernels.triton import activation, norm, norm_backward, norm_kernel, quant, rope
from aiter_inductor.kernels.triton import norm_quant as fused
from tests.kernels.triton.compiled import compiled

FP8 = torch.float8_e4m3fn
ROWS, N = 64, 256


def rows() -> torch.Tensor:
    return torch.empty(ROWS, N, dtype=torch.bfloat16)


def heads(number: int) -> torch.Tensor:
    return torch.empty(2, number, 8, 128, dtype=torch.bfloat16)


def weight(size: int = N) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16)


def table() -> torch.Tensor:
    return torch.empty(1, 1, 8, 128, dtype=torch.bfloat16)


CASES: dict[str, tuple[ModuleType, Callable[[], object]]] = {
    "rms_norm": (norm_kernel, lambda: norm.rms_norm(rows(), weight(), 1e-6, weight_offset=1.0)),
    "rms_norm_quant": (
        norm_kernel,
        lambda: fused.rms_norm_quant(rows(), weight(), 1e-6, dtype=FP8, amax_min=1e-5),
    ),
    "rms_norm_backward": (
        norm_backward,
        lambda: norm_backward.rms_norm_backward(rows(), rows(), weight(), 1e-6, weight_offset=1.0),
    ),
    "layer_norm_backward": (
        norm_backward,
        lambda: norm_backward.layer_norm_backward(rows(), rows(), weight(), 1e-6, has_bias=True),
    ),
    "quant_per_tensor": (
        quant,
        lambda: quant.quant_per_tensor(rows(), dtype=FP8, amax_min=1e-5),
    ),
    "qk_norm_rope": (
        rope,
        lambda: rope.qk_norm_rope(
            heads(4), heads(2), weight(128), weight(128), table(), table(), 1e-6
        ),
    ),
    "act_and_mul_quant": (
        activation,
        lambda: activation.act_and_mul_quant(
            rows(), rows(), activation="swiglu", dtype=FP8, group_size=128, amax_min=1e-5
        ),
    ),
    "act_and_mul_backward": (
        activation,
        lambda: activation.act_and_mul_backward(rows(), rows(), rows(), activation="swiglu"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_value_becomes_float64(name: str) -> None:
    module, run = CASES[name]
    kernels = compiled([module], run, "sm_90", floats="fp64")
    assert kernels
    for kernel in kernels:
        tensors = [line for line in kernel.asm["ttir"].splitlines() if "xf64" in line]
        assert not tensors, tensors[:3]
