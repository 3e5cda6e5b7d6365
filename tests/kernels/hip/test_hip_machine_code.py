"""The HIP kernels as gfx942 and gfx950 machine code, executed with every check of the simulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aiter_inductor.core.jit import NoCompilerError, default_settings, find_compiler
from aiter_inductor.core.rows import row_nest
from aiter_inductor.kernels.hip import activation, norm, norm_quant, quant, rope
from aiter_inductor.kernels.hip.loading import simulating
from aiter_inductor.kernels.hip.rows import Quantisation, RowLayout, scales_for
from aiter_inductor.lowerings import activation as activation_ops
from aiter_inductor.lowerings import norm as norm_ops
from aiter_inductor.lowerings import norm_quant as norm_quant_ops
from aiter_inductor.lowerings import quant as quant_ops
from aiter_inductor.lowerings import rope as rope_ops
from tests.kernels.hip.comparing import assert_close_to_float64, assert_quantised_alike
from tests.kernels.hip.test_hip_norm import signed_rows

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8


@pytest.fixture(autouse=True, params=["gfx942", "gfx950"])
def arch(request) -> Iterator[str]:
    try:
        find_compiler(request.param, default_settings())
    except NoCompilerError as error:
        pytest.skip(str(error))
    with simulating(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


# Several rows a wave; a ragged last block; several vectors a thread; 2-byte accesses.
@pytest.mark.parametrize("shape", [(5, 128), (2, 4, 1160), (2, 7168), (3, 77)], ids=str)
def test_add_rms_norm(shape):
    x, residual, w = normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2)
    out, total = norm.add_rms_norm(x, residual, w, EPS)
    assert torch.equal(total, x + residual)
    exact = norm_ops.rms_norm.reference(total.double(), w.double(), EPS)
    assert_close_to_float64(out, exact)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(5, 128), (3, 1164)], ids=str)
def test_layer_norm(shape, dtype):
    x, w, b = (
        normal(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, shape[-1:], shape[-1:]])
    )
    exact = norm_ops.layer_norm.reference(x.double(), w.double(), b.double(), EPS)
    assert_close_to_float64(norm.layer_norm(x, w, b, EPS), exact, roundings=2)


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
@pytest.mark.parametrize(
    ("shape", "group_size"), [((3, 2112), None), ((5, 96), 32), ((2, 1152), 128)], ids=str
)
def test_rms_norm_quant(shape, group_size, dtype):
    x, w = normal(*shape), normal(shape[-1], seed=1)
    args = {"dtype": dtype, "group_size": group_size}
    out = norm_quant.rms_norm_quant(x, w, EPS, **args)
    assert_quantised_alike(*out, *norm_quant_ops.rms_norm_quant.reference(x, w, EPS, **args))


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
def test_quant_static_rounds_every_bf16_as_eager_does(dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).view(16, 4096)
    if dtype == INT8:
        x = torch.where(x.isnan(), torch.zeros_like(x), x)
    scale = torch.tensor([0.37])
    expected = quant_ops.quant_static.reference(x, scale, dtype=dtype)
    out = quant.quant_static(x, scale, dtype=dtype)
    assert torch.equal(out.float().nan_to_num(7777), expected.float().nan_to_num(7777))


@pytest.mark.parametrize("dtype", [FN, FNUZ], ids=str)
@pytest.mark.parametrize("group_size", [None, 32], ids=str)
def test_quant_of_special_values(group_size, dtype):
    x = normal(6, 96, dtype=FP32)
    x[0, 5], x[1, 40], x[3] = float("nan"), float("inf"), 0.0
    if group_size is None:
        out = quant.quant_per_token(x, dtype=dtype)
        expected = quant_ops.quant_per_token.reference(x, dtype=dtype)
    else:
        args = {"group_size": group_size, "dtype": dtype}
        out = quant.quant_per_group(x, **args)
        expected = quant_ops.quant_per_group.reference(x, **args)
    assert_quantised_alike(*out, *expected)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_largest_magnitudes_of_either_sign(dtype):
    x = signed_rows(dtype)
    expected = quant_ops.quant_per_token.reference(x, dtype=FNUZ, amax_min=1e-3)
    q, scale = quant.quant_per_token(x, dtype=FNUZ, amax_min=1e-3)
    assert_quantised_alike(q, scale, *expected)


def test_rows_of_two_loops():
    x = normal(3, 4, 160)[..., :128].transpose(0, 1)
    assert row_nest(x, x.contiguous()).inner == 3
    args = (normal(128, seed=1), EPS)
    expected = norm_quant_ops.rms_norm_quant.reference(x, *args, dtype=FNUZ)
    assert_quantised_alike(*norm_quant.rms_norm_quant(x, *args, dtype=FNUZ), *expected)


@pytest.mark.parametrize("shape", [(5, 128), (3, 4, 2120)], ids=str)
def test_quant_per_tensor(shape):
    x = normal(*shape)
    q, scale = quant.quant_per_tensor(x, dtype=FN)
    expected_q, expected_scale = quant_ops.quant_per_tensor.reference(x, dtype=FN)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), expected_q.float())


@pytest.mark.parametrize(
    ("threads", "vectors", "N"),
    [(64, 4, 4096), (64, 4, 2176), (64, 2, 1152), (64, 3, 1536), (128, 1, 1152), (128, 2, 2176)],
)
def test_chunks_of_several_vectors(threads, vectors, N):
    """The layout of many rows, on few; with nothing to spare, and ragged."""
    x = normal(3, N)
    out, scale = torch.empty_like(x, dtype=FNUZ), scales_for(x, 128)
    layout = RowLayout(threads, threads, vectors, 8, exact=N % (threads * vectors * 8) == 0)
    quant.quant_rows(x, out, scale, Quantisation("group", FNUZ, 128), layout=layout)
    expected = quant_ops.quant_per_group.reference(x, group_size=128, dtype=FNUZ)
    assert_quantised_alike(out, scale, *expected)


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 128), (2, 1164)], ids=str)
def test_act_and_mul(shape, name):
    gate, up = normal(*shape, dtype=FP32), normal(*shape, dtype=FP32, seed=1)
    exact = activation_ops.act_and_mul.reference(gate.double(), up.double(), activation=name)
    out = activation.act_and_mul(gate, up, activation=name)
    assert_close_to_float64(out, exact, roundings=8)


@pytest.mark.parametrize("N", [128, 2176])
def test_interleaved_act_and_mul_quant(N):
    both = normal(3, 2 * N)
    args = {"activation": "swiglu", "dtype": FNUZ, "group_size": 128}
    out = activation.act_and_mul_quant(both[:, ::2], both[:, 1::2], **args)
    expected = activation_ops.act_and_mul_quant.reference(both[:, ::2], both[:, 1::2], **args)
    assert_quantised_alike(*out, *expected)


@pytest.mark.parametrize("pairs", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (80, 20)], ids=str)
def test_rope_qk(head_dim, rotary_dim, pairs):
    q = normal(2, 5, 3, head_dim).transpose(1, 2)
    k = normal(2, 5, 2, head_dim, seed=1).transpose(1, 2)
    cos, sin = (normal(1, 1, 5, rotary_dim, seed=seed) for seed in (2, 3))
    style = {"rotary_dim": rotary_dim, "interleaved_in": pairs, "interleaved_out": pairs}
    expected = rope_ops.rope_qk.reference(q, k, cos, sin, **style)
    for out, want in zip(rope.rope_qk(q, k, cos, sin, **style), expected, strict=True):
        assert out.stride() == want.stride()
        torch.testing.assert_close(out, want, rtol=2**-7, atol=2**-6)
        assert (out != want).float().mean() <= 0.01


def test_qk_norm_rope():
    q, k = normal(2, 3, 5, 128), normal(2, 1, 5, 128, seed=1)
    weights = [normal(128, seed=seed) for seed in (2, 3)]
    cos, sin = (normal(1, 1, 5, 64, seed=seed, dtype=FP32) for seed in (4, 5))
    args = (q, k, *weights, cos, sin, EPS)
    style = {"out_dtype": BF16}
    expected = rope_ops.qk_norm_rope.reference(*args, **style)
    for out, want in zip(rope.qk_norm_rope(*args, **style), expected, strict=True):
        assert (out != want).float().mean() <= 0.01
        torch.testing.assert_close(out, want, rtol=2**-6, atol=2**-4)
