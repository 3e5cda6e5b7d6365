"""Gradients of flash attention in CUDA C++: the build everywhere, float64 and autograd on a GPU."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.core import jit
from aiter_inductor.kernels.cuda.attention import attention_with_lse
from aiter_inductor.kernels.cuda.attention_backward import BackwardVariant, attention_backward
from tests.kernels.cuda.test_attention import NEEDS_GPU, error, expected, heads

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(("causal", "window", "fp16"), [(True, False, False), (True, True, True)])
def test_variants_compile_without_spills(causal, window, fp16, tmp_path):
    settings = jit.JitSettings(tmp_path / "cache")
    try:
        jit.find_compiler("sm_90", settings)
    except jit.NoCompilerError as error:
        pytest.skip(str(error))
    variant = BackwardVariant("attention_backward", causal, window, fp16)
    artifact = jit.load(variant.module(), "sm_90", settings)
    assert "serialized" not in artifact.log
    assert "warning" not in artifact.log
    assert artifact.log.count(" 0 bytes spill stores") == 3 or "nvrtc" in artifact.compiler


CASES = {
    "one block": ((1, 1, 1, 64, 128, 128, 128), {}),
    "causal": ((2, 4, 4, 512, 512, 128, 128), {"causal": "top_left"}),
    "shared keys, ragged": ((2, 6, 2, 301, 301, 128, 128), {"causal": "top_left"}),
    "a cache before": ((1, 4, 1, 130, 900, 128, 128), {"causal": "bottom_right"}),
    "fewer keys": ((1, 2, 2, 500, 200, 128, 128), {"causal": "bottom_right"}),
    "narrow": ((1, 4, 2, 260, 190, 96, 72), {}),
    "window": ((1, 4, 2, 700, 700, 128, 128), {"causal": "top_left", "window": 100}),
    "window behind only": ((1, 2, 2, 300, 420, 128, 128), {"window": 50}),
}


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64(name, dtype):
    (batch, num_heads, kv_heads, S, T, qk_dim, v_dim), how = CASES[name]
    q, grad = (heads(batch, num_heads, S, width, dtype) for width in (qk_dim, v_dim))
    k, v = (heads(batch, kv_heads, T, width, dtype) for width in (qk_dim, v_dim))
    assert_gradients(q, k, v, grad, **how)


@NEEDS_GPU
def test_sinks_and_the_gradient_of_the_log_sum_exp():
    q, grad = (heads(1, 8, 256, 128, BF16) for _ in range(2))
    k, v = (heads(1, 2, 256, 128, BF16) for _ in range(2))
    sinks, grad_lse = torch.randn(8, device="cuda").to(BF16), torch.randn(1, 8, 256, device="cuda")
    assert_gradients(q, k, v, grad, sinks, grad_lse, causal="top_left", window=32)


@NEEDS_GPU
def test_strided_heads():
    qkv = torch.randn(2, 190, 12, 128, device="cuda").to(BF16)
    q, k, v = qkv.transpose(1, 2).split((8, 2, 2), 1)
    grad = torch.randn(2, 190, 8, 128, device="cuda").to(BF16).transpose(1, 2)
    assert_gradients(q, k, v, grad, causal="top_left")


@NEEDS_GPU
def test_no_keys_and_no_queries_give_zeros():
    q, k = heads(1, 2, 30, 128, BF16), heads(1, 2, 0, 128, BF16)
    out, lse = attention_with_lse(q, k, k, scale=0.1)
    dq, dk, dv, dsinks = attention_backward(out, q, k, k, out, lse, scale=0.1)
    assert not dq.any()
    assert (dk.shape, dv.shape, dsinks.shape) == (k.shape, k.shape, (0,))
    dq, dk, dv, _ = attention_backward(k, k, q, q, k, lse[:, :, :0], scale=0.1)
    assert not dk.any()
    assert not dv.any()


def assert_gradients(q, k, v, grad, sinks=None, grad_lse=None, **how):
    """Against autograd in float64."""
    scale = q.shape[-1] ** -0.5
    out, lse = attention_with_lse(q, k, v, None, sinks, scale=scale, **how)
    found = attention_backward(grad, q, k, v, out, lse, None, sinks, grad_lse, scale=scale, **how)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        exact.append(sinks.double().requires_grad_())
    exact_out, exact_lse = expected(*exact, scale=scale, **how)
    total = (exact_out * grad.double()).sum()
    if grad_lse is not None:
        total = total + (exact_lse * grad_lse.double()).sum()
    for ours, theirs in zip(found, torch.autograd.grad(total, exact), strict=False):
        off = torch.linalg.norm(ours.double() - theirs)
        assert off <= 1.5 * error(q.dtype) * torch.linalg.norm(theirs), tuple(ours.shape)
    assert (found[3].numel() > 0) == (sinks is not None)
