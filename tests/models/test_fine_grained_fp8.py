"""transformers' FP8 layers, which have no kernel of their own here, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import aiter_inductor
from aiter_inductor import fine_grained_fp8
from aiter_inductor.fine_grained_fp8 import dequantised_rows, dequantised_weight

transformers = pytest.importorskip("transformers")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

FN = torch.float8_e4m3fn
BLOCKS = [(128, 128), (64, 32), None]


@pytest.fixture(autouse=True)
def without_kernels():
    """As a process that has loaded nothing; afterwards whatever was there before."""
    before, fp8._FINEGRAINED_FP8 = fp8._FINEGRAINED_FP8, None
    torch._dynamo.reset()
    yield
    fp8._FINEGRAINED_FP8 = before


def quantised(layer: torch.nn.Linear, block_size) -> torch.nn.Module:
    """transformers' layer with the weight of a plain one."""
    N, K = layer.weight.shape
    rows, columns = block_size or (N, K)
    padded = F.pad(layer.weight.detach().float(), (0, -K % columns, 0, -N % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns)).transpose(1, 2)
    scale = blocks.abs().amax((-1, -2)) / 448
    codes = (blocks / scale[..., None, None]).transpose(1, 2).reshape(padded.shape)[:N, :K]
    made = fp8.FP8Linear(K, N, block_size=block_size, has_bias=layer.bias is not None)
    made.requires_grad_(False)
    made.weight.data = codes.to(FN)
    made.weight_scale_inv.data = scale if block_size else scale.reshape(())
    if layer.bias is not None:
        made.bias.data = layer.bias.detach().clone()
    return made


def layer_of(block_size, N: int = 192, K: int = 256, bias: bool = False):
    torch.manual_seed(0)
    return quantised(torch.nn.Linear(K, N, bias=bias).bfloat16(), block_size)


def exact(layer, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64, from activations and weight as they are after quantisation."""
    step = layer.block_size[1] if layer.block_size else 0
    rows = dequantised_rows(x.float(), FN, step, layer.activation_scale).double()
    scale = layer.weight_scale_inv.float()
    out = rows @ dequantised_weight(layer.weight, scale, layer.block_size).double().T
    return out if layer.bias is None else out + layer.bias.double()


def assert_right(out: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((out.double() - wanted).norm() / wanted.norm()) < 4e-3  # twice bfloat16's rounding


def test_a_layer_needs_a_kernel():
    x = torch.randn(3, 256).bfloat16()
    with pytest.raises(ImportError):
        layer_of((128, 128))(x)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("N", "K"), [(192, 256), (200, 320)])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
def test_eager(block_size, N, K, bias):
    aiter_inductor.provide_fp8_kernels()
    layer, x = layer_of(block_size, N, K, bias), torch.randn(2, 3, K).bfloat16()
    out = layer(x)
    assert (out.dtype, out.shape) == (torch.bfloat16, (2, 3, N))
    assert_right(out, exact(layer, x))


@pytest.mark.parametrize(
    ("block_size", "op"),
    [((128, 128), "gemm_fp8_blockscale"), (None, "gemm_fp8_rowwise")],
    ids=str,
)
def test_compiled(block_size, op):
    fine_grained_fp8.provide_missing_fp8_kernels()
    layer, x = layer_of(block_size), torch.randn(2, 3, 256).bfloat16()
    report = aiter_inductor.explain(layer, x, target="gfx950")
    assert report.count(op, "fused") == 1
    assert sum(site.status == "fused" for site in report.sites) == 2
    compiled = torch.compile(layer, backend="aiter", fullgraph=True)
    with torch.no_grad():
        assert_right(compiled(x), exact(layer, x))


def test_static_activations_and_powers_of_two():
    aiter_inductor.provide_fp8_kernels()
    layer, x = layer_of((128, 128)), torch.randn(3, 256).bfloat16()
    layer.activation_scale = torch.nn.Parameter(torch.tensor(0.01), requires_grad=False)
    assert_right(layer(x), exact(layer, x))
    layer.activation_scale = None
    layer.weight_scale_inv.data = layer.weight_scale_inv.data.to(torch.float8_e8m0fnu)
    assert_right(layer(x), exact(layer, x))


def test_gradients_pass_the_quantisation():
    aiter_inductor.provide_fp8_kernels()
    layer, x = layer_of((128, 128)), torch.randn(5, 256, requires_grad=True)
    grad = torch.randn(5, 192)
    layer(x).backward(grad)
    columns = dequantised_weight(layer.weight, layer.weight_scale_inv, layer.block_size)
    torch.testing.assert_close(x.grad, grad @ columns, rtol=1e-3, atol=1e-3)


def test_other_weights_are_refused_with_a_sentence():
    with pytest.raises(NotImplementedError, match="the weight is int8; the FP8 kernels here take"):
        fine_grained_fp8.matmul(
            torch.randn(2, 64), torch.zeros(4, 32, dtype=torch.int8), torch.ones(1, 1), (128, 128)
        )


def test_experts():
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 64, 128).to(FN), torch.rand(3, 1, 1)
    x, ids = torch.randn(5, 128).bfloat16(), torch.tensor([0, 0, 1, 2, 2])
    wide = weight.double() * scale.double()
    rows = dequantised_rows(x.float(), FN, 128).double()
    wanted = torch.stack([row @ wide[e].T for row, e in zip(rows, ids, strict=True)])
    batched = fine_grained_fp8.batched_matmul(x, weight, scale, (128, 128), ids)
    assert_right(batched, wanted)
    offsets = torch.tensor([2, 3, 5])
    grouped = fine_grained_fp8.grouped_matmul(x, weight, scale, offsets, offsets.diff(), (128, 128))
    assert_right(grouped, wanted)
