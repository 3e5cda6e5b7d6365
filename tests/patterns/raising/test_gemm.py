"""Linears on dequantised operands: every spelling is recognised, with eager's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.raising import gemm_spellings as spell
from tests.patterns.raising.gemm_spellings import FN, INT8, Layer, blockscale
from tests.patterns.rewrite_check import check_rewrite

BF16 = torch.bfloat16
BLOCK = {"quant_per_group": 1, "gemm_fp8_blockscale": 1}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rows(*shape, dtype=BF16, dynamic=False):
    x = torch.randn(shape).to(dtype)
    for at in range(len(shape) - 1) if dynamic else ():
        if shape[at] > 1:
            torch._dynamo.mark_dynamic(x, at)
    return x


@pytest.mark.parametrize("weight", spell.WEIGHTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_weight_spellings(weight, dynamic):
    layer = Layer(blockscale(spell.WEIGHTS[weight]), (384, 256), (3, 2))
    found = check_rewrite(layer, rows(5, 256, dynamic=dynamic), expect=BLOCK)
    assert "aiter_inductor.gemm_fp8_blockscale" in found.graphs[0]
    assert "linear" not in found.graphs[0]


@pytest.mark.parametrize("activation", spell.ACTIVATIONS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(5, 256), (2, 3, 256), (1, 1, 256)])
def test_activation_spellings(activation, shape, dynamic):
    layer = Layer(blockscale(activation=spell.ACTIVATIONS[activation]), (384, 256), (3, 2))
    check_rewrite(layer, rows(*shape, dynamic=dynamic), expect=BLOCK)


@pytest.mark.parametrize("compute", [BF16, torch.float32])
@pytest.mark.parametrize("bias", [None, BF16])
@pytest.mark.parametrize("product", spell.PRODUCTS)
def test_product_spellings(product, bias, compute):
    if bias is not None:
        bias = compute
    forward = blockscale(product=spell.PRODUCTS[product], compute=compute)
    layer = Layer(forward, (384, 256), (3, 2), bias=bias)
    check_rewrite(layer, rows(2, 3, 256), expect=BLOCK)


def test_partial_blocks():
    layer = Layer(blockscale(spell.interleaved_cut), (200, 384), (2, 3))
    check_rewrite(layer, rows(5, 384), expect=BLOCK)


def tokens(scale_shape, qdtype):
    def forward(x, w, s, b):
        q, x_scale = spell.tokens_quantised(x, qdtype)
        return F.linear((q.float() * x_scale).to(x.dtype), (w.float() * s).to(x.dtype), b)

    return forward


@pytest.mark.parametrize(("qdtype", "op"), [(FN, "gemm_fp8_rowwise"), (INT8, "gemm_int8")])
@pytest.mark.parametrize("scale_shape", [(96, 1), ()])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_scales_of_tokens_and_rows(qdtype, op, scale_shape, shape):
    layer = Layer(tokens(scale_shape, qdtype), (96, 64), scale_shape, qdtype, bias=BF16)
    check_rewrite(layer, rows(*shape), expect={"quant_per_token": 1, op: 1})
    check_rewrite(layer, rows(*shape, dynamic=True), expect={"quant_per_token": 1, op: 1})


@pytest.mark.parametrize("qdtype", [FN, INT8])
def test_one_token_has_one_scale(qdtype):
    layer = Layer(tokens((), qdtype), (96, 64), (), qdtype)
    op = "gemm_fp8_per_tensor" if qdtype == FN else "gemm_int8"
    check_rewrite(layer, rows(1, 64), expect={"quant_per_token": 1, op: 1})


def test_one_scale_each():
    def forward(x, w, s, b):
        f = x.float()
        x_scale = f.abs().amax() / 448.0
        q = spell.quantise(f, x_scale)
        return F.linear((q.float() * x_scale).to(x.dtype), (w.float() * s).to(x.dtype))

    layer = Layer(forward, (96, 64), ())
    check_rewrite(layer, rows(5, 64), expect={"quant_per_tensor": 1, "gemm_fp8_per_tensor": 1})


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("qdtype", [FN, INT8])
@pytest.mark.parametrize("scale_shape", [(256, 1), (2, 3), ()])
def test_weight_only(scale_shape, qdtype, dtype):
    def forward(x, w, s, b):
        scale = s.repeat_interleave(128, 0).repeat_interleave(128, 1) if s.numel() == 6 else s
        return F.linear(x, (w.to(torch.float32) * scale).to(x.dtype), b)

    layer = Layer(forward, (256, 384), scale_shape, qdtype, bias=dtype)
    check_rewrite(layer, rows(2, 3, 384, dtype=dtype), expect={"gemm_w8a16": 1})


def test_weight_stored_transposed():
    def forward(x, w, s, b):
        return x @ (w.to(x.dtype) * s.to(x.dtype))

    layer = Layer(forward, (64, 96), (96,))
    check_rewrite(layer, rows(5, 64), expect={"gemm_w8a16": 1})


def test_division_by_a_quantising_scale():
    layer = Layer(lambda x, w, s, b: F.linear(x, w.float() / (10 * s)), (96, 64), (96, 1))
    check_rewrite(layer, rows(5, 64, dtype=torch.float32), expect={"gemm_w8a16": 1})


def test_one_dequantised_activation_for_three_linears():
    def forward(x, w, s, b):
        q, x_scale = spell.groups_quantised(x)
        f = spell.grouped(q, x_scale).to(BF16)
        return [F.linear(f, spell.interleaved(part, s).to(BF16)) for part in w.chunk(3)]

    layer = Layer(forward, (384, 256), (1, 2))
    found = check_rewrite(
        layer, rows(5, 256), expect={"quant_per_group": 1, "gemm_fp8_blockscale": 3}
    )
    assert "linear" not in found.graphs[0]


def test_norm_and_quantisation_still_fuse():
    def forward(x, w, s, b):
        return blockscale()(F.rms_norm(x, (256,), eps=1e-6), w, s, b)

    found = check_rewrite(Layer(forward, (384, 256), (3, 2)), rows(5, 256),
                          expect={"rms_norm": 1, **BLOCK}, inserted=2)  # fmt: skip
    assert "aiter_inductor.rms_norm_quant" in found.graphs[0]


NEAR = {
    "zero point": (lambda w, s: (w.float() - 3.0) * s[:96, None],
                   "l_self_buffers_weight_ has a zero point; kernels take symmetric scales"),
    "element scales": (lambda w, s: w.float() * s[:96, None] * s[None, :64], "has 2 scales"),
    "tiled": (lambda w, s: w.float() * s[:32, None].expand(32, 64).repeat(3, 1),
              "scales every element"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_say_why(name):
    dequantise, reason = NEAR[name]

    def forward(x, w, s, b):
        return F.linear(x, dequantise(w, s).to(x.dtype))

    found = check_rewrite(Layer(forward, (96, 64), (96,), INT8), rows(5, 64), expect={}, inserted=0)
    assert any(reason in sentence for sentence in found.reasons()), found.reasons()


def test_plain_linears_are_left_alone():
    found = check_rewrite(torch.nn.Linear(64, 32), torch.randn(3, 64), expect={}, inserted=0)
    assert found.misses == []
