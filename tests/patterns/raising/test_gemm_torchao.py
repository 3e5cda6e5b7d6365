"""Linears that torchao quantised, as `quantize_` leaves them in a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aiter_inductor import explain
from tests.patterns.rewrite_check import check_rewrite

torchao = pytest.importorskip("torchao", "0.18")

from torchao import quantization as ao  # noqa: E402
from torchao.float8.inference import Float8MMConfig  # noqa: E402
from torchao.quantization.quantize_.workflows import (  # noqa: E402
    Float8Tensor,
    QuantizeTensorToFloat8Kwargs,
)
from torchao.quantization.quantize_.workflows.float8 import float8_tensor  # noqa: E402

N, K = 384, 256


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N)).to(torch.bfloat16).requires_grad_(False)


def float8(granularity, of_x=None):
    """What Float8DynamicActivationFloat8WeightConfig makes, which refuses to on a CPU."""
    old = torch.torch_version.TorchVersion(torch.__version__) < "2.12"
    if old and isinstance(granularity, ao.PerRow):
        pytest.skip(f"torch {torch.__version__} has no row-wise scaled_mm on the CPU")
    model, mm_config = linear(), Float8MMConfig(use_fast_accum=True)
    kwargs = QuantizeTensorToFloat8Kwargs(
        torch.float8_e4m3fn, of_x or granularity, mm_config=mm_config
    )
    weight = Float8Tensor.from_hp(
        model[0].weight, granularity=granularity, mm_config=mm_config, act_quant_kwargs=kwargs
    )
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def quantised(config):
    model = linear()
    ao.quantize_(model, config)
    return model


MODELS = {
    "float8 by row": (lambda: float8(ao.PerRow()), "gemm_fp8_rowwise"),
    "float8 by tensor": (lambda: float8(ao.PerTensor()), "gemm_fp8_per_tensor"),
    "float8 weights": (lambda: quantised(ao.Float8WeightOnlyConfig()), "gemm_w8a16"),
    "int8": (lambda: quantised(ao.Int8DynamicActivationInt8WeightConfig()), "gemm_int8"),
    "int8 weights": (lambda: quantised(ao.Int8WeightOnlyConfig()), "gemm_w8a16"),
}


@pytest.mark.parametrize("made, op", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K)], ids=["rows", "batch"])
def test_is_recognised(made, op, shape):
    check_rewrite(made(), torch.randn(shape).to(torch.bfloat16), expect={op: 1}, target="gfx950")


def test_any_number_of_rows():
    model, x = MODELS["float8 by row"][0](), torch.randn(5, K).to(torch.bfloat16)
    check_rewrite(model, x, expect={"gemm_fp8_rowwise": 1}, target="gfx950", dynamic=True)


def test_compiles():
    model, x = MODELS["float8 by row"][0](), torch.randn(5, K).to(torch.bfloat16)
    fast = torch.compile(model, backend="aiter", options={"aiter.force": True})
    torch.testing.assert_close(fast(x), model(x), rtol=0.016, atol=0.3)


def test_blocks(monkeypatch):
    """torchao has this product in Triton for NVIDIA only; here its formula stands in for it."""

    def product(a, a_scale, b, b_scale, block_size):
        rows = a.float() * a_scale.reshape(len(a), -1).repeat_interleave(block_size, 1)
        spread = b_scale.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        return (rows @ (b.float() * spread).T).to(torch.bfloat16)

    monkeypatch.setattr(float8_tensor, "blockwise_fp8_gemm", product)
    model = float8(ao.PerBlock([128, 128]), ao.PerBlock([1, 128]))
    x = torch.randn(5, K).to(torch.bfloat16)
    check_rewrite(model, x, expect={"gemm_fp8_blockscale": 1}, target="gfx950")


REASONS = {
    "gradients": (
        lambda: float8(ao.PerRow()),
        "gradients flow through what torchao quantises for inference",
    ),
    "int4 in int8": (
        lambda: quantised(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
        "IntxUnpackedToInt8Tensor has a zero point for each group; kernels take symmetric weights",
    ),
    "zero points": (
        lambda: quantised(
            ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ao.MappingType.ASYMMETRIC)
        ),
        "x has a zero point; kernels take symmetric activations",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_near_misses(case):
    made, reason = REASONS[case]
    training = case == "gradients"
    x = torch.randn(5, K).to(torch.bfloat16).requires_grad_(training)
    with torch.set_grad_enabled(training):
        report = explain(made(), x, target="gfx950")
    assert [(site.status, site.reason) for site in report.sites] == [("missed", reason)]


def test_a_plain_linear_is_none():
    check_rewrite(linear(), torch.randn(5, K).to(torch.bfloat16), expect={}, inserted=0)
