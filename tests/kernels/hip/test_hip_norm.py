"""norm.hip and quant.hip, built for the host, against the ops' references."""

from __future__ import annotations

import pytest
import torch

from aiter_inductor.kernels.hip import norm, norm_quant, quant
from aiter_inductor.kernels.hip.rows import RowLayout
from aiter_inductor.lowerings import norm as norm_ops
from aiter_inductor.lowerings import norm_quant as norm_quant_ops
from aiter_inductor.lowerings import quant as quant_ops
from tests.kernels.hip.comparing import assert_close_to_float64, assert_quantised_alike

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


def weight(N: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return 1 + rows(N, dtype=FP32, seed=seed).div(16).to(dtype)


# 16-byte vectors in one wave, several rows a block; two waves and a ragged end; 2-byte accesses;
# one lane; a full block with several vectors a thread.
SHAPES = [(5, 128), (2, 3, 1160), (3, 100), (2, 77), (4, 1), (1, 16384), (2, 4097)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape):
    x, w = rows(*shape, dtype=BF16), weight(shape[-1], BF16)
    exact = norm_ops.rms_norm.reference(x.double(), w.double(), EPS)
    assert_close_to_float64(norm.rms_norm(x, w, EPS), exact)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_rms_norm_dtypes(dtype):
    x, w = rows(3, 264, dtype=dtype), weight(264, dtype)
    exact = norm_ops.rms_norm.reference(x.double(), w.double(), EPS, weight_offset=1.0)
    assert_close_to_float64(norm.rms_norm(x, w, EPS, weight_offset=1.0), exact)


@pytest.mark.parametrize("shape", [(5, 128), (2, 2056)], ids=str)
def test_rms_norm_rounds_where_eager_does(shape):
    x, w = rows(*shape, dtype=BF16), weight(shape[-1], FP32)
    args = {"round_before_weight": True, "weight_offset": 0.5, "out_dtype": FP32}
    expected = norm_ops.rms_norm.reference(x, w, EPS, **args)
    out = norm.rms_norm(x, w, EPS, **args)
    tipped = (out - expected).abs() > 1e-6 * expected.abs()
    assert out.dtype == FP32
    assert tipped.float().mean() <= 0.002


def test_rms_norm_without_weight():
    x = rows(3, 640, dtype=BF16)
    exact = norm_ops.rms_norm.reference(x.double(), None, EPS)
    assert_close_to_float64(norm.rms_norm(x, None, EPS), exact)


def test_add_rms_norm_reads_the_rounded_sum():
    x, residual = rows(3, 1160, dtype=BF16), rows(3, 1160, dtype=BF16, seed=2)
    w = weight(1160, BF16)
    out, total = norm.add_rms_norm(x, residual, w, EPS)
    assert torch.equal(total, x + residual)
    exact = norm_ops.rms_norm.reference((x + residual).double(), w.double(), EPS)
    assert_close_to_float64(out, exact)


@pytest.mark.parametrize("means", [(0,), (8,), (0, 100)], ids=str)
@pytest.mark.parametrize("shape", [(5, 128), (3, 1160), (2, 77)], ids=str)
def test_layer_norm(shape, means):
    """A mean of 100 would drown the variance of one pass; rows that share a wave differ in it."""
    shifts = torch.tensor([means[row % len(means)] for row in range(shape[0])])
    x = rows(*shape, dtype=BF16) + shifts[:, None].to(BF16)
    w, b = weight(shape[-1], BF16), rows(shape[-1], dtype=BF16, seed=3)
    exact = norm_ops.layer_norm.reference(x.double(), w.double(), b.double(), EPS)
    assert_close_to_float64(norm.layer_norm(x, w, b, EPS), exact)


def test_strided_rows_of_a_permuted_slice():
    wide = rows(2, 3, 4, 96, dtype=BF16)
    x = wide[..., :64].transpose(1, 2)
    w = weight(64, BF16)
    out = norm.rms_norm(x, w, EPS)
    assert out.stride() == torch.empty_like(x).stride()
    assert_close_to_float64(out, norm_ops.rms_norm.reference(x.double(), w.double(), EPS))


def test_misaligned_rows_take_narrower_accesses():
    memory = rows(4 * 128 + 1, dtype=BF16)
    x = memory[1:].view(4, 128)
    out = norm.rms_norm(x, None, EPS)
    assert_close_to_float64(out, norm_ops.rms_norm.reference(x.double(), None, EPS))


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 64, 128], ids=str)
def test_rms_norm_quant(dtype, group_size):
    x, w = rows(3, 1152, dtype=BF16), weight(1152, BF16)
    expected = norm_quant_ops.rms_norm_quant.reference(
        x, w, EPS, dtype=dtype, group_size=group_size
    )
    out = norm_quant.rms_norm_quant(x, w, EPS, dtype=dtype, group_size=group_size)
    assert_quantised_alike(*out, *expected)


