"""Gradients of the norms in CUDA C++: layouts and builds everywhere, float64 on a GPU."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.op import Use
from aiter_inductor.kernels.cuda.norm_backward import (
    BackwardLayout,
    BackwardVariant,
    add_rms_norm_backward,
    layer_norm_backward,
    rms_norm_backward,
)
from aiter_inductor.lowerings.norm import rms_norm_backward as rms_norm_backward_op
from aiter_inductor.lowerings.rows import HOPPER_ROW_BYTES, hopper_backward_unsupported
from tests.kernels.cuda.compiling import compiled

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5


@pytest.mark.parametrize("inputs", [2, 3])
def test_layouts_hold_whole_rows(inputs):
    for row_bytes in HOPPER_ROW_BYTES:
        for itemsize in (2, 4):
            layout = BackwardLayout.choose(row_bytes // itemsize, itemsize, inputs)
            assert layout.threads * layout.vectors * 16 == row_bytes
            assert layout.threads % 32 == 0
            assert layout.threads <= 1024
            assert layout.stages >= 1
            assert layout.per_sm * (layout.stages * inputs * row_bytes + 2048) <= 227 << 10


@pytest.mark.parametrize("layer", [False, True])
def test_variants_compile_without_spills(layer, tmp_path):
    layout = BackwardLayout.choose(4096, 2, 2 + layer)
    given = layer, True, layer  # a gradient of the sum, a weight, a bias
    variant = BackwardVariant("norm_backward_kernel", layer, BF16, BF16, *given, not layer, layout)
    artifact = compiled(variant, tmp_path)
    assert artifact.log.count(" 0 bytes spill stores") == 2 or "nvrtc" in artifact.compiler


def refusal(N: int, *, dtype: torch.dtype = BF16, grad_dtype: torch.dtype = BF16) -> str | None:
    x, grad = torch.empty(8, N, dtype=dtype), torch.empty(8, N, dtype=grad_dtype)
    problem = rms_norm_backward_op.problem(grad, x, torch.empty(N, dtype=dtype), EPS)
    return hopper_backward_unsupported(problem, Use(arch_named("sm_90")))


def test_refusals_say_why():
    assert refusal(8192) is None
    assert refusal(4096, dtype=FP32, grad_dtype=FP32) is None
    assert refusal(8448) == "rows of 16896 bytes are no multiple of 512 up to 16384: whole warps"
    assert refusal(1000) == "rows of 2000 bytes are no multiple of 512 up to 16384: whole warps"
    assert refusal(4096, grad_dtype=FP32) == (
        "the gradient is float32 and x bfloat16; the kernel reads one dtype"
    )


def test_hopper_takes_it_before_triton():
    takers = [p.name for p in load_ops()["layer_norm_backward"].providers.values()]
    assert takers == ["cuda", "triton"]


SHAPES = [(1, 256), (5, 1024), (300, 2304), (700, 4096), (2, 133, 7168), (0, 512)]


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within two roundings of the largest element, or what sums in fp32 lose; of no rows, zeros."""
    assert found.shape == exact.shape
    if found.numel():
        off = (found.double() - exact).abs().amax()
        assert off <= max(2 * torch.finfo(found.dtype).eps, 1e-5) * exact.abs().amax(), off


def exact_gradients(function, grad, *inputs):
    exact = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*exact), exact, grad.double())


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(shape, dtype):
    N = shape[-1]
    if N * dtype.itemsize not in HOPPER_ROW_BYTES:
        pytest.skip("refused")
    x, grad, more = (rows(*shape, dtype=dtype) for _ in range(3))
    w, b = rows(N, dtype=dtype), rows(N, dtype=dtype)

    def rms(x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (w + 1)

    dx, dw = exact_gradients(rms, grad, x, w)
    for found in (
        rms_norm_backward(grad, x, w, EPS, weight_offset=1.0),
        add_rms_norm_backward(grad, torch.zeros_like(x), x, w, EPS, weight_offset=1.0),
    ):
        assert_near(found[0], dx)
        assert_near(found[1], dw)
    total, _ = add_rms_norm_backward(grad, more, x, w, EPS, weight_offset=1.0)
    assert_near(total, dx + more.double())

    def layer(x, w, b):
        return torch.nn.functional.layer_norm(x, (N,), w, b, EPS)

    shifted = x + 3
    for found, exact in zip(
        layer_norm_backward(grad, shifted, w, EPS),
        exact_gradients(layer, grad, shifted, w, b),
        strict=True,
    ):
        assert_near(found, exact)


@NEEDS_GPU
def test_without_weight_and_with_rounding_before_it():
    x, grad = rows(77, 2048, dtype=BF16), rows(77, 2048, dtype=BF16)
    w = rows(2048, dtype=BF16)
    for weight, rounds in ((None, False), (w, True)):
        found = rms_norm_backward(grad, x, weight, EPS, round_before_weight=rounds)
        reference = rms_norm_backward_op.reference
        expected = reference(grad, x, weight, EPS, round_before_weight=rounds)
        assert_near(found[0], expected[0].double())
        assert_near(found[1], expected[1].double())


@NEEDS_GPU
def test_strided_rows_are_read_in_place_or_copied():
    wide = rows(64, 3 * 512, dtype=BF16)
    for x in (wide[:, 512:1024], wide[:, 4:516], wide.view(8, 8, 1536).transpose(0, 1)[..., :512]):
        grad, w = torch.randn_like(x), rows(512, dtype=BF16)
        dx, dw = rms_norm_backward(grad, x, w, EPS)
        expected = rms_norm_backward_op.reference(grad, x, w, EPS)
        assert dx.stride() == torch.empty_like(x).stride()
        assert_near(dx, expected[0].double())
        assert_near(dw, expected[1].double())


@NEEDS_GPU
def test_equal_inputs_give_equal_gradients():
    x, grad, w = rows(4096, 4096, dtype=BF16), rows(4096, 4096, dtype=BF16), rows(4096, dtype=BF16)
    first = rms_norm_backward(grad, x, w, EPS)
    for _ in range(3):
        again = rms_norm_backward(grad, x, w, EPS)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