def test_add_rms_norm_quant_of_short_rows():
    x, residual = rows(7, 64, dtype=FP32), rows(7, 64, dtype=FP32, seed=2)
    args = {"dtype": FN, "group_size": 32, "amax_min": 1e-4}
    q, scale, total = norm_quant.add_rms_norm_quant(x, residual, None, EPS, **args)
    expected = norm_quant_ops.add_rms_norm_quant.reference(x, residual, None, EPS, **args)
    assert_quantised_alike(q, scale, *expected[:2])
    assert torch.equal(total, expected[2])


def test_layer_norm_quant_and_static():
    x, w, b = rows(3, 1160, dtype=FP16), weight(1160, FP16), rows(1160, dtype=FP16, seed=4)
    expected = norm_quant_ops.layer_norm_quant.reference(x, w, b, EPS, dtype=FN)
    q, scale = norm_quant.layer_norm_quant(x, w, b, EPS, dtype=FN)
    assert_quantised_alike(q, scale, *expected)
    one = torch.tensor([0.01])
    expected = norm_quant_ops.layer_norm_quant_static.reference(x, w, b, EPS, one, dtype=INT8)
    out = norm_quant.layer_norm_quant_static(x, w, b, EPS, one, dtype=INT8)
    assert_quantised_alike(out, one, expected, one)


@pytest.mark.parametrize("dtype", [FN, FNUZ], ids=str)
@pytest.mark.parametrize("group_size", [None, 32], ids=str)
def test_quant_of_special_values(dtype, group_size):
    """A NaN poisons its group, infinity zeroes the rest of its, zeros give 0/0: as in eager."""
    x = rows(6, 96, dtype=FP32)
    x[0, 5], x[1, 40], x[2, 33:35] = (
        float("nan"),
        float("inf"),
        torch.tensor([-1, 1]) * float("inf"),
    )
    x[3] = 0.0
    x[4] *= 1e-38
    if group_size is None:
        out, expected = (
            quant.quant_per_token(x, dtype=dtype),
            quant_ops.quant_per_token.reference(x, dtype=dtype),
        )
    else:
        args = {"group_size": group_size, "dtype": dtype}
        out, expected = (
            quant.quant_per_group(x, **args),
            quant_ops.quant_per_group.reference(x, **args),
        )
    assert_quantised_alike(*out, *expected)


def signed_rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows below 0, above, of both signs with the farthest below, and with a NaN of either sign."""
    x = rows(6, 1160, dtype=dtype).abs()
    x[0] *= -1
    x[2, ::2] *= -1
    x[2, 700] = -9.0
    x[3, 5], x[4, 1159] = -float("nan"), float("nan")
    x[5] = -0.0
    return x


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_largest_magnitudes_of_either_sign(dtype):
    x = signed_rows(dtype)
    expected = quant_ops.quant_per_token.reference(x, dtype=FN, amax_min=1e-3)
    q, scale = quant.quant_per_token(x, dtype=FN, amax_min=1e-3)
    assert_quantised_alike(q, scale, *expected)
    assert torch.equal(scale.nan_to_num(7777), expected[1].nan_to_num(7777))


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
def test_quant_static_rounds_every_bf16_as_eager_does(dtype):
    """All finite bf16 numbers, infinities too; NaN where the format has one."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(BF16).view(16, 4096)
    if dtype == INT8:
        x = torch.where(x.isnan(), torch.zeros_like(x), x)
    scale = torch.tensor([0.37])
    expected = quant_ops.quant_static.reference(x, scale, dtype=dtype)
    out = quant.quant_static(x, scale, dtype=dtype)
    assert torch.equal(out.float().nan_to_num(7777), expected.float().nan_to_num(7777))


@pytest.mark.parametrize("shape", [(5, 128), (3, 4, 2120), (3, 77)], ids=str)
@pytest.mark.parametrize("dtype", [FNUZ, INT8], ids=str)
def test_quant_per_tensor(shape, dtype):
    x = rows(*shape, dtype=BF16)
    q, scale = quant.quant_per_tensor(x, dtype=dtype)
    expected_q, expected_scale = quant_ops.quant_per_tensor.reference(x, dtype=dtype)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), expected_q.float())


def test_quant_per_tensor_of_nothing_and_of_nan():
    with pytest.raises(ValueError, match=r"shape \(0, 8\) has no largest magnitude"):
        quant.quant_per_tensor(rows(0, 8, dtype=BF16), dtype=FN)
    x = rows(5, 128, dtype=BF16)
    x[3, 7] = float("nan")
    q, scale = quant.quant_per_tensor(x, dtype=FNUZ)
    assert scale.isnan()
    assert q.float().isnan().all()


def test_long_rows_are_cut_into_chunks():
    x = rows(2, 9 * 2048 + 128, dtype=BF16)
    out = quant.quant_per_group(x, group_size=128, dtype=FN)
    assert_quantised_alike(*out, *quant_ops.quant_per_group.reference(x, group_size=128, dtype=FN))


@pytest.mark.parametrize(
    ("num_rows", "N", "threads", "vectors"),
    [
        (64, 7168, 64, 1),
        (512, 4096, 128, 1),
        (4096, 1024, 64, 2),
        (1024, 7168, 128, 2),
        (4096, 1536, 64, 3),
        (4096, 7168, 64, 4),
    ],
)
def test_chunks_grow_with_what_there_is_to_do(num_rows, N, threads, vectors):
    layout = RowLayout.choose(num_rows, N, 8, 32, least_lanes=16, whole=False)
    exact = N % (8 * threads * vectors) == 0
    assert layout == RowLayout(threads, threads, vectors, 8, exact=exact)


@pytest.mark.parametrize(
    ("num_rows", "N", "clusters", "laid"),
    [
        (64, 18432, True, RowLayout(576, 576, 2, 8, exact=True, blocks=2)),
        (65, 18432, True, RowLayout(768, 768, 3, 8, exact=True)),
        (64, 18432, False, RowLayout(768, 768, 3, 8, exact=True)),
        (64, 16376, True, RowLayout(1024, 1024, 2, 8)),
        (64, 16392, True, RowLayout(544, 544, 2, 8, blocks=2)),
    ],
)
def test_few_long_rows_are_halved_where_blocks_share_a_row(num_rows, N, clusters, laid):
    layout = RowLayout.choose(
        num_rows, N, 8, 32, least_lanes=1, whole=True, inputs=2, clusters=clusters
    )
    assert layout == laid
    assert layout.grid(num_rows, N) == (num_rows * layout.blocks, 1)
    assert layout.blocks * layout.threads * layout.vectors * layout.vec >= N


def test_no_rows_is_no_launch():
    x = rows(0, 128, dtype=BF16)
    assert norm.rms_norm(x, None, EPS).shape == (0, 128)


@pytest.mark.parametrize(
    ("shape", "group_size", "sentence"),
    [
        ((2, 65537), None, "N=65537 is outside 1 to 65536"),
        ((2, 96), 64, "group_size=64 is not a power of two that divides N=96"),
        ((2, 96), 48, "group_size=48 is not a power of two that divides N=96"),
        ((2, 4096), 2048, "group_size=2048 exceeds 512, what 64 lanes hold in vectors of 8"),
    ],
)
def test_refusals_are_sentences(shape, group_size, sentence):
    x = rows(*shape, dtype=BF16)
    with pytest.raises(ValueError, match=sentence):
        norm_quant.rms_norm_quant(x, None, EPS, dtype=FN, group_size=group_size)


def test_rows_that_are_not_contiguous_are_refused():
    x = rows(64, 8, dtype=BF16).t()
    with pytest.raises(ValueError, match=r"strides \(1, 8\) are not contiguous"):
        norm.rms_norm(x, None, EPS)
